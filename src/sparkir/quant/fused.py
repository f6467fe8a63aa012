"""Rounding to a grid in one pass over memory forward and one backward, compiled by `torch.compile`.

The same arithmetic as `arithmetic` in plain operations, of which each reads and writes the whole
tensor again. On a CPU values are the same bits. So are gradients, but for the order of their sums
and for the steps': whoever reads a grid multiplies its integers by its step and uses them in no
other way, so that the derivative of the real values by the step, round(v) - v inside the range and
the bound outside (LSQ, Esser 2020, eq. 3), is summed where the integers are made, in the same pass.
Everybody else takes steps to be constant.

Integers keep the type of what they were made from: bfloat16 holds whole numbers up to 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

_fused = ContextVar("fused", default=False)


@contextmanager
def fused_rounding(on: bool) -> Iterator[None]:
    """Whether grids are rounded to in compiled passes, where evaluation need not be exact."""
    token = _fused.set(on)
    try:
        yield
    finally:
        _fused.reset(token)


def rounds_fused() -> bool:
    """Whether they are now."""
    return _fused.get()


def require_compiler(device: torch.device) -> None:
    """Compile one kernel now.

    Raises:
        SparkirError: it cannot be done here.
    """
    x = torch.zeros(2, 3, 4, 4, device=device)
    try:
        round_reals(x, 0.0, Grid(torch.tensor(1.0, device=device), 0.0, 1.0, clip_only=False))
    except Exception as error:  # compilers fail in many ways, and share no public class
        raise SparkirError(
            "train.compile = true needs what torch.compile needs (a C++ compiler such as g++; on a "
            f"GPU, Triton), and it failed: {one_line(error)}; install it, or set "
            "train.compile = false"
        ) from error


# The kernels. `low` and `high` bound the whole numbers, (); all else are values and factors. -----


def _sums(low: Tensor, high: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (x.float() * factor).round().clamp(low, high).to(x.dtype)


def _sums_back(
    gradient: Tensor, low: Tensor, high: Tensor, x: Tensor, factor: Tensor
) -> tuple[Tensor, ...]:
    passed, *totals = _passed(gradient, x.float() * factor, low, high)
    return (passed * factor).to(x.dtype), *totals


def _sum(low: Tensor, high: Tensor, a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor) -> Tensor:
    return (a.float() * by_a + b.float() * by_b).round().clamp(low, high).to(a.dtype)


def _sum_back(
    gradient: Tensor, low: Tensor, high: Tensor, a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor
) -> tuple[Tensor, ...]:
    passed, *totals = _passed(gradient, a.float() * by_a + b.float() * by_b, low, high)
    to_a = (passed * by_a).sum_to_size(a.shape).to(a.dtype)
    to_b = (passed * by_b).sum_to_size(b.shape).to(b.dtype)
    return to_a, to_b, *totals


def _product(low: Tensor, high: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    return (a.float() * b.float() * factor).round().clamp(low, high).to(a.dtype)


def _product_back(
    gradient: Tensor, low: Tensor, high: Tensor, a: Tensor, b: Tensor, factor: Tensor
) -> tuple[Tensor, ...]:
    passed, *totals = _passed(gradient, a.float() * b.float() * factor, low, high)
    to_product = passed * factor
    to_a = (to_product * b.float()).sum_to_size(a.shape).to(a.dtype)
    to_b = (to_product * a.float()).sum_to_size(b.shape).to(b.dtype)
    return to_a, to_b, *totals


def _grid(low: Tensor, high: Tensor, x: Tensor, gain: Tensor, own: Tensor) -> Tensor:
    return (x.float() * gain / own).round().clamp(low, high).to(x.dtype)


def _grid_back(
    gradient: Tensor, low: Tensor, high: Tensor, x: Tensor, gain: Tensor, own: Tensor
) -> tuple[Tensor, ...]:
    passed, *totals = _passed(gradient, x.float() * gain / own, low, high)
    return (passed / own * gain).to(x.dtype), *totals


def _reals(low: Tensor, high: Tensor, x: Tensor, own: Tensor, shift: Tensor) -> Tensor:
    return ((x.float() / own + shift).round() - shift).clamp(low, high).to(x.dtype)


def _reals_back(
    gradient: Tensor, low: Tensor, high: Tensor, x: Tensor, own: Tensor, shift: Tensor
) -> tuple[Tensor, ...]:
    passed, *totals = _passed(gradient, x.float() / own, low, high)
    return (passed / own).to(x.dtype), *totals


def _weights(low: Tensor, high: Tensor, weight: Tensor, step: Tensor, kind: torch.dtype) -> Tensor:
    return (weight / step).round().clamp(low, high).to(kind)


def _weights_back(
    gradient: Tensor, low: Tensor, high: Tensor, weight: Tensor, step: Tensor
) -> tuple[Tensor, ...]:
    passed, within, beyond = _parts(gradient, weight / step, low, high)
    return passed / step, within.flatten(1).sum(1), beyond.flatten(1).sum(1)


def _parts(
    gradient: Tensor, exact: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient where nothing is clipped; what each value there, and each clipped one, adds to
    the derivative by the step, times the step.
    """
    inside = (exact >= low) & (exact <= high)
    passed = torch.where(inside, gradient.float(), 0.0)
    clipped = torch.where(inside, 0.0, gradient.float())
    return passed, passed * (exact.round() - exact), clipped * exact.clamp(low, high)


def _passed(
    gradient: Tensor, exact: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    passed, within, beyond = _parts(gradient, exact, low, high)
    return passed, within.sum(), beyond.sum()


_BACK: dict[Callable[..., Any], Callable[..., Any]] = {
    _sums: _sums_back,
    _sum: _sum_back,
    _product: _product_back,
    _grid: _grid_back,
    _reals: _reals_back,
}


class Grid(NamedTuple):
    """Where values are rounded to."""

    scale: Tensor
    """(), the step, with its gradient."""
    low: float
    high: float
    clip_only: bool
    """PAMS gradients instead of LSQ's."""

    def round(
        self,
        kernel: Callable[..., Tensor],
        values: tuple[Tensor, ...],
        factors: tuple[Tensor, ...],
    ) -> Tensor:
        """Whole numbers low .. high, with gradients to `values` and the step."""
        bounds = _bounds(self.low, self.high, values[0].device)
        fixed = tuple(factor.detach() for factor in factors)
        result: Tensor = _Round.apply(kernel, self.clip_only, bounds, fixed, self.scale, *values)
        return result


def round_sums(sums: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """A layer's sums, of `step` (C, 1, 1) or (C,)."""
    return grid.round(_sums, (sums,), (step / grid.scale,))


def round_sum(a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor, grid: Grid) -> Tensor:
    """a * step_a + b * step_b; shapes broadcast."""
    return grid.round(_sum, (a, b), (step_a / grid.scale, step_b / grid.scale))


def round_product(a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor, grid: Grid) -> Tensor:
    """a * step_a times b * step_b; shapes broadcast."""
    return grid.round(_product, (a, b), ((step_a * step_b) / grid.scale,))


def round_average(sums: Tensor, step: Tensor, pixels: int, grid: Grid) -> Tensor:
    """sums * step / pixels."""
    return grid.round(_sums, (sums,), (step / (grid.scale * pixels),))


def round_grid(ints: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Whole numbers of another grid."""
    return grid.round(_grid, (ints,), (step, grid.scale))


def round_reals(x: Tensor, shift: float, grid: Grid) -> Tensor:
    """Real values, rounded after `shift` was added to what they are in steps."""
    return grid.round(_reals, (x,), (grid.scale, _number(shift, x.device)))


class _Round(torch.autograd.Function):
    """A kernel, and its gradients to the values and to the grid's step."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        kernel: Callable[..., Tensor],
        clip_only: bool,
        bounds: tuple[Tensor, Tensor],
        factors: tuple[Tensor, ...],
        step: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.kernel, ctx.clip_only = kernel, clip_only
        arguments = (*bounds, *values, *factors)
        ctx.save_for_backward(*arguments, step)
        rounded: Tensor = _run(kernel, *arguments)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        *arguments, step = ctx.saved_tensors
        *to_values, within, beyond = _run(_BACK[ctx.kernel], gradient, *arguments)
        total = beyond if ctx.clip_only else within + beyond
        return None, None, None, None, total / step, *to_values


def round_weights(
    weight: Tensor, step: Tensor, *, low: float, high: float, clip_only: bool
) -> Tensor:
    """Whole numbers low .. high of `weight` (C, ...), in the type that a layer computes in.

    Args:
        weight: float32.
        step: (C,).
        low: the most negative integer.
        high: the most positive one.
        clip_only: PAMS gradients instead of LSQ's.
    """
    autocast = torch.is_autocast_enabled(weight.device.type)
    kind = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    bounds = _bounds(low, high, weight.device)
    result: Tensor = _RoundWeights.apply(weight, step, bounds, clip_only, kind)
    return result


class _RoundWeights(torch.autograd.Function):
    """As `_Round`, with a step for each channel."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        weight: Tensor,
        step: Tensor,
        bounds: tuple[Tensor, Tensor],
        clip_only: bool,
        kind: torch.dtype,
    ) -> Tensor:
        ctx.clip_only = clip_only
        per_channel = step.view(-1, *[1] * (weight.dim() - 1))
        ctx.save_for_backward(*bounds, weight, per_channel, step)
        rounded: Tensor = _run(_weights, *bounds, weight, per_channel, kind)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        *arguments, step = ctx.saved_tensors
        to_weight, within, beyond = _run(_weights_back, gradient, *arguments)
        total = beyond if ctx.clip_only else within + beyond
        return to_weight, total / step, None, None, None


def _run(kernel: Callable[..., Any], *arguments: Tensor | torch.dtype) -> Any:  # noqa: ANN401
    """Whether a tensor needs gradients would make the compiler see another kernel."""
    plain = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
    return _compiled(kernel)(*plain)


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)


@cache
def _bounds(low: float, high: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return _number(low, device), _number(high, device)


@cache
def _number(value: float, device: torch.device) -> Tensor:
    """() on the device; a number in the kernel's code would compile it anew for each grid."""
    return torch.tensor(float(value), device=device)  # a whole number would be another kernel's
