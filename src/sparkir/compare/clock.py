"""What a training step costs: timed from outside the loop, without what lies between the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_WARM_UP_STEPS = 3  # the first ones compile, and fill caches


class StepClock:
    """Stands in for the loop's `stop_requested`, which is asked once at the end of every step.

    Steps with an evaluation in them are left out. Means are kept, not medians: a method that does
    more on every twelfth step must not look as cheap as one that never does.
    """

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        """Pass the question on to `stop_requested`."""
        self._stop_requested = stop_requested
        self._began = _now()
        self._spent: list[tuple[float, float]] = []
        self._left_out = _WARM_UP_STEPS
        self._evaluated = False

    def __call__(self) -> bool:
        """A step has ended."""
        ended = _now()
        if self._left_out > 0:
            self._left_out -= 1
        elif not self._evaluated:
            self._spent.append((ended[0] - self._began[0], ended[1] - self._began[1]))
        self._evaluated = False
        self._began = _now()
        return self._stop_requested()

    def timed(self, event: dict[str, Any]) -> dict[str, Any]:
        """Watch an event of the loop; `step` events get what the steps since the last one took."""
        match event["kind"]:
            case "evaluation":
                self._evaluated = True
            case "checkpoint":
                self._began = _now()
            case "step" if self._spent:
                wall, cpu = (sum(column) for column in zip(*self._spent, strict=True))
                event = event | {"timed_steps": len(self._spent), "wall_s": wall, "cpu_s": cpu}
                self._spent = []
        return event


def _now() -> tuple[float, float]:
    """Seconds on the wall's clock, and of this process on all cores."""
    return time.perf_counter(), time.process_time()


def cost_of(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean milliseconds of a step, `step_ms` by the clock and `step_cpu_ms` of all cores.

    Empty where no step was timed.
    """
    timed = [event for event in events if event.get("timed_steps")]
    steps = sum(event["timed_steps"] for event in timed)
    if not steps:
        return {}
    return {
        "step_ms": 1000 * sum(event["wall_s"] for event in timed) / steps,
        "step_cpu_ms": 1000 * sum(event["cpu_s"] for event in timed) / steps,
    }
