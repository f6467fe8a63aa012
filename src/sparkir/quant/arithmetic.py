"""Integer arithmetic held in float32, exactly as an integer runtime computes it.

Values between layers are pairs (integers, scale): the integers are whole numbers in a float32
tensor with the zero point already subtracted, so that zero padding means zero, and a convolution
over them is exact while sums stay below 2**24. Rounding happens only in `quantize`, and there it
follows ONNX Runtime's kernels operation by operation, so that the network that is trained, the
frozen reference and the deployed file agree bit for bit.

Gradients pass the rounding straight through. In integer units that *is* LSQ: a step size acts
once where the integers are made (1 / scale) and once where they are used (* scale), and the two
paths add up to round(v) - v inside the range and to the bound outside (Esser 2020, eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparkir.quant import fused


class Quantized(NamedTuple):
    """A tensor on a grid: real value = ints * scale, stored byte = ints + zero."""

    ints: Tensor
    """Whole numbers, zero point subtracted, any shape; in float32, or in bfloat16, which holds them
    as well (`fused`)."""
    scale: Tensor
    """(), the step."""
    zero: Tensor
    """(), the stored byte that means 0."""

    def dequantize(self) -> Tensor:
        """The real values."""
        return self.ints.float() * self.scale


class Accumulated(NamedTuple):
    """The int32 sums of a convolution, not yet on a grid."""

    ints: Tensor
    scale: Tensor
    """(C, 1, 1) or (C,): input step times each output channel's weight step."""

    def dequantize(self) -> Tensor:
        """The real values."""
        return self.ints.float() * self.scale


class Sum(NamedTuple):
    """An addition waiting for the grid of its result."""

    a: Quantized
    b: Quantized


class Product(NamedTuple):
    """An element-wise product waiting for the grid of its result."""

    a: Quantized
    b: Quantized


class Average(NamedTuple):
    """A mean over an image waiting for the grid of its result."""

    ints: Tensor
    """(B, C, H, W), what is averaged."""
    scale: Tensor
    zero: Tensor
    pixels: int
    """H * W."""

    def sums(self) -> Tensor:
        """(B, C, 1, 1), exact, then rounded to float32 as an int32 would be."""
        exact_px = 2**16  # of 8 bits each; beyond that a sum in float32 skips whole numbers
        wide = torch.float64 if self.pixels > exact_px else torch.float32
        return self.ints.sum((2, 3), keepdim=True, dtype=wide).float()


_exact = ContextVar("exact", default=True)


@contextmanager
def exact_rounding(exact: bool) -> Iterator[None]:
    """Whether evaluation rounds additions and products exactly as the runtime, or as training.

    For measuring what the difference is worth; see `quantize`.
    """
    token = _exact.set(exact)
    try:
        yield
    finally:
        _exact.reset(token)


def rounds_exactly() -> bool:
    """Whether evaluation should be exact."""
    return _exact.get()


_SMALLEST_ODD = 128
_PIECE = 2**17
"""Values that are rounded exactly at a time: a megabyte in float64."""

Value = Tensor | Quantized | Accumulated | Sum | Product | Average


def real_values(value: Value) -> Tensor:
    """What a value between layers stands for; sums and products as they are before their grid."""
    match value:
        case Quantized() | Accumulated():
            return value.dequantize()
        case Sum(a, b):
            return a.dequantize() + b.dequantize()
        case Product(a, b):
            return a.dequantize() * b.dequantize()
        case Average():
            return value.sums() * (value.scale / value.pixels)
        case _:
            return value


class _RoundToGrid(torch.autograd.Function):
    """clamp(round(x * step or x / step), low, high), rounding passed straight through.

    The gradient of `step` is LSQ's. For PAMS, `own` is the grid's step and `step` has it detached:
    inside the range the two paths of `own` cancel, so that only clipped values move the bound.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        step: Tensor,
        own: Tensor | None,
        low: float,
        high: float,
        divide: bool,
        shift: float,
    ) -> Tensor:
        exact = x / step if divide else x * step
        inside = (exact >= low) & (exact <= high) if any(ctx.needs_input_grad) else None
        rounded = (exact + shift).round_().sub_(shift) if shift else exact.round_()
        ints = rounded.clamp_(low, high)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None,
            ints if ctx.needs_input_grad[2] else None,
            step,
            own,
            inside,
        )
        ctx.divide = divide
        return ints

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        x, ints, step, own, inside = ctx.saved_tensors
        passed = gradient * inside
        to_x = to_step = to_own = None
        if ctx.needs_input_grad[0]:
            to_x = passed / step if ctx.divide else passed * step
        if ctx.needs_input_grad[1]:
            total = _sum_to(passed * x, step.shape)
            to_step = -total / step.square() if ctx.divide else total
        if ctx.needs_input_grad[2]:
            to_own = -_sum_to(passed * ints, own.shape) / own
        return to_x, to_step, to_own, None, None, None, None


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Reduce a broadcast gradient back to `shape`."""
    return x.sum() if not shape else x.sum_to_size(shape)


def round_to_grid(
    x: Tensor,
    step: Tensor,
    *,
    low: float,
    high: float,
    divide: bool = False,
    own: Tensor | None = None,
    shift: float = 0.0,
) -> Tensor:
    """Whole numbers clamp(round(x * step), low, high), or x / step with `divide`.

    Half rounds to even, after `shift` has been added in float32. `step` and `own` broadcast
    against x. See `_RoundToGrid` for gradients.
    """
    result: Tensor = _RoundToGrid.apply(x.float(), step, own, low, high, divide, shift)
    return result


def to_power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two, by ratio, with the gradient of `scale` (TQT, Jain 2020)."""
    nearest = torch.exp2(scale.detach().log2().round())
    return nearest * (scale / scale.detach())  # exact: the ratio is 1


def to_multiple(scale: Tensor, unit: Tensor, *, odd: bool) -> Tensor:
    """The nearest multiple of `unit`, at least one, with the gradient of `scale`.

    Where a step has 2**15 such parts, an `odd` multiple keeps sums away from ties: they land
    half-way between two steps only as multiples of 2**14. Of an even number of parts they would
    again and again, and not every kernel rounds those alike.
    """
    parts = (scale / unit).detach()
    nearest = 2 * (parts / 2 - 0.5).round().clamp_min(0) + 1 if odd else parts.round().clamp_min(1)
    nearest = nearest * unit.detach()
    return nearest * (scale / scale.detach())


def to_odd_fraction(ratio: Tensor) -> Tensor:
    """The nearest 2**k / odd, k >= 0, without gradient; off by 0.8 % at most.

    A whole number times such a ratio is never half-way between two whole numbers, and never
    nearer to that than 1 / (2 * odd): no rounding error and no rule for ties can matter.
    """
    exponent = (_SMALLEST_ODD * ratio.detach()).log2().ceil().clamp_min(0)
    power = torch.exp2(exponent)
    return power / (2 * ((power / ratio.detach() - 1) / 2).round() + 1)


def round_straight_through(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    result: Tensor = _RoundStraightThrough.apply(x)
    return result


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        return gradient


def quantize(
    value: Value,
    *,
    scale: Tensor,
    zero: Tensor,
    zero_level: int,
    levels: int,
    exact: bool,
    clip_only: bool = False,
    shift_reals: bool = False,
) -> Quantized:
    """Put a value on the grid (scale, zero) of stored bytes 0 .. levels - 1.

    Args:
        value: real tensor, convolution sums, an addition or a product.
        scale: (), the step.
        zero: (), the zero point as a tensor; `zero_level` is the same number on the host.
        zero_level: the zero point.
        levels: number of grid points, 2**bits.
        exact: follow the runtime's rounding of additions and products to the last bit. Costs
            float64 passes, so training rounds in float32: one element in 200,000 differs, by one.
        clip_only: PAMS gradients instead of LSQ's.
        shift_reals: add the zero point to real values before they are rounded, as runtimes do that
            fuse; float32 then rounds the last bits away.
    """
    low, high = float(-zero_level), float(levels - 1 - zero_level)
    shift = float(zero_level) if shift_reals else 0.0
    if fused.rounds_fused() and not exact and not _lies_on(value, scale):
        grid = fused.Grid(scale, low, high, clip_only)
        return Quantized(_rounded_fused(value, grid, shift), scale.detach(), zero)
    if isinstance(value, Quantized) and _lies_on(value, scale):
        return value

    def rounded(value: Value) -> Tensor:
        if exact and isinstance(value, Sum):
            return _exact_sum(value, scale, zero, low, high)
        if exact and isinstance(value, Product):
            return _exact_product(value, scale, zero, low, high)
        return _rounded(value, scale, low, high, clip_only=clip_only, shift=shift)

    if not exact:  # in training, a graph is made of it
        return Quantized(rounded(value), scale, zero)
    return Quantized(in_pieces(rounded, value), scale, zero)


def _rounded(
    value: Value, scale: Tensor, low: float, high: float, *, clip_only: bool, shift: float
) -> Tensor:
    """The integers of a value on a grid, in float32 and in passes over all of it."""
    own, used = (scale, scale.detach()) if clip_only else (None, scale)
    match value:
        case Quantized():
            x, step, divide = value.dequantize(), used, True
        case Accumulated():
            x, step, divide = value.ints, value.scale / used, False
        case Sum(a, b):
            x = a.ints * (a.scale / used) + b.ints * (b.scale / used)
            step, divide = torch.ones_like(used), False
        case Product(a, b):
            x, step, divide = a.ints * b.ints, (a.scale * b.scale) / used, False
        case Average():
            x, divide = value.sums(), False
            step = value.scale / (used * value.pixels)
        case _:
            x, step, divide = value, used, True
    shift = shift if isinstance(value, Tensor) else 0.0
    return round_to_grid(x, step, low=low, high=high, divide=divide, own=own, shift=shift)


def in_pieces(
    rounded: Callable[[Value], Tensor], value: Value, kind: torch.dtype = torch.float32
) -> Tensor:
    """`rounded(value)` as `kind`, of a large one some rows at a time.

    A cache then holds what its passes read.
    """
    operands: tuple[Tensor, ...]
    match value:
        case Sum(a, b) | Product(a, b):
            operands = (a.ints, b.ints)
        case Quantized(ints=x) | Accumulated(ints=x) | Average(ints=x):
            operands = (x,)
        case _:
            operands = (value,)
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    small = isinstance(value, Average) or len(shape) < 2 or shape.numel() <= _PIECE
    if small or not operands[0].is_cpu:
        return rounded(value).to(kind)
    like = next((x for x in operands if x.shape == shape), operands[0].expand(shape))
    whole = torch.empty_like(like, dtype=kind)
    rows = max(1, _PIECE * shape[-2] // shape.numel())
    for start in range(0, shape[-2], rows):
        part = (..., slice(start, start + rows), slice(None))
        whole[part] = rounded(_with(value, [x.expand(shape)[part] for x in operands]))
    return whole


def _with(value: Value, pieces: Sequence[Tensor]) -> Value:
    """The value of other numbers, on the same grids."""
    match value:
        case Sum() | Product():
            return type(value)(*(x._replace(ints=n) for x, n in zip(value, pieces, strict=True)))
        case Quantized() | Accumulated():
            return value._replace(ints=pieces[0])
        case _:
            return pieces[0]


def _lies_on(value: Value, scale: Tensor) -> bool:
    return isinstance(value, Quantized) and value.scale is scale


def _rounded_fused(value: Value, grid: fused.Grid, shift: float) -> Tensor:
    match value:
        case Quantized():
            return fused.round_grid(value.ints, value.scale, grid)
        case Accumulated():
            return fused.round_sums(value.ints, value.scale, grid)
        case Sum(a, b):
            return fused.round_sum(a.ints, b.ints, a.scale, b.scale, grid)
        case Product(a, b):
            return fused.round_product(a.ints, b.ints, a.scale, b.scale, grid)
        case Average():
            return fused.round_average(value.sums(), value.scale, value.pixels, grid)
        case _:
            return fused.round_reals(value, shift, grid)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A float32 fused multiply-add: the product of two float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def _exact_sum(value: Sum, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    """QLinearAdd: two fused multiply-adds on the stored bytes, b first, then a."""
    a, b = value
    ratio_a, ratio_b = a.scale / scale, b.scale / scale
    fixed = zero - _fma(ratio_a, a.zero, ratio_b * b.zero)
    stored = _fma(a.ints + a.zero, ratio_a, _fma(b.ints + b.zero, ratio_b, fixed))
    return (stored.round() - zero).clamp(low, high)


def _exact_product(value: Product, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    """QLinearMul: one multiplier, and the zero point added before the rounding."""
    a, b = value
    stored = (a.ints * b.ints) * ((a.scale * b.scale) / scale) + zero
    return (stored.round() - zero).clamp(low, high)
