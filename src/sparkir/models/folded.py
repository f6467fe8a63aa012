"""Convolutions that stand for several: published networks train them apart and add them up."""

from collections import OrderedDict

from torch import nn


def folded(name: str, inputs: int, outputs: int) -> nn.Module:
    """Return a 3x3 convolution inside a module of its own, under the published `name`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers[name] = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(layers)
