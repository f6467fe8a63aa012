"""The figures of an event stream: what was measured at which step of which training.

CSV and TensorBoard are two views of these, and the stream is the only source of both.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkir.data.atomic import atomic_file
from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

_TRAIN = "train "
_KINDS = ("step", "policy", "evaluation")
_NO_FIGURES = ("kind", "step", "time_s")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one event says of a step."""

    training: str
    """Which of the run's trainings: `QAT`, `SPARK`."""
    step: int
    """How many steps had been taken when this one was."""
    time_s: float
    """Time of day."""
    kind: str
    """`step`, `policy` or `evaluation`."""
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Restart:
    """A training went on from a checkpoint: what was said of later steps did not happen."""

    training: str
    step: int
    """The checkpoint's."""
    time_s: float


class Trainings:
    """Which training each event of a stream is about, and which events a resume undid."""

    def __init__(self) -> None:
        self._training = ""
        self._resumed_at: int | None = None
        self._seen: set[str] = set()

    def read(self, event: Mapping[str, Any]) -> Iterator[Figures | Restart]:
        """What an event means; nothing if it holds no figures."""
        kind = event["kind"]
        if kind == "stage":
            name = event["name"]
            self._training = name.removeprefix(_TRAIN) if name.startswith(_TRAIN) else ""
            self._resumed_at = 0
        elif kind == "resumed":
            self._resumed_at = event["step"]
        elif kind in _KINDS and self._training:
            yield from self._restart(event["time_s"])
            yield self._figures(event)

    def _restart(self, time_s: float) -> Iterator[Restart]:
        """Only where something follows: a training that was finished is resumed for nothing."""
        if self._resumed_at is not None and self._training in self._seen:
            yield Restart(training=self._training, step=self._resumed_at, time_s=time_s)
        self._resumed_at = None
        self._seen.add(self._training)

    def _figures(self, event: Mapping[str, Any]) -> Figures:
        # A policy learns during a step, before it is counted; the others speak after.
        step = event["step"] + (event["kind"] == "policy")
        values = {
            key: float(value)
            for key, value in event.items()
            if key not in _NO_FIGURES
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        }
        return Figures(
            training=self._training,
            step=step,
            time_s=event["time_s"],
            kind=event["kind"],
            values=values,
        )


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders with an event stream: those given, or below them, as in a comparison's.

    Raises:
        SparkirError: there is none in one of them.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        inside = [folder] if (folder / "events.jsonl").is_file() else []
        inside += [] if inside else sorted(path.parent for path in folder.rglob("events.jsonl"))
        if not inside:
            raise SparkirError(
                f"no run in {folder}: it holds no events.jsonl; give what `sparkir distill` or "
                "`sparkir compare` wrote to"
            )
        found |= dict.fromkeys(inside)
    return list(found)


Row = dict[str, str | float]
"""One step of a table: `run`, `training`, `step`, `time_s`, and the figures that there are."""


def rows_of(run: str, events: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row for each step of each training that has figures, as it came out in the end.

    What was logged after a checkpoint and before a kill is replaced by what the resumed run made of
    those steps.
    """
    rows: dict[tuple[str, int], Row] = {}
    trainings = Trainings()
    for event in events:
        for item in trainings.read(event):
            if isinstance(item, Restart):
                rows = {
                    key: row
                    for key, row in rows.items()
                    if key[0] != item.training or key[1] <= item.step
                }
                continue
            place: Row = {"run": run, "training": item.training, "step": item.step}
            row = rows.setdefault((item.training, item.step), place)
            row["time_s"] = item.time_s
            prefix = "policy_" if item.kind == "policy" else ""
            row |= {
                f"{prefix}{name.removeprefix(prefix)}": value for name, value in item.values.items()
            }
    return list(rows.values())


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each row; a cell is empty where that step had no such figure."""
    columns = dict.fromkeys(["run", "training", "step", "time_s"])
    for row in rows:
        columns |= dict.fromkeys(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(rows: Sequence[Row], file: Path) -> None:
    """Write `to_csv`, whole or not at all.

    Raises:
        SparkirError: there are no figures, or the file cannot be written.
    """
    if not rows:
        raise SparkirError("no training has logged a step yet; there is nothing for a CSV file")
    if file.is_dir():
        raise SparkirError(f"--csv {file} is a folder; give a file")
    try:
        with atomic_file(file) as opened:
            opened.write(to_csv(rows).encode())
    except OSError as error:
        raise SparkirError(
            f"cannot write {file}: {one_line(error)}; choose another --csv"
        ) from error
