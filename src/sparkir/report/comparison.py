"""A comparison's figures: means, and paired differences to a baseline with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore
from sparkir.evaluate.statistics import Interval, paired_bootstrap

Metric = Literal["psnr_db", "ssim", "lpips"]
Scores = Mapping[int, Sequence[ImageScore]]
"""Seed -> the scores of every image, in the same order."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method on one test set, as measured."""

    name: str
    label: str
    scores: Scores
    """Of the network as it is shipped: the integer one, where there is one."""
    as_trained: Scores = field(default_factory=dict)
    """Of the training arithmetic, where it is another: a check."""
    step_ms: Mapping[int, float] = field(default_factory=dict)
    """Seed -> cost of a training step."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a table."""

    name: str
    label: str
    seeds: int
    """How many were finished; 0 for a method that failed on all."""
    images: int
    psnr_db: float | None
    ssim: float | None
    lpips: float | None
    differences: dict[Metric, Interval | None]
    """This method minus the baseline; None for the baseline itself, or without common seeds."""
    psnr_db_as_trained: float | None
    ssim_as_trained: float | None
    step_ms: float | None
    cost: float | None
    """Cost of a step over that of QAT's, or of the baseline's where there is no QAT."""
    best_of_family: bool = False


def lines_of(entries: Sequence[Entry], *, baseline: str) -> list[Line]:
    """The rows of a table, in the order of the entries.

    Args:
        entries: one for each method; the baseline among them.
        baseline: the name that differences are taken to.

    Raises:
        SparkirError: two entries were measured on different images.
    """
    base = next(entry for entry in entries if entry.name == baseline)
    unit = next((entry for entry in entries if entry.name == "qat" and entry.step_ms), base)
    lines = [_line(entry, base, unit) for entry in entries]
    families = {line.name.partition("@")[0] for line in lines if "@" in line.name}
    best = {_best(lines, family) for family in families}
    return [replace(line, best_of_family=line.name in best) for line in lines]


def _line(entry: Entry, base: Entry, unit: Entry) -> Line:
    cost_ms, unit_ms = _mean(entry.step_ms), _mean(unit.step_ms)
    return Line(
        name=entry.name,
        label=entry.label,
        seeds=len(entry.scores),
        images=len(next(iter(entry.scores.values()), ())),
        psnr_db=mean_of(entry.scores, "psnr_db"),
        ssim=mean_of(entry.scores, "ssim"),
        lpips=mean_of(entry.scores, "lpips"),
        differences={m: difference(entry, base, m) for m in get_args(Metric)},
        psnr_db_as_trained=mean_of(entry.as_trained, "psnr_db"),
        ssim_as_trained=mean_of(entry.as_trained, "ssim"),
        step_ms=cost_ms,
        cost=cost_ms / unit_ms if cost_ms and unit_ms else None,
    )


def _mean(values: Mapping[int, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def mean_of(scores: Scores, metric: Metric) -> float | None:
    """The mean over seeds and images; None where some of it was not measured."""
    values = _array(scores, metric, sorted(scores))
    return None if values is None else float(values.mean())


def difference(entry: Entry, base: Entry, metric: Metric) -> Interval | None:
    """`entry` minus `base`, paired by image and seed, over the seeds that both have.

    None for the baseline itself, where nothing can be paired, and where an image that was
    restored without error has an infinite PSNR.

    Raises:
        SparkirError: they were measured on different images.
    """
    seeds = sorted(set(entry.scores) & set(base.scores))
    if entry.name == base.name or not seeds:
        return None
    for seed in seeds:
        _require_same_images(entry, base, seed)
    ours, theirs = (_array(one.scores, metric, seeds) for one in (entry, base))
    if ours is None or theirs is None or not np.isfinite([ours, theirs]).all():
        return None
    return paired_bootstrap(ours - theirs)


def _array(
    scores: Scores, metric: Metric, seeds: Sequence[int]
) -> Float[np.ndarray, "seeds images"] | None:
    rows = [[getattr(image, metric) for image in scores[seed]] for seed in seeds]
    known = bool(rows) and all(value is not None for row in rows for value in row)
    return np.array(rows, dtype=np.float64) if known else None


def _require_same_images(entry: Entry, base: Entry, seed: int) -> None:
    names = [[image.name for image in one.scores[seed]] for one in (entry, base)]
    if names[0] != names[1]:
        raise SparkirError(
            f"{entry.name} and {base.name} were scored on different images, so the test set has "
            "changed between them; delete the comparison's seed-*/*/scores to score all again"
        )


def _best(lines: Sequence[Line], family: str) -> str:
    """The name of the strength with the highest PSNR; empty if there is one alone.

    Of those with most seeds, whose means are of the same trainings; `truth` is none of `truth@S`.
    """
    names = {line.name for line in lines if line.name.partition("@")[0] == family} - {"truth"}
    own = [line for line in lines if line.name in names and line.psnr_db is not None]
    own = [line for line in own if line.seeds == max(other.seeds for other in own)]
    if len(own) < 2:
        return ""
    return max(own, key=lambda line: line.psnr_db or 0.0).name
