"""The learned grids: one quantizer for a tensor that flows, one for a layer's weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparkir.quant.arithmetic import (
    Average,
    Product,
    Quantized,
    Sum,
    Value,
    quantize,
    round_to_grid,
    rounds_exactly,
    to_odd_fraction,
    to_power_of_two,
)
from sparkir.quant.fused import round_weights, rounds_fused
from sparkir.quant.ranges import RangeObserver, fit_grid, fit_weight_scale
from sparkir.quant.spec import Calibration, Learned


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """X itself, with its gradient multiplied by `factor` (LSQ, section 2.2)."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result


class _ScaleGradient(torch.autograd.Function):
    """One operation where x.detach() + (x - x.detach()) * factor is six: grids are many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # noqa: ANN401
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        return gradient * ctx.factor, None


class Given(NamedTuple):
    """A step that was taken together with those of other grids; see `together`."""

    step: Tensor
    """With its gradient."""
    factors: list[float]
    """What each grid's gradient will be multiplied by."""
    place: int
    """This grid's place there."""

    def scale_gradient(self, step: Tensor, factor: float) -> Tensor:
        """As the function; `step` is made of this one. Parts of a concatenation differ in size."""
        if self.factors[self.place] in (1.0, factor):
            self.factors[self.place] = factor
            return step
        return scale_gradient(step, factor / self.factors[self.place])


class Stepped(nn.Module):
    """A quantizer whose step is learned as a logarithm, alone or together with others."""

    log_scale: nn.Parameter
    given: Given | None = None
    """The step, while a forward pass lasts that takes all of them together."""

    def _step(self) -> Tensor:
        return self.log_scale.exp() if self.given is None else self.given.step

    def _scale_gradient(self, step: Tensor, factor: float) -> Tensor:
        if self.given is None:
            return scale_gradient(step, factor)
        return self.given.scale_gradient(step, factor)


class ActivationQuantizer(Stepped):
    """Puts a tensor on a grid of 2**bits stored bytes; the step is learned.

    The parameter is the logarithm of the step: optimizers then move it by a share of itself,
    whether the network works in [0, 1] or [0, 255]. The zero point is fixed by calibration.

    While `observer` is set, values pass through in floating point and are recorded.
    """

    zero_point: Tensor
    observer: RangeObserver | None

    def __init__(
        self,
        *,
        bits: int,
        symmetric: bool = False,
        learned: Learned = "lsq",
        non_negative: bool = False,
        image_step: float | None = None,
        int8_only: bool = False,
    ) -> None:
        """Make an uncalibrated quantizer.

        Args:
            bits: 2 to 8.
            symmetric: whether zero sits in the middle, or both ends fit the data.
            learned: how the step is trained.
            non_negative: the tensor follows a ReLU that this grid absorbs, so zero is byte 0.
            image_step: for the image itself: a fixed grid of this step starting at black.
            int8_only: whether zero stays in the middle even if nothing is negative.
        """
        super().__init__()
        self.bits, self.symmetric, self.non_negative = bits, symmetric, non_negative
        self.int8_only = self.prefers_int8 = int8_only
        self.power_of_two = False
        """Whether the step must be one; see `steps`."""
        self.shift_reals = False
        """Whether real values get the zero point added before they are rounded; see `quantize`."""
        self.rounds_again: tuple[ActivationQuantizer] | None = None
        """The grid of the values that this one rounds a second time, in a tuple so that it does
        not become a submodule; the ratio of the steps must then be an odd fraction."""
        self.learned: Learned = "none" if image_step is not None else learned
        self.log_scale = nn.Parameter(
            torch.tensor(math.nan if image_step is None else math.log(image_step)),
            requires_grad=self.learned != "none",
        )
        self.image_step = image_step
        self.ranks = 1
        """How many processes share a batch; LSQ's gradient scale counts the values of them all."""
        self.register_buffer("zero_point", torch.tensor(0.0))
        self._zero_level = 0
        self.register_load_state_dict_post_hook(_refresh_zero_level)
        self.observer = None

    @property
    def levels(self) -> int:
        """Number of grid points."""
        return int(2**self.bits)

    @property
    def zero_level(self) -> int:
        """The zero point on the host."""
        return self._zero_level

    @property
    def signed(self) -> bool:
        """Whether the grid is stored as int8 with zero point 0."""
        return self.prefers_int8 and self._zero_level == self.levels // 2

    def scale(self) -> Tensor:
        """(), the step, without LSQ's gradient scale."""
        if self.image_step is not None:  # exactly float32(1/255), not exp(log(1/255))
            return torch.full_like(self.log_scale, self.image_step)
        scale = self._step()
        if self.power_of_two:
            return to_power_of_two(scale)
        if self.rounds_again is not None:
            ratio = (self.rounds_again[0].scale() / scale).detach()
            return scale * (ratio / to_odd_fraction(ratio))
        return scale

    def forward(self, value: Value) -> Quantized:
        """Round `value` to the grid; under an observer, record it and pass it on in float."""
        if self.observer is not None:
            self.observer.record(cast("Tensor", value))
            return cast("Quantized", value)
        scale = self.scale()
        if self.training and self.learned == "lsq":
            count = self.ranks * _numel(value)
            scale = self._scale_gradient(scale, 1.0 / math.sqrt(count * (self.levels - 1)))
        if isinstance(value, Quantized) and self._shares_grid(value):
            return value
        return quantize(
            value,
            scale=scale,
            zero=self.zero_point,
            zero_level=self._zero_level,
            levels=self.levels,
            exact=not self.training and rounds_exactly(),
            clip_only=self.learned == "pams",
            shift_reals=self.shift_reals,
        )

    def _shares_grid(self, value: Quantized) -> bool:
        """Whether `value` was made by this very quantizer, upstream of a shuffle or a pooling."""
        return value.zero is self.zero_point

    def calibrate(self, method: Calibration) -> None:
        """Fit step and zero point to what the observer saw, and stop observing."""
        assert self.observer is not None
        seen, self.observer = self.observer, None
        if self.image_step is not None:
            return
        scale, zero = fit_grid(
            seen,
            bits=self.bits,
            method=method,
            symmetric=self.symmetric,
            non_negative=self.non_negative,
            power_of_two=self.power_of_two,
            unsigned=not self.int8_only,
        )
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))
            self.zero_point.fill_(float(zero))
        self._zero_level = zero

    def extra_repr(self) -> str:
        """What print shows."""
        return f"bits={self.bits}, zero={self._zero_level}, learned={self.learned}"


def _numel(value: Value) -> int:
    """How many values there are, once the operation is done."""
    if isinstance(value, Sum | Product):
        return math.prod(torch.broadcast_shapes(value.a.ints.shape, value.b.ints.shape))
    if isinstance(value, Average):
        return value.ints.shape[0] * value.ints.shape[1]
    return (value if isinstance(value, Tensor) else value.ints).numel()


def _refresh_zero_level(module: nn.Module, _: object) -> None:
    module._zero_level = int(cast("ActivationQuantizer", module).zero_point)  # type: ignore[assignment]


class WeightQuantizer(Stepped):
    """Per-output-channel symmetric grid -2**(bits-1) .. 2**(bits-1) - 1 with learned steps."""

    def __init__(self, channels: int, *, bits: int, learned: Learned = "lsq") -> None:
        """Make an uncalibrated quantizer for `channels` output channels."""
        super().__init__()
        self.bits, self.learned = bits, learned
        self.log_scale = nn.Parameter(torch.zeros(channels), requires_grad=learned != "none")

    @property
    def low(self) -> int:
        """The most negative integer."""
        return -int(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The most positive integer."""
        return int(2 ** (self.bits - 1)) - 1

    def scale(self) -> Tensor:
        """(C_out,), the steps, without what `steps` asks for."""
        return self._step()

    def forward(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Integers of `weight` (C_out, ...) in float32, and their steps (C_out,).

        The steps are the quantizer's own unless given.
        """
        if scale is None:
            scale = self.scale()
        if self.training and self.learned == "lsq":
            per_channel = weight[0].numel() * self.high
            scale = self._scale_gradient(scale, 1.0 / math.sqrt(per_channel))
        pams = self.learned == "pams"
        if rounds_fused():
            ints = round_weights(weight, scale, low=self.low, high=self.high, clip_only=pams)
            return ints, scale.detach()
        step = scale.view(-1, *[1] * (weight.dim() - 1))
        ints = round_to_grid(
            weight,
            step.detach() if pams else step,
            low=self.low,
            high=self.high,
            divide=True,
            own=step if pams else None,
        )
        return ints, scale

    @torch.no_grad()
    def calibrate(self, weight: Tensor, method: Calibration) -> None:
        """Fit the steps to `weight` (C_out, ...)."""
        self.log_scale.copy_(fit_weight_scale(weight, bits=self.bits, method=method).log())


class ConstantQuantizer(nn.Module):
    """The grid of constant weights, which lie on it already."""

    step: Tensor

    def __init__(self, step: Tensor, *, bits: int) -> None:
        """`step` (C_out,) is that of the weights."""
        super().__init__()
        self.bits = bits
        self.register_buffer("step", step, persistent=False)

    def scale(self) -> Tensor:
        """(C_out,), the steps, without what `steps` asks for."""
        return self.step

    def forward(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Integers of `weight` (C_out, ...) in float32, and their steps (C_out,)."""
        step = scale.detach().view(-1, *[1] * (weight.dim() - 1))
        top = 2 ** (self.bits - 1) - 1
        return (weight / step).round_().clamp_(-top, top), scale

    def calibrate(self, weight: Tensor, method: str) -> None:
        """Nothing is left to fit."""


def activation_quantizers(student: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every activation quantizer of a prepared network, by name."""
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


class _Unseen(RangeObserver):
    """Keeps nothing of what passes."""

    def record(self, x: Tensor) -> None:
        """Forget `x`."""


def leave_in_float(student: nn.Module, *, on: bool) -> None:
    """Whether values pass the grids of a prepared network as they are, weights too.

    It then computes what it did before it was prepared, and trains as that does.
    """
    for quantizer in activation_quantizers(student).values():
        quantizer.observer = _Unseen() if on else None
