"""Operations in floating point that come out the same in every library.

They read integers. Sums of integers are exact in float32, in any order, and everything else is one
operation of IEEE 754 after the other; an exponential, of which libraries differ in the last bits,
is rounded to whole parts of 1024. What a training step computes, the frozen network and the file
compute then too. (A library's own normalisation differs in one value of 10,000, and through a deep
network that shows in most pixels.)
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sparkir.models.attention import BiasedSoftmax, looked_up
from sparkir.models.normalize import LayerNorm2d
from sparkir.quant.arithmetic import Quantized

_EXPONENTIAL_PARTS = 2.0**10
_BIAS_PARTS = 2.0**4
"""Of the step of the scores; biases are whole numbers of them, so that adding one is exact."""
_UNSEEN = 2.0**20
"""By how many of those a mask pushes a score below all others."""


def is_fixed(layer: nn.Module) -> bool:
    """Whether `layer` is an operation that can be computed so."""
    if type(layer) in (nn.LayerNorm, LayerNorm2d):  # what derives may do anything with them
        return len(cast("nn.LayerNorm", layer).normalized_shape) == 1
    return isinstance(layer, BiasedSoftmax)


class Fixed(nn.Module):
    """An operation that reads integers of a grid, (ints, step), and makes real values."""


def fixed(layer: nn.Module) -> Fixed:
    """`layer`, for which `is_fixed` holds, with its parameters."""
    if isinstance(layer, nn.LayerNorm):
        return FixedLayerNorm(layer)
    return FixedSoftmax(cast("BiasedSoftmax", layer))


class FixedLayerNorm(Fixed):
    """Layer normalisation over the last dimension, or the channels of (B, C, H, W)."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        """Take over `layer`."""
        super().__init__()
        self.layer = layer
        planes = isinstance(layer, LayerNorm2d)
        self.dim, self.shape = (1 if planes else -1), ((-1, 1, 1) if planes else (-1,))

    def forward(self, x: Quantized | Tensor) -> Tensor:
        """On a grid -> real values; in calibration, the layer itself."""
        if isinstance(x, Tensor):
            return cast("Tensor", self.layer(x))
        epsilon = self.layer.eps / (x.scale * x.scale)
        normal = normalized(x.ints.float(), dim=self.dim, epsilon=epsilon)
        if self.layer.weight is not None:
            normal = normal * self.layer.weight.view(self.shape)
        return normal if self.layer.bias is None else normal + self.layer.bias.view(self.shape)


def normalized(ints: Tensor, *, dim: int, epsilon: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) along `dim`, from sums of integers and of squares.

    A whole number next to the mean is taken off first: sums of squares stay small, and nothing is
    lost when the square of what is left of the mean is taken from them.
    """
    share = 1 / ints.shape[dim]
    centred = ints - (ints.detach().sum(dim, keepdim=True) * share).round()
    mean = centred.sum(dim, keepdim=True) * share
    variance = (centred * centred).sum(dim, keepdim=True) * share - mean * mean
    return (centred - mean) * _inverse((variance.clamp_min(0) + epsilon).sqrt())


def _inverse(x: Tensor) -> Tensor:
    """1 / x as a division, which IEEE 754 rounds one way.

    OpenVINO divides by multiplying by an inverse; ONNX Runtime's own inverse is approximate.
    """
    return torch.div(x.new_ones(()), x)


class FixedSoftmax(Fixed):
    """Softmax of scores and looked up biases, of which those behind a mask do not count."""

    levels: Tensor | None
    """Of a network that no longer learns: its table of biases in parts of the step."""

    def __init__(self, layer: BiasedSoftmax) -> None:
        """Take over `layer`."""
        super().__init__()
        self.layer = layer
        self.register_buffer("levels", None)

    def forward(
        self, x: Quantized | Tensor, table: Tensor | None, index: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """On a grid -> weights that sum to 1; in calibration, the layer itself.

        `table` is None once `levels` has it. A gradient is that of the smooth function.
        """
        if isinstance(x, Tensor):
            return cast("Tensor", self.layer(x, table, index, mask))
        step = x.scale * (self.layer.factor / _BIAS_PARTS)
        levels = self.levels if table is None else self.rounded(table, x.scale)
        bias = looked_up(cast("Tensor", levels), index)
        weights = weights_of(x.ints.float() * _BIAS_PARTS + bias, step, mask=mask)
        if not self.training:
            return weights
        smooth: Tensor = self.layer(x.dequantize(), table, index, mask)
        return weights.detach() + (smooth - smooth.detach())  # exact: that is zero

    @torch.no_grad()
    def rounded(self, table: Tensor, scale: Tensor) -> Tensor:
        """`table` of biases in whole parts of a score's step `scale`."""
        return (table / (scale * (self.layer.factor / _BIAS_PARTS))).round()


def weights_of(levels: Tensor, step: Tensor, *, mask: Tensor | None) -> Tensor:
    """Weights that sum to 1 along the last dimension, as exp(levels * step) where `mask` is 0.

    `levels` are whole numbers.
    """
    hidden = None if mask is None else (mask < 0).to(levels.dtype)
    if hidden is not None:
        levels = levels - hidden * _UNSEEN
    below = levels - levels.amax(-1, keepdim=True)
    parts = ((below * step).exp() * _EXPONENTIAL_PARTS).round()
    if hidden is not None:  # however small the step
        parts = parts * (1 - hidden)
    weights: Tensor = parts * _inverse(parts.sum(-1, keepdim=True))
    return weights
