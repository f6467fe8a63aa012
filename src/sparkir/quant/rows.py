"""Pixel shuffles that copy rows of memory, where training rounds in compiled passes.

A pixel shuffle takes the r x r pixels of a block from r * r channels that lie side by side in
channels_last, and so moves value by value. If a convolution makes the same channels in another
order, pixel by pixel and of each all its channels, whole rows move. That order is had from the
convolution's weights, which are few. Parameters, grids, and all that is measured or exported keep
the order that they have.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparkir.quant.calls import named
from sparkir.quant.layers import AbsorbedReLU, Call, PassThrough, QuantConv2d
from sparkir.quant.quantizer import ActivationQuantizer


def shuffle_in_rows(prepared: fx.GraphModule) -> None:
    """Tell pixel shuffles, and the convolutions that they alone read, that they can."""
    modules = dict(prepared.named_modules())
    for node in prepared.graph.nodes:
        shuffle = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(shuffle, PassThrough) or (factor := _factor(node, shuffle)) is None:
            continue
        convolution = _convolution_before(node, modules)
        if convolution is not None and convolution.groups == 1:
            convolution.shuffled, shuffle.shuffles = factor, (convolution,)


def _factor(node: fx.Node, moves: PassThrough) -> int | None:
    """r of a pixel shuffle; None of another operation."""
    match moves.operation:
        case nn.PixelShuffle(upscale_factor=factor):
            return int(factor)
        case Call(function=function) if function in (F.pixel_shuffle, torch.pixel_shuffle):
            factor = named(node, "input upscale_factor")["upscale_factor"]
            return factor if isinstance(factor, int) else None  # it may follow from a size
        case _:
            return None


def _convolution_before(node: fx.Node, modules: Mapping[str, nn.Module]) -> QuantConv2d | None:
    """What made the values on a grid that `node` moves, if nobody else sees their channels."""
    while True:
        node = node.all_input_nodes[0]
        made_by = modules.get(str(node.target)) if node.op == "call_module" else None
        if len(node.users) > 1:
            return None
        if isinstance(made_by, QuantConv2d):
            return made_by
        if not isinstance(made_by, ActivationQuantizer | AbsorbedReLU):
            return None
