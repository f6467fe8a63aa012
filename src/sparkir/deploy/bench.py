"""Latency, throughput and memory of one network in every runtime, measured side by side.

All contenders of a size are timed in turn within one process, round after round, so that whatever
else the machine does meets them alike; medians are reported. Nothing here prints.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sparkir.deploy.contenders import Contender, Run, open_contender, reason_of
from sparkir.deploy.peak import Peak, example, peak_of
from sparkir.deploy.results import (
    DEFAULT_SIZES_PX,
    LEAD_IN_S,
    WARM_UP_RUNS,
    Plan,
    Row,
)
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

Report = Callable[[dict[str, Any]], None]


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def plan_of(sizes: Sequence[str], *, repeats: int, threads: int | None) -> Plan:
    """A plan from a user's words; without sizes or threads, the default ones.

    Raises:
        SparkirError: a size is not written as HxW, or a number is below 1.
    """
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value is not None and value < 1:
            raise SparkirError(f"--{name} {value}: give a whole number of at least 1")
    chosen = tuple(dict.fromkeys(_size_of(text) for text in sizes)) or DEFAULT_SIZES_PX
    return Plan(sizes_px=chosen, repeats=repeats, threads=threads or cores())


def _size_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text.strip())
    if not found:
        raise SparkirError(f"--size {text!r}: write height x width in pixels, as in 540x960")
    return int(found[1]), int(found[2])


def fitting(plan: Plan, facts: ModelFacts) -> Plan:
    """The plan with its default sizes made such that the network can take them."""
    if plan.sizes_px != DEFAULT_SIZES_PX:
        return plan
    sizes = tuple((_fit(height, facts), _fit(width, facts)) for height, width in plan.sizes_px)
    return replace(plan, sizes_px=sizes)


def _fit(side: int, facts: ModelFacts) -> int:
    """The smallest side from this one on that the network can take."""
    step = facts.size_multiple
    return -(-max(side, facts.min_size_px) // step) * step


def require_sizes(sizes_px: Sequence[tuple[int, int]], facts: ModelFacts) -> None:
    """Refuse inputs that the network cannot take.

    Raises:
        SparkirError: naming the nearest size that it can.
    """
    step, least = facts.size_multiple, facts.min_size_px
    for height, width in sizes_px:
        fits = [_fit(height, facts), _fit(width, facts)]
        if fits != [height, width]:
            raise SparkirError(
                f"{facts.name} takes sides of at least {least} px that are multiples of {step}, "
                f"and {height}x{width} is no such size; give --size {fits[0]}x{fits[1]}"
            )


def measure(
    contenders: Sequence[Contender],
    facts: ModelFacts,
    plan: Plan,
    report: Report,
    *,
    clock: Callable[[], float] = time.perf_counter,
    opener: Callable[..., Run] = open_contender,
    peak: Callable[..., Peak] = peak_of,
) -> list[Row]:
    """Measure all contenders at all sizes: memory in child processes first, then time.

    What fails in its child process is not opened in this one, so that a contender that takes all
    memory ends its own process only. `report` gets progress; `clock` counts seconds.
    """
    rows = []
    for size in plan.sizes_px:
        fitting = [c for c in contenders if c.size_px in (None, size)]
        image = example((1, facts.channels, *size), facts.value_range)
        peaks = []
        report({"kind": "stage", "name": f"memory at {size[0]}x{size[1]}", "steps": len(fitting)})
        for done, contender in enumerate(fitting, 1):
            measured = (
                Peak(None, contender.failure)
                if contender.failure
                else peak(contender, image.shape, white=facts.value_range, threads=plan.threads)
            )
            peaks.append(measured)
            report({"kind": "row", "done": done, "total": len(fitting), "name": contender.label})
        rows += _timed(fitting, peaks, image, plan, report, clock, opener)
    return rows


def _timed(
    contenders: Sequence[Contender],
    peaks: Sequence[Peak],
    image: np.ndarray,
    plan: Plan,
    report: Report,
    clock: Callable[[], float],
    opener: Callable[..., Run],
) -> list[Row]:
    """Open what ran in its child process, warm it up, and time it in turn with the others."""
    size = image.shape[-2], image.shape[-1]
    failures = {index: peak.failure for index, peak in enumerate(peaks) if peak.failure}
    runs: dict[int, Run] = {}
    for index, contender in enumerate(contenders):
        if index not in failures:
            try:
                runs[index] = _warmed(opener(contender, threads=plan.threads), image)
            except Exception as error:  # noqa: BLE001 - each engine raises its own
                failures[index] = reason_of(error)
    report({"kind": "stage", "name": f"time at {size[0]}x{size[1]}", "steps": plan.repeats})
    samples, late = interleaved(runs, image, plan.repeats, report, clock)
    failures |= late
    return [
        Row(
            contender=contender,
            size_px=size,
            samples_ms=() if index in failures else tuple(samples[index]),
            peak_mib=peaks[index].mib,
            failure=failures.get(index, ""),
        )
        for index, contender in enumerate(contenders)
    ]


def _warmed(run: Run, image: np.ndarray) -> Run:
    for _ in range(WARM_UP_RUNS):
        run(image)
    return run


def interleaved(
    runs: Mapping[int, Run],
    image: np.ndarray,
    repeats: int,
    report: Report,
    clock: Callable[[], float],
) -> tuple[dict[int, list[float]], dict[int, str]]:
    """Milliseconds of each run, every contender once per round, and why some stopped.

    Each round begins with another contender, so that none always follows the same one.
    """
    samples: dict[int, list[float]] = {index: [] for index in runs}
    failures: dict[int, str] = {}
    for number in range(repeats):
        for index in _rotated(list(runs), number):
            if index in failures:
                continue
            try:
                samples[index].append(_visit(runs[index], image, clock))
            except Exception as error:  # noqa: BLE001 - each engine raises its own
                failures[index] = reason_of(error)
        report({"kind": "row", "done": number + 1, "total": repeats, "name": "round"})
    return samples, failures


def _visit(run: Run, image: np.ndarray, clock: Callable[[], float]) -> float:
    """Milliseconds of one run, after others that count for nothing.

    The threads of whoever ran before may still be spinning, and the caches are theirs.
    """
    begin = clock()
    run(image)
    while (start := clock()) - begin < LEAD_IN_S:
        run(image)
    run(image)
    return 1e3 * (clock() - start)


def _rotated(order: list[int], by: int) -> Iterator[int]:
    first = by % max(1, len(order))
    yield from order[first:] + order[:first]
