"""Controls that are matched to a SPARK run: as much weight everywhere, at random, or no teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparkir.errors import SparkirError
from sparkir.recipe import Distill, Recipe, changed
from sparkir.spark.weighting import to_pixels

_MAPS, _PX_PER_CELL, _ROUNDS = 128, 6, 200
_TOLERANCE = 1e-3
_FAR = 100.0  # W would be 0 or 1 almost everywhere


@dataclass(frozen=True, kw_only=True)
class WeightRecord:
    """What a method did with its weights over a training: W on the pixels of the output."""

    mean: float
    deviation: float
    """Within a batch, as root mean square over the steps."""


def record_of(events: Iterable[Mapping[str, Any]]) -> WeightRecord | None:
    """The record in a training's events; None where nothing was weighted.

    A step that was logged twice, because a killed run repeated it, counts once.
    """
    steps = {e["step"]: e for e in events if e["kind"] == "step" and "mean_weight" in e}
    if not steps:
        return None
    means = [event["mean_weight"] for event in steps.values()]
    squares = [event["weight_deviation"] ** 2 for event in steps.values()]
    return WeightRecord(
        mean=sum(means) / len(means), deviation=(sum(squares) / len(squares)) ** 0.5
    )


def like_constant(spark: Recipe, record: WeightRecord) -> Recipe:
    """SPARK's recipe with its mean W everywhere: is it only the strength?"""
    return changed(spark, weighting={"name": "constant", "options": {"value": record.mean}})


def to_truth(recipe: Recipe) -> Recipe:
    """The recipe with its distance taken to the truth: as much loss, and no teacher in it."""
    own = recipe.distill or Distill()
    loss = {"norm": own.norm, "strength": own.strength or 1.0, "target": "truth"}
    return changed(recipe, distill=loss)


def like_truth(spark: Recipe, record: WeightRecord) -> Recipe:
    """SPARK's distance, as strong on average, to the truth: is it the teacher at all?"""
    if spark.distill is not None and spark.distill.target == "both":  # W and its rest make 1
        return to_truth(changed(spark, weighting={}))
    return to_truth(like_constant(spark, record))


def like_random(spark: Recipe, record: WeightRecord) -> Recipe:
    """SPARK's recipe with random W of the same mean and deviation: is it only the noise?"""
    grid = int(spark.weighting.options.get("grid", 8))
    options = matched_random(record, grid=grid)
    return changed(spark, weighting={"name": "random", "options": options})


def matched_random(record: WeightRecord, *, grid: int) -> dict[str, int | float]:
    """The options with which the source `random` has the record's mean and deviation.

    They are not the record's own: clamping to [0, 1] moves the mean, and enlarging the grid
    to pixels averages neighbours. Both are undone by trial, on one draw of many maps. A cell is
    known by its options, so that they are the same on any machine, by any number of threads:
    sums are of float64, and the last digits are left out.

    Raises:
        SparkirError: no W of that source can be like it, as when its mean is above 1.
    """
    noise = torch.randn((_MAPS, 1, grid, grid), generator=torch.Generator().manual_seed(0))
    noise = noise.double()
    noise = (noise - noise.mean()) / noise.std()
    mean, sigma = record.mean, record.deviation
    for _ in range(_ROUNDS):
        found, scatter = _drawn(noise, mean, sigma)
        off = max(abs(record.mean - found), abs(record.deviation - scatter))
        if off < _TOLERANCE * max(record.deviation, _TOLERANCE):
            return {"mean": round(mean, 7), "sigma": round(sigma, 7), "grid": grid}
        mean += record.mean - found
        sigma *= record.deviation / max(scatter, 1e-12)
        if not (abs(mean) < _FAR and sigma < _FAR):
            break
    raise SparkirError(
        f"no random W in [0, 1] has the mean {record.mean:.4f} and the deviation "
        f"{record.deviation:.4f} of the run that it should be matched to; leave random out"
    )


def _drawn(noise: Tensor, mean: float, sigma: float) -> tuple[float, float]:
    """Mean and deviation of the W that the source `random` makes of this noise."""
    side = noise.shape[-1] * _PX_PER_CELL
    weights = to_pixels((mean + sigma * noise).clamp(0, 1), (side, side))
    return float(weights.mean()), float(weights.std())
