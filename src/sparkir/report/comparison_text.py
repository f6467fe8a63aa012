"""A comparison's table as text: for the terminal, Markdown, LaTeX, and CSV with every digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparkir.evaluate.statistics import Interval
from sparkir.report.comparison import Line
from sparkir.report.table import markdown_line

MARK = "*"
"""Beside the best strength of a family."""


@dataclass(frozen=True, kw_only=True)
class SetTable:
    """All methods on one test set."""

    name: str
    convention: str
    """What PSNR and SSIM were computed on."""
    baseline: str
    """Its label."""
    lines: list[Line]
    notes: list[str]
    """What is to be said of this one, a line each."""

    @property
    def has_lpips(self) -> bool:
        """Whether any method was measured by it."""
        return any(line.lpips is not None for line in self.lines)


class Column(NamedTuple):
    """One column of a table."""

    title: str
    text: Callable[[Line], str]


def columns(table: SetTable, *, brief: bool = False) -> list[Column]:
    """The columns of a table; `brief` leaves out what does not fit a terminal."""
    chosen = [
        Column("", lambda line: line.label + (f" {MARK}" if line.best_of_family else "")),
        Column("PSNR dB", lambda line: _figure(line.psnr_db, 3) or "failed"),
        Column("SSIM", lambda line: _figure(line.ssim, 4)),
    ]
    if table.has_lpips:
        chosen.append(Column("LPIPS", lambda line: _figure(line.lpips, 4)))
    if brief:
        change = Column("difference (95 %)", lambda line: _interval(line.differences["psnr_db"], 3))
        chosen.append(change)
    else:
        chosen += _differences(table)
    return [
        *chosen,
        Column("as trained", lambda line: _figure(line.psnr_db_as_trained, 3)),
        Column("cost", lambda line: _figure(line.cost, 2)),
    ]


def _differences(table: SetTable) -> list[Column]:
    to = f"to {table.baseline} [95 %]"
    found = [
        Column(f"PSNR {to}", lambda line: _interval(line.differences["psnr_db"], 3)),
        Column(f"SSIM {to}", lambda line: _interval(line.differences["ssim"], 4)),
    ]
    if table.has_lpips:
        found.append(Column(f"LPIPS {to}", lambda line: _interval(line.differences["lpips"], 4)))
    return found


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(value: Interval | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def to_markdown(tables: Sequence[SetTable], title: str, notes: Sequence[str]) -> str:
    """One section for each test set, and below them what is to be said of all."""
    parts = [f"# {title}"]
    for table in tables:
        chosen = columns(table)
        rows = [
            markdown_line([column.title for column in chosen]),
            markdown_line(["---", *("---:" for _ in chosen[1:])]),
            *(markdown_line([column.text(line) for column in chosen]) for line in table.lines),
        ]
        caption = f"{table.convention}; SSIM alike."
        parts += [f"## {table.name}", caption, "\n".join(rows), _listed(table.notes)]
    parts += ["## Notes", _listed(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _listed(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


_LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "*": r"$^{*}$",
        "|": r"\textbar{}",
    }
)


def to_latex(tables: Sequence[SetTable], title: str, notes: Sequence[str]) -> str:
    """A table for each test set; it needs the package booktabs."""
    parts = []
    for table in tables:
        chosen = columns(table)
        said = " ".join([*table.notes, *notes])
        caption = f"{title}, {table.name}. {table.convention}; SSIM alike. {said}"
        head = " & ".join(column.title.translate(_LATEX) for column in chosen)
        body = [
            " & ".join(column.text(line).translate(_LATEX) for column in chosen) + r" \\"
            for line in table.lines
        ]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{caption.translate(_LATEX)}}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(chosen) - 1)}}}",
                    r"\toprule",
                    head + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[SetTable]) -> str:
    """One line for each method and test set, with every digit; empty where there is no figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for table in tables:
        for line in table.lines:
            writer.writerow([table.name, table.convention, table.baseline, *_csv_values(line)])
    return text.getvalue()


_METRICS = ("psnr_db", "ssim", "lpips")
_CSV_HEADER = [
    *("set", "convention", "baseline", "method", "label", "seeds", "images"),
    *_METRICS,
    *(f"{m}_difference{end}" for m in _METRICS for end in ("", "_low", "_high")),
    *("psnr_db_as_trained", "ssim_as_trained", "step_ms", "step_cost"),
]


def _csv_values(line: Line) -> list[object]:
    differences = [
        value
        for interval in (line.differences[m] for m in ("psnr_db", "ssim", "lpips"))
        for value in (interval or (None, None, None))
    ]
    return [
        *(line.name, line.label, line.seeds, line.images, line.psnr_db, line.ssim, line.lpips),
        *differences,
        *(line.psnr_db_as_trained, line.ssim_as_trained, line.step_ms, line.cost),
    ]
