"""What a benchmark found: rows, how they compare, and how they are shown and kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparkir.data.atomic import atomic_file
from sparkir.deploy.contenders import Contender, versions
from sparkir.errors import SparkirError

DEFAULT_SIZES_PX = ((180, 320), (540, 960))
DEFAULT_REPEATS = 7
WARM_UP_RUNS = 2
"""Of each contender, once it is open."""
LEAD_IN_S = 0.05
"""Before each timed run its contender runs untimed, once and for at least this long."""
HEADER = ("contender", "ms", "MP/s", "x", "MiB", "KiB", "int", "float")
MEANING = (
    "ms: median of {repeats} runs; MP/s: input pixels; x: times as fast as torch float32, else as "
    "the same runtime's float32; MiB: peak memory of one run in a process of its own, beyond the "
    "imported runtime; KiB: file; int: operators that the runtime computes on integers; float: "
    "convolutions that it computes in floating point, of all"
)
_NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how often."""

    sizes_px: tuple[tuple[int, int], ...] = DEFAULT_SIZES_PX
    """Heights and widths of inputs."""
    repeats: int = DEFAULT_REPEATS
    """Timed runs of each contender at each size."""
    threads: int
    """Of every runtime alike."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one size."""

    contender: Contender
    size_px: tuple[int, int]
    samples_ms: tuple[float, ...] = ()
    """Milliseconds of each timed run, in order."""
    peak_mib: float | None = None
    """Memory beyond the imported engine; None where it is not known."""
    failure: str = ""
    """Why it has no samples."""

    @property
    def median_ms(self) -> float | None:
        """Latency; None if it failed."""
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def megapixels_per_s(self) -> float | None:
        """Input pixels per second, in millions; None if it failed."""
        pixels = self.size_px[0] * self.size_px[1]
        return None if self.median_ms is None else pixels / self.median_ms / 1e3


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All rows, and what they were measured with."""

    model: str
    plan: Plan
    rows: list[Row]
    absent: list[str] = field(default_factory=list)
    """What was not measured, and what to do about it."""
    versions: Mapping[str, str] = field(default_factory=versions)


def reference_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """What `row` is compared with: torch in float32 at its size, else its own engine in float32."""
    same = [r for r in rows if r.size_px == row.size_px and r.contender.arithmetic == "float32"]
    for engine in ("torch", row.contender.engine):
        for other in same:
            if other.contender.engine == engine and other.median_ms is not None:
                return other
    return None


def ratio_of(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast as its reference; None where one of the two has no time."""
    reference = reference_of(row, rows)
    if reference is None or reference.median_ms is None or row.median_ms is None:
        return None
    return reference.median_ms / row.median_ms


def write_json(benchmark: Benchmark, path: Path) -> None:
    """Write everything measured, every sample too, whole or not at all.

    Raises:
        SparkirError: the file cannot be written.
    """
    rows = [_values_of(row, benchmark.rows) for row in benchmark.rows]
    fixed = {"warm_up_runs": WARM_UP_RUNS, "lead_in_s": LEAD_IN_S}
    values = {**asdict(benchmark), **fixed, "rows": rows}
    try:
        with atomic_file(path) as file:
            file.write(json.dumps(values, indent=2).encode())
    except OSError as error:
        raise SparkirError(f"cannot write {path}: {error.strerror or error}") from error


def _values_of(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    reference = reference_of(row, rows)
    values = asdict(row)
    del values["contender"]["file"]  # a temporary one, mostly
    return values | {
        "label": row.contender.label,
        "median_ms": row.median_ms,
        "input_megapixels_per_s": row.megapixels_per_s,
        "times_as_fast": ratio_of(row, rows),
        "times_as_fast_as": reference.contender.label if reference else None,
    }


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """The texts of a table's row under `HEADER`; notes or the failure stand below the name."""
    contender = row.contender
    remarks = (f"failed: {row.failure}",) if row.failure else contender.notes
    size_kib = None if contender.file_bytes is None else contender.file_bytes / 1024
    known = contender.integer_share is not None
    return [
        "\n".join([contender.label, *(f"  {remark}" for remark in remarks)]),
        _shown(row.median_ms, ".2f"),
        _shown(row.megapixels_per_s, ".2f"),
        _shown(ratio_of(row, rows), ".2f"),
        _shown(row.peak_mib, ".0f"),
        _shown(size_kib, ".0f"),
        _shown(contender.integer_share, ".0%"),
        f"{contender.float_layers}/{contender.layers}" if known else _NOTHING,
    ]


def _shown(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)
