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
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

_MOST_VARIANTS = 64
"""Of a kernel: a size of 1 and another layout make one each. At torch's own limit of 8, which a
MIRNet's weights exceed, it would stop compiling and take plain operations."""

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


@cache
def has_compiler(device: torch.device) -> bool:
    """Whether kernels can be compiled for it; the answer takes a second or some."""
    try:
        require_compiler(device)
    except SparkirError:
        return False
    return True


# The kernels. `low` and `high` bound the whole numbers, `own` is the grid's step, all (); then come
# values and the steps of their integers, of sums in steps of the grid. What is left of a gradient
# for `own` is summed last. --------------------------------------------------------------------


def _sums(low: Tensor, high: Tensor, own: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (x.float() * factor).round().clamp(low, high).to(x.dtype)


def _sums_back(
    gradient: Tensor,
    clip_only: bool,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    x: Tensor,
    factor: Tensor,
) -> tuple[Tensor, ...]:
    passed, to_own = _passed(gradient, x.float() * factor, low, high, clip_only)
    return (passed * factor).to(x.dtype), to_own.sum() / own


def _sum(
    low: Tensor, high: Tensor, own: Tensor, a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor
) -> Tensor:
    exact = a.float() * (step_a / own) + b.float() * (step_b / own)
    return exact.round().clamp(low, high).to(a.dtype)


def _sum_back(
    gradient: Tensor,
    clip_only: bool,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    a: Tensor,
    b: Tensor,
    step_a: Tensor,
    step_b: Tensor,
) -> tuple[Tensor, ...]:
    by_a, by_b = step_a / own, step_b / own
    exact = a.float() * by_a + b.float() * by_b
    passed, to_own = _passed(gradient, exact, low, high, clip_only)
    to_a = (passed * by_a).sum_to_size(a.shape).to(a.dtype)
    to_b = (passed * by_b).sum_to_size(b.shape).to(b.dtype)
    return to_a, to_b, to_own.sum() / own


def _product(
    low: Tensor, high: Tensor, own: Tensor, a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor
) -> Tensor:
    exact = a.float() * b.float() * ((step_a * step_b) / own)
    return exact.round().clamp(low, high).to(a.dtype)


def _product_back(
    gradient: Tensor,
    clip_only: bool,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    a: Tensor,
    b: Tensor,
    step_a: Tensor,
    step_b: Tensor,
) -> tuple[Tensor, ...]:
    factor = (step_a * step_b) / own
    passed, to_own = _passed(gradient, a.float() * b.float() * factor, low, high, clip_only)
    to_product = passed * factor
    to_a = (to_product * b.float()).sum_to_size(a.shape).to(a.dtype)
    to_b = (to_product * a.float()).sum_to_size(b.shape).to(b.dtype)
    return to_a, to_b, to_own.sum() / own


def _average(
    low: Tensor, high: Tensor, own: Tensor, x: Tensor, step: Tensor, pixels: Tensor
) -> Tensor:
    return (x * (step / (own * pixels))).round().clamp(low, high)


def _average_back(
    gradient: Tensor,
    clip_only: bool,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    x: Tensor,
    step: Tensor,
    pixels: Tensor,
) -> tuple[Tensor, ...]:
    factor = step / (own * pixels)
    passed, to_own = _passed(gradient, x * factor, low, high, clip_only)
    return passed * factor, to_own.sum() / own


def _grid(low: Tensor, high: Tensor, own: Tensor, x: Tensor, step: Tensor) -> Tensor:
    return (x.float() * step / own).round().clamp(low, high).to(x.dtype)


def _grid_back(
    gradient: Tensor,
    clip_only: bool,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    x: Tensor,
    step: Tensor,
) -> tuple[Tensor, ...]:
    passed, to_own = _passed(gradient, x.float() * step / own, low, high, clip_only)
    return (passed / own * step).to(x.dtype), to_own.sum() / own


def _reals(low: Tensor, high: Tensor, own: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    return ((x.float() / own + shift).round() - shift).clamp(low, high).to(x.dtype)


def _reals_back(
    gradient: Tensor,
    clip_only: bool,
    low: Tensor,
    high: Tensor,
    own: Tensor,
    x: Tensor,
    shift: Tensor,
) -> tuple[Tensor, ...]:
    passed, to_own = _passed(gradient, x.float() / own, low, high, clip_only)
    return (passed / own).to(x.dtype), to_own.sum() / own


def _weights(low: Tensor, high: Tensor, own: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
    return (weight / own).round().clamp(low, high).to(kind)


def _weights_back(
    gradient: Tensor, clip_only: bool, low: Tensor, high: Tensor, own: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    passed, to_own = _passed(gradient, weight / own, low, high, clip_only)
    return passed / own, to_own.flatten(1).sum(1) / own.flatten()


def _bias(
    bias: Tensor, input_step: Tensor, weight_step: Tensor, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    step = input_step * weight_step
    return (bias / step).round().to(kind), step


def _bias_back(gradient: Tensor, step: Tensor) -> Tensor:
    return gradient.float() / step


def _bytes(ints: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    return (ints.float() + zero).to(torch.uint8), ints.float().sum()


def _passed(
    gradient: Tensor, exact: Tensor, low: Tensor, high: Tensor, clip_only: bool
) -> tuple[Tensor, Tensor]:
    """The gradient where nothing is clipped; what each value adds to that of the step, times it."""
    inside = (exact >= low) & (exact <= high)
    within = 0.0 if clip_only else exact.round() - exact
    to_own = gradient.float() * torch.where(inside, within, exact.clamp(low, high))
    return torch.where(inside, gradient.float(), 0.0), to_own


_BACK: dict[Callable[..., Any], Callable[..., Any]] = {
    _sums: _sums_back,
    _sum: _sum_back,
    _product: _product_back,
    _average: _average_back,
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
        steps: tuple[Tensor, ...],
    ) -> Tensor:
        """Whole numbers low .. high, with gradients to `values` and the step."""
        bounds = _bounds(self.low, self.high, values[0].device)
        fixed = tuple(step.detach() for step in steps)
        result: Tensor = _Round.apply(kernel, self.clip_only, bounds, fixed, self.scale, *values)
        return result


def round_sums(sums: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """A layer's sums, of `step` (C, 1, 1) or (C,)."""
    factor = step / grid.scale.detach()  # a kernel would divide each channel anew at every pixel
    return grid.round(_sums, (sums,), (factor,))


def round_sum(a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor, grid: Grid) -> Tensor:
    """a * step_a + b * step_b; shapes broadcast."""
    return grid.round(_sum, (a, b), (step_a, step_b))


def round_product(a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor, grid: Grid) -> Tensor:
    """a * step_a times b * step_b; shapes broadcast."""
    return grid.round(_product, (a, b), (step_a, step_b))


def round_average(sums: Tensor, step: Tensor, pixels: int, grid: Grid) -> Tensor:
    """sums * step / pixels."""
    return grid.round(_average, (sums,), (step, _number(pixels, sums.device)))


def round_grid(ints: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Whole numbers of another grid."""
    return grid.round(_grid, (ints,), (step,))


def round_reals(x: Tensor, shift: float, grid: Grid) -> Tensor:
    """Real values, rounded after `shift` was added to what they are in steps."""
    return grid.round(_reals, (x,), (_number(shift, x.device),))


class _Round(torch.autograd.Function):
    """A kernel, and its gradients to the values and to the grid's step."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        kernel: Callable[..., Tensor],
        clip_only: bool,
        bounds: tuple[Tensor, Tensor],
        steps: tuple[Tensor, ...],
        own: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.kernel, ctx.clip_only = kernel, clip_only
        arguments = (*bounds, own, *values, *steps)
        ctx.save_for_backward(*arguments)
        rounded: Tensor = _run(kernel, *arguments)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        back = _BACK[ctx.kernel]
        *to_values, to_own = _run(back, gradient, ctx.clip_only, *ctx.saved_tensors)
        return None, None, None, None, to_own, *to_values


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
    bounds = _bounds(low, high, weight.device)
    result: Tensor = _RoundWeights.apply(weight, step, bounds, clip_only, _computed_in(weight))
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
        ctx.save_for_backward(*bounds, per_channel, weight)
        rounded: Tensor = _run(_weights, *bounds, per_channel, weight, kind)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        to_weight, to_step = _run(_weights_back, gradient, ctx.clip_only, *ctx.saved_tensors)
        return to_weight, to_step, None, None, None


def round_bias(bias: Tensor, input_step: Tensor, weight_step: Tensor) -> tuple[Tensor, Tensor]:
    """`bias` (C,) in whole steps of a layer's sums, and those steps (C,), which are constant."""
    kind = _computed_in(bias)
    ints, step = _RoundBias.apply(bias, input_step.detach(), weight_step.detach(), kind)
    return ints, step


def to_bytes(ints: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """`ints` with `zero` () added, as uint8, and their sum (); without gradient."""
    stored, total = _run(_bytes, ints, zero)
    return stored, total


class _RoundBias(torch.autograd.Function):
    """The step is read on, and passes nothing back."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        bias: Tensor,
        input_step: Tensor,
        weight_step: Tensor,
        kind: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ints, step = _run_few(_bias, bias, input_step, weight_step, kind)
        ctx.save_for_backward(step)
        ctx.mark_non_differentiable(step)
        ctx.set_materialize_grads(False)
        return ints, step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:  # noqa: ANN401
        return _run_few(_bias_back, gradient, *ctx.saved_tensors), None, None, None


def _computed_in(parameter: Tensor) -> torch.dtype:
    """The type that a layer with this parameter computes in."""
    where = parameter.device.type
    autocast = torch.is_autocast_enabled(where)
    return torch.get_autocast_dtype(where) if autocast else parameter.dtype


def _run(kernel: Callable[..., Any], *arguments: Tensor | torch.dtype | bool) -> Any:  # noqa: ANN401
    """Whether a tensor needs gradients would make the compiler see another kernel."""
    plain = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
    return _compiled(kernel)(*plain)


def _run_few(kernel: Callable[..., Any], first: Tensor, *others: Tensor | torch.dtype) -> Any:  # noqa: ANN401
    """Of a number for each channel, which a processor computes before a compiled kernel is called.

    A GPU is not waited for, and there each operation counts.
    """
    return _run(kernel, first, *others) if first.is_cuda else kernel(first, *others)


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    known = signature(torch.compile).parameters
    limit: dict[str, Any] = (
        {"recompile_limit": _MOST_VARIANTS} if "recompile_limit" in known else {}
    )
    return torch.compile(kernel, dynamic=True, **limit)


@cache
def _bounds(low: float, high: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return _number(low, device), _number(high, device)


@cache
def _number(value: float, device: torch.device) -> Tensor:
    """() on the device; a number in the kernel's code would compile it anew for each grid."""
    return torch.tensor(float(value), device=device)  # a whole number would be another kernel's
