"""The layers of a prepared network: what an integer runtime has a kernel for.

Each takes and returns the values of `arithmetic`. While the network is being calibrated, plain
tensors flow instead, and every layer is its floating-point self.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkir.quant.arithmetic import (
    Accumulated,
    Average,
    Product,
    Quantized,
    Sum,
    Value,
    round_straight_through,
    to_multiple,
    to_odd_fraction,
    to_power_of_two,
)
from sparkir.quant.convolve import Geometry, convolve_integers
from sparkir.quant.forms import InterleavedConv2d, Phases, in_rows, shuffle_rows, take_factor
from sparkir.quant.fused import round_bias, rounds_fused
from sparkir.quant.quantizer import (
    ActivationQuantizer,
    ConstantQuantizer,
    WeightQuantizer,
)
from sparkir.quant.spec import Learned

FRACTION_BITS = 15
"""Of sums that flow on as real values, in steps of the grid that they reach. Eight more bits hold
the level itself, with its zero point added, and float32 has 24."""
IMAGE_PARTS = 2**12 + 1
"""The same in steps of the image, 1/255, which no power of two divides. As the number is odd, no
sum comes nearer to a tie than half a part, which is several times what float32 rounds away."""

_EXACT_TERMS = 2**8
"""Products of two 8-bit numbers that add up exactly in float32."""


class QuantLayer(nn.Module):
    """What convolution and linear layers share: weight and bias on the runtime's grids."""

    weight: Tensor
    bias: Tensor | None
    factor: Tensor | None
    """For each output channel, on weight and bias."""

    def __init__(
        self,
        layer: nn.Conv2d | InterleavedConv2d | nn.Linear | QuantLayer,
        *,
        bits: int,
        learned: Learned,
    ) -> None:
        """Take over the parameters of `layer`; if that is one of these, share them with it."""
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        take_factor(self, getattr(layer, "factor", None))
        step = getattr(layer, "step", None)
        self.weight_quantizer: WeightQuantizer | ConstantQuantizer = (
            WeightQuantizer(self.real_weight().shape[0], bits=bits, learned=learned)
            if step is None
            else ConstantQuantizer(step, bits=bits)
        )
        # Tuples, so that the grids do not become submodules.
        self.writes: tuple[ActivationQuantizer] | None = None
        """The grid that its sums are rounded to, by an odd fraction; see `steps`."""
        self.flows_to: tuple[ActivationQuantizer, ...] = ()
        """The grids that its sums reach as real values, whole parts of their steps; see `steps`."""

    def real_weight(self) -> Tensor:
        """(C_out, ...), the weights that are rounded."""
        if self.factor is None:
            return self.weight
        return self.weight * self.factor.reshape(-1, *[1] * (self.weight.dim() - 1))

    def real_bias(self) -> Tensor | None:
        """(C_out,)"""
        if self.factor is None or self.bias is None:
            return self.bias
        return self.bias * self.factor.reshape(-1)

    def weight_scale(self, input_scale: Tensor) -> Tensor:
        """(C_out,), the steps of the weights."""
        scale = self.weight_quantizer.scale()
        if self.flows_to:
            unit = torch.stack([_part_of(grid) for grid in self.flows_to]).min()
            # The image's step has an odd number of parts, and no ties.
            odd = any(grid.image_step is None for grid in self.flows_to)
            return to_multiple(scale * input_scale.detach(), unit, odd=odd) / input_scale.detach()
        if self.writes is not None:
            ratio = (input_scale * scale / self.writes[0].scale()).detach()
            return scale * (to_odd_fraction(ratio) / ratio)
        return scale

    def integers(self, input_scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(weight, bias, step of the sums (C_out,)), all whole numbers but the last.

        The bias is an int32 of step input_scale * weight_scale, as the runtime will make it.
        """
        real, bias = self.real_weight(), self.real_bias()
        weight, weight_scale = self.weight_quantizer(real, self.weight_scale(input_scale))
        if bias is not None and rounds_fused():
            return weight, *round_bias(bias, input_scale, weight_scale)
        scale = input_scale * weight_scale
        if bias is None:
            return weight, None, scale
        return weight, round_straight_through(bias / scale), scale


def _part_of(grid: ActivationQuantizer) -> Tensor:
    """What sums that reach `grid` as real values count."""
    scale = grid.scale().detach()
    if grid.image_step is not None:
        return scale / IMAGE_PARTS
    return to_power_of_two(scale) * 2.0**-FRACTION_BITS


class QuantConv2d(QuantLayer):
    """A convolution over integers; of a transposed one, before the pixel shuffle."""

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        layer: nn.Conv2d | InterleavedConv2d | QuantConv2d,
        *,
        bits: int,
        learned: Learned,
    ) -> None:
        """Take over `layer`, which pads with zeros."""
        # Not a module, hence allowed before the parent is made, which asks for the weights.
        self.phases: Phases | None = getattr(layer, "phases", None)
        super().__init__(layer, bits=bits, learned=learned)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups
        self.shuffled: int | None = None
        """The factor of the pixel shuffle that alone reads its channels; see `rows`."""

    def rows(self) -> int | None:
        """That factor, if it gives the pixel shuffle its channels `in_rows`."""
        last = self.weight.is_contiguous(memory_format=torch.channels_last)
        return self.shuffled if last and rounds_fused() else None

    def real_weight(self) -> Tensor:
        """(C_out, C_in / groups, h, w), the weights that are rounded."""
        weight = super().real_weight()
        return weight if self.phases is None else self.phases.expanded(weight)

    def real_bias(self) -> Tensor | None:
        """(C_out,)"""
        bias = super().real_bias()
        return bias if self.phases is None else self.phases.repeated(bias)

    def forward(self, x: Quantized | Tensor) -> Accumulated | Tensor:
        """(B, C_in, H, W) on a grid -> sums (B, C_out, H', W')."""
        if isinstance(x, Tensor):
            return self.geometry.convolve(x, self.real_weight(), self.real_bias())
        weight, bias, scale = self.integers(x.scale)
        if (factor := self.rows()) is not None:
            weight, scale = in_rows(weight, factor), in_rows(scale, factor)
            bias = None if bias is None else in_rows(bias, factor)
        sums = convolve_integers(x.ints, x.zero, weight, bias, self.geometry)
        return Accumulated(sums, scale.view(-1, 1, 1))

    @property
    def geometry(self) -> Geometry:
        """How it moves over the image."""
        border = None if self.phases is None else self.phases.border
        return Geometry(self.stride, self.padding, self.dilation, self.groups, border)

    def extra_repr(self) -> str:
        """What print shows."""
        out_channels, in_channels, *kernel = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel={tuple(kernel)}, stride={self.stride}"


class QuantLinear(QuantLayer):
    """A linear layer over integers."""

    def forward(self, x: Quantized | Tensor) -> Accumulated | Tensor:
        """(..., C_in) on a grid -> sums (..., C_out)."""
        if isinstance(x, Tensor):
            return F.linear(x, self.weight, self.bias)
        weight, bias, scale = self.integers(x.scale)
        return Accumulated(F.linear(x.ints, weight, bias), scale)


class Add(nn.Module):
    """Element-wise addition; the grid of the result comes next."""

    def forward(self, a: Quantized | Tensor, b: Quantized | Tensor) -> Sum | Tensor:
        """Shapes broadcast."""
        if isinstance(a, Tensor):
            return a + cast("Tensor", b)
        return Sum(a, cast("Quantized", b))


class Multiply(nn.Module):
    """Element-wise multiplication; the grid of the result comes next."""

    def forward(self, a: Quantized | Tensor, b: Quantized | Tensor) -> Product | Tensor:
        """Shapes broadcast."""
        if isinstance(a, Tensor):
            return a * cast("Tensor", b)
        return Product(a, cast("Quantized", b))


class MatrixProduct(nn.Module):
    """A product of two matrices that both flow; the grid of the result comes next."""

    def forward(self, a: Quantized | Tensor, b: Quantized | Tensor) -> Accumulated | Tensor:
        """(..., m, k) and (..., k, n) -> sums (..., m, n)."""
        if isinstance(a, Tensor):
            return a @ cast("Tensor", b)
        other = cast("Quantized", b)
        if self.training or a.ints.shape[-1] <= _EXACT_TERMS:
            sums = a.ints @ other.ints
        else:
            sums = (a.ints.double() @ other.ints.double()).float()
        return Accumulated(sums, a.scale * other.scale)


class Concatenate(nn.Module):
    """Concatenation of tensors that were put on one grid beforehand."""

    def __init__(self, dim: int) -> None:
        """Concatenate along `dim`."""
        super().__init__()
        self.dim = dim

    def forward(self, *parts: Quantized | Tensor) -> Quantized | Tensor:
        """One grid in, the same grid out."""
        first = parts[0]
        if isinstance(first, Tensor):
            return torch.cat(cast("tuple[Tensor, ...]", parts), self.dim)
        ints = [_in_steps_of(first, part) for part in cast("tuple[Quantized, ...]", parts)]
        return first._replace(ints=torch.cat(ints, self.dim))


def _in_steps_of(first: Quantized, part: Quantized) -> Tensor:
    """`part.ints`, whose step has the same value as the step of `first`.

    LSQ scales a step's gradient by the size of what a call rounds, and readers know the step of
    the first part only: of a part made in a larger or smaller piece, the difference of two large
    sums would be left.
    """
    if part.scale is first.scale or not part.scale.requires_grad:
        return part.ints
    return part.ints * (part.scale / first.scale)  # exact: the ratio is 1


class GlobalAverage(nn.Module):
    """The mean of each channel over the image."""

    def forward(self, x: Quantized | Tensor) -> Average | Tensor:
        """(B, C, H, W) -> (B, C, 1, 1); the grid of the result comes next."""
        if isinstance(x, Tensor):
            return x.sum((2, 3), keepdim=True) * (1 / (x.shape[2] * x.shape[3]))
        return Average(*x, pixels=x.ints.shape[2] * x.ints.shape[3])


class Call(nn.Module):
    """A function or tensor method with its constant arguments, as a module."""

    def __init__(self, function: Callable[..., Tensor], *args: object, **kwargs: object) -> None:
        """Remember `function(x, *args, **kwargs)`."""
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Call it, with more arguments perhaps."""
        return self.function(x, *self.args, *args, **self.kwargs, **kwargs)

    def extra_repr(self) -> str:
        """What print shows."""
        return getattr(self.function, "__name__", repr(self.function))


class PassThrough(nn.Module):
    """An operation that moves or selects values (shuffle, max-pool): integers keep their grid."""

    def __init__(self, operation: nn.Module) -> None:
        """Wrap a module of one tensor, and perhaps sizes."""
        super().__init__()
        self.operation = operation
        self.shuffles: tuple[QuantConv2d] | None = None  # a tuple, so that it is no submodule
        """Of a pixel shuffle: the convolution of which it alone reads the channels; see `rows`."""

    def forward(
        self, x: Quantized | Tensor, *sizes: object, **options: object
    ) -> Quantized | Tensor:
        """Apply it to the integers, or in calibration to the values."""
        if isinstance(x, Tensor):
            return cast("Tensor", self.operation(x, *sizes, **options))
        if self.shuffles is not None and (factor := self.shuffles[0].rows()) is not None:
            return x._replace(ints=shuffle_rows(x.ints, factor))
        return x._replace(ints=self.operation(x.ints, *sizes, **options))


class Table(nn.Module):
    """A function of one value on a grid: at run time, a table of 256 entries."""

    def __init__(self, operation: nn.Module) -> None:
        """Wrap an element-wise module."""
        super().__init__()
        self.operation = operation

    def forward(self, x: Quantized | Tensor) -> Tensor:
        """Real values; the grid of the result comes next."""
        return cast("Tensor", self.operation(x if isinstance(x, Tensor) else x.dequantize()))


def as_constant(function: nn.Module) -> nn.Module:
    """A function of one value without what it has learned: a leaky ReLU for a PReLU."""
    if isinstance(function, nn.PReLU):
        return nn.LeakyReLU(float(function.weight.detach()))
    return function


def is_linear_from_zero(function: nn.Module) -> bool:
    """Whether the function of a positive multiple is the multiple of the function."""
    if isinstance(function, Call):
        return function.function in (F.leaky_relu, F.relu, torch.relu, Tensor.relu)
    return isinstance(function, nn.LeakyReLU | nn.ReLU | nn.PReLU)


class AbsorbedReLU(nn.Module):
    """A ReLU that the next grid performs by starting at zero."""

    def forward(self, value: Value) -> Value:
        """Integers unchanged; in calibration, ReLU."""
        return value.relu() if isinstance(value, Tensor) else value


class Dequantize(nn.Module):
    """Real values, for an operation that stays in floating point."""

    def forward(self, x: Quantized | Tensor) -> Tensor:
        """Integers times step."""
        return x if isinstance(x, Tensor) else x.dequantize()
