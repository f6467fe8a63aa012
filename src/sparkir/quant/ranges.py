"""Where grids start: fitting steps and zero points to observed values.

This alone, without training, is post-training quantization (PTQ).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparkir.errors import SparkirError
from sparkir.quant.spec import Calibration

NOT_FINITE = (
    "the network computes NaN or infinite values on the calibration images; check its weights and "
    "its value range"
)
SAMPLES = 65_521
"""A prime: steps between samples then share no factor with a row, or one column would be all."""
_MOST = 16 * SAMPLES
"""Values kept of one tensor while images pass: 4 MB."""
_ENOUGH = 4096
_SMALLEST_SHARE = 0.01
_LARGEST_TRIAL = 2**22
"""Values rounded at once in looking for the steps of weights."""
_SMALLEST_STEP = 2.0**-8
PERCENTILE = 0.999


class RangeObserver:
    """Keeps the extremes and an even sample of every tensor that passes.

    All are thinned alike, so that a value counts as much in a small batch as in a large one.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.low, self.high = float("inf"), float("-inf")
        self._kept: list[Tensor] = []
        self._thinned = 0
        """How many values become SAMPLES."""

    @torch.no_grad()
    def record(self, x: Tensor) -> None:
        """Note `x`, any shape.

        Raises:
            SparkirError: `x` holds NaN or infinite values.
        """
        flat = x.detach().float().flatten()
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SparkirError(NOT_FINITE)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._thinned = self._thinned or max(flat.numel(), SAMPLES)
        self._kept.append(_evenly(flat, flat.numel() * SAMPLES // self._thinned))
        if sum(part.numel() for part in self._kept) > _MOST:
            self._kept = [part[::2].clone() for part in self._kept]
            self._thinned *= 2

    def sample(self) -> Tensor:
        """(n,) at most SAMPLES values, spread evenly over everything recorded."""
        return _evenly(torch.cat(self._kept), SAMPLES)


def _evenly(flat: Tensor, count: int) -> Tensor:
    """A copy of at most `count` values of `flat` (n,), one at least."""
    if flat.numel() <= count:
        return flat.clone()
    count = max(1, count)
    return flat[torch.arange(count, device=flat.device) * flat.numel() // count]


def fit_grid(
    seen: RangeObserver,
    *,
    bits: int,
    method: Calibration,
    symmetric: bool,
    non_negative: bool,
    unsigned: bool = True,
    power_of_two: bool = False,
) -> tuple[float, int]:
    """(step, zero point) of a grid with 2**bits bytes for the values seen.

    Zero is always a grid point, because convolutions pad with it. `non_negative` pins it to
    byte 0; `symmetric` to the middle, unless nothing negative was seen and bytes may be
    `unsigned`. With `power_of_two`, the step is one.
    """
    top = 2**bits - 1
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    fixed: int | None = 2 ** (bits - 1) if symmetric else None
    if unsigned and (non_negative or low == 0.0):
        low, fixed = 0.0, 0
    if high - low < 1e-12:  # a dead tensor: any step serves
        return 1.0 / (top + power_of_two), fixed or 0
    step, zero = _fit_range(seen, method=method, low=low, high=high, top=top, fixed=fixed)
    if not power_of_two:
        return step, zero
    return _nearest_power_of_two(seen.sample(), step, zero, top=top, fixed=fixed)


def _fit_range(
    seen: RangeObserver,
    *,
    method: Calibration,
    low: float,
    high: float,
    top: int,
    fixed: int | None,
) -> tuple[float, int]:
    sample = seen.sample()
    if method == "percentile":
        # Values that are exactly zero say nothing of the range (half of them, after a ReLU).
        low = min(0.0, float(sample.quantile(1 - PERCENTILE))) if low < 0 else 0.0
        high = max(0.0, float(sample.quantile(PERCENTILE)))
        if high - low < 1e-12:
            low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if method == "mse":
        return _least_squares_grid(sample, low=low, high=high, top=top, fixed=fixed)
    return _grid_of_range(low, high, top=top, fixed=fixed)


def _nearest_power_of_two(
    sample: Tensor, step: float, zero: int, *, top: int, fixed: int | None
) -> tuple[float, int]:
    """The better of the two powers of two around `step`, and the zero point that suits it.

    Zero points are even: a value half-way between two levels then goes to the same one whether it
    is rounded before the zero point is added, or after.
    """
    candidates = []
    for exponent in (math.floor(math.log2(step)), math.ceil(math.log2(step))):
        power = 2.0**exponent
        # The same low end, the same high end, or the same centre of the range.
        low_end, high_end = zero * step / power, top - (top - zero) * step / power
        ends = (low_end, high_end, (low_end + high_end) / 2)
        even = [min(top - 1, max(0, 2 * round(end / 2))) for end in ends]
        zeros = even if fixed is None else [fixed]
        candidates += [(power, z) for z in zeros]
    return min(candidates, key=lambda grid: _squared_error(sample, grid[0], grid[1], top))


def _grid_of_range(low: float, high: float, *, top: int, fixed: int | None) -> tuple[float, int]:
    """The grid that just covers [low, high]."""
    if fixed is None:
        step = (high - low) / top
        return step, min(top, max(0, round(-low / step)))
    return max(high / (top - fixed), -low / fixed if fixed else 0.0), fixed


def _least_squares_grid(
    sample: Tensor, *, low: float, high: float, top: int, fixed: int | None
) -> tuple[float, int]:
    """Search both ends of the range independently: long tails are rarely on both sides.

    A coarse search over a thinned sample, then a fine one around its winner.
    """
    best = (float("inf"), *_grid_of_range(low, high, top=top, fixed=fixed))
    centre, reach = (0.55, 0.55), 0.45
    for thin, steps in ((8, 10), (2, 7)):
        values = sample[:: max(1, min(thin, sample.numel() // _ENOUGH))]
        shares = [
            torch.linspace(c - reach, c + reach, steps).clamp_min(_SMALLEST_SHARE).tolist()
            for c in centre
        ]
        if low == 0.0 or fixed is not None:
            shares[0] = [1.0]
        found = best
        for low_share in shares[0]:
            for high_share in shares[1]:
                ends = (low * low_share, high * high_share)
                if fixed:
                    ends = (low * high_share, high * high_share)
                step, zero = _grid_of_range(*ends, top=top, fixed=fixed)
                error = _squared_error(values, step, zero, top)
                if error < found[0] or found is best:
                    found = (error, step, zero)
                    centre = (low_share, high_share)
        best, reach = found, 0.1
    # A rare extreme that the thinned sample lacks can make clipping look cheap.
    grids = (best[1:], _grid_of_range(low, high, top=top, fixed=fixed))
    return min(grids, key=lambda grid: _squared_error(sample, grid[0], grid[1], top))


def _squared_error(x: Tensor, step: float, zero: int, top: int) -> float:
    ints = (x / step).round_().clamp_(-zero, top - zero)
    return float((ints * step - x).square_().mean())


@torch.no_grad()
def fit_weight_scale(weight: Tensor, *, bits: int, method: Calibration) -> Tensor:
    """(C_out,), the step of each output channel of `weight` (C_out, ...)."""
    rows = weight.detach().flatten(1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # The negative side has one more level, so each side asks for its own step.
    widest = torch.maximum(rows.amax(1) / high, rows.amin(1) / low)
    # A channel of zeros has no step of its own, and its bias counted in tiny ones leaves int32.
    largest = widest.max() if widest.any() else widest.new_tensor(1.0 / high)
    widest = widest.maximum(largest * _SMALLEST_STEP)
    if method == "percentile":
        return torch.maximum(rows.abs().quantile(PERCENTILE, dim=1) / high, widest * 0.1)
    if method == "minmax":
        return widest
    shares = torch.linspace(0.3, 1.0, 71, device=weight.device)
    at_once = max(1, _LARGEST_TRIAL // (len(shares) * rows.shape[1]))
    found = []
    for some, widest_of_some in zip(rows.split(at_once), widest.split(at_once), strict=True):
        steps = widest_of_some[:, None] * shares  # (C, candidates)
        ints = (some[:, None] / steps[..., None]).round_().clamp_(low, high)
        error = (ints * steps[..., None] - some[:, None]).square_().sum(-1)
        found.append(steps.gather(1, error.argmin(1, keepdim=True)).squeeze(1))
    return torch.cat(found)
