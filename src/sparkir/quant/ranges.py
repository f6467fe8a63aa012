"""Where grids start: fitting steps and zero points to observed values.

This alone, without training, is post-training quantization (PTQ).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Method = Literal["mse", "percentile", "minmax"]
SAMPLES = 65_536
PERCENTILE = 0.999


class RangeObserver:
    """Keeps the extremes and an even sample of every tensor that passes."""

    def __init__(self) -> None:
        """Start empty."""
        self.low, self.high = float("inf"), float("-inf")
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def record(self, x: Tensor) -> None:
        """Note `x`, any shape."""
        flat = x.detach().float().flatten()
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        stride = max(1, flat.numel() // SAMPLES)
        self._kept.append(flat[::stride].clone())

    def sample(self) -> Tensor:
        """(n,) at most SAMPLES values, spread evenly over everything recorded."""
        kept = torch.cat(self._kept)
        return kept[:: max(1, kept.numel() // SAMPLES)]


def fit_grid(
    seen: RangeObserver,
    *,
    bits: int,
    method: Method,
    symmetric: bool,
    non_negative: bool,
) -> tuple[float, int]:
    """(step, zero point) of a grid with 2**bits bytes for the values seen.

    Zero is always a grid point, because convolutions pad with it. `non_negative` pins it to
    byte 0; `symmetric` to the middle, unless nothing negative was seen.
    """
    top = 2**bits - 1
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if non_negative or low == 0.0:
        low, fixed = 0.0, 0
    else:
        fixed = 2 ** (bits - 1) if symmetric else None
    if high - low < 1e-12:  # a dead tensor: any step serves
        return 1.0 / top, fixed or 0
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
        values = sample[::thin]
        shares = [torch.linspace(c - reach, c + reach, steps).tolist() for c in centre]
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
    return best[1], best[2]


def _squared_error(x: Tensor, step: float, zero: int, top: int) -> float:
    ints = (x / step).round_().clamp_(-zero, top - zero)
    return float((ints * step - x).square_().mean())


@torch.no_grad()
def fit_weight_scale(weight: Tensor, *, bits: int, method: Method) -> Tensor:
    """(C_out,), the step of each output channel of `weight` (C_out, ...)."""
    rows = weight.detach().flatten(1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # The negative side has one more level, so each side asks for its own step.
    widest = torch.maximum(rows.amax(1) / high, rows.amin(1) / low).clamp_min(1e-8)
    if method == "percentile":
        return torch.maximum(rows.abs().quantile(PERCENTILE, dim=1) / high, widest * 0.1)
    if method == "minmax":
        return widest
    shares = torch.linspace(0.3, 1.0, 71)
    steps = widest[:, None] * shares  # (C, candidates)
    ints = (rows[:, None] / steps[..., None]).round_().clamp_(low, high)
    error = (ints * steps[..., None] - rows[:, None]).square_().sum(-1)
    return steps.gather(1, error.argmin(1, keepdim=True)).squeeze(1)
