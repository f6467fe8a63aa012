"""From the cells of a comparison to its tables, with all that has to be said below them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparkir.assemble import convention_of
from sparkir.compare.cell import Cell, images_of
from sparkir.compare.methods import Method, missing_rows
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore
from sparkir.evaluate.perceptual import find_lpips
from sparkir.recipe import Recipe
from sparkir.report.comparison import Entry, Line, Scores, lines_of
from sparkir.report.comparison_text import MARK, SetTable, to_csv, to_latex, to_markdown
from sparkir.report.events import to_json
from sparkir.run import versions, write_text

_SHOWN = ("integer", "float", "none")
"""What a row shows, if it was measured: the first of these."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison made."""

    folder: Path
    tables: list[SetTable]
    """One for each test set, the recipe's own first."""
    notes: list[str]
    """What is to be said of all of them."""
    files: dict[str, Path]
    """What each file is -> where it is."""


def tabulate(
    folder: Path,
    methods: Sequence[Method],
    cells: Sequence[Cell],
    sets: Mapping[str, str],
    *,
    baseline: str,
    failures: Mapping[Cell, str],
) -> Comparison:
    """Make the tables of cells that are finished or failed, and write them in every form.

    Args:
        folder: of the comparison.
        methods: the rows in order.
        cells: of these methods, all seeds.
        sets: name of each test set -> where its images are.
        baseline: name of the method that differences are taken to.
        failures: cells that failed just now, and why; those that diverged earlier say so.

    Raises:
        SparkirError: the cells of a seed did not see the same data.
    """
    _require_same_data(cells)
    contents = {name: content for name in sets if (content := _content(cells, name))}
    recipe = cells[0].base
    notes = _common_notes(recipe, methods, cells, baseline, failures)
    tables = []
    for name in sets:
        entries = [_entry(m, [c for c in cells if c.method is m], cells, name) for m in methods]
        lines = lines_of(entries, baseline=baseline)
        title = next(method.label for method in methods if method.name == baseline)
        tables.append(
            SetTable(
                name=name,
                convention=convention_of(recipe).label,
                baseline=title,
                lines=lines,
                notes=_statistics_notes(lines, title, baseline),
            )
        )
    files = _write(folder, recipe, tables, notes, cells, contents)
    return Comparison(folder=folder, tables=tables, notes=notes, files=files)


def _require_same_data(cells: Sequence[Cell]) -> None:
    """Check that all trainings of a seed saw the same crops in the same order."""
    for seed in sorted({cell.seed for cell in cells}):
        results = {c.method.name: c.result() or {} for c in cells if c.seed == seed}
        orders = {name: r["data_order"] for name, r in results.items() if "data_order" in r}
        if len(set(orders.values())) > 1:
            raise SparkirError(
                f"the methods of seed {seed} did not see the same crops in the same order, so they "
                f"cannot be compared: {', '.join(sorted(orders))}. Other versions of sparkir made "
                "some of them; choose another --out to make all again"
            )


def _content(cells: Sequence[Cell], test_set: str) -> str:
    """The hash of the pixels that all were scored on; empty where only older scores are.

    Raises:
        SparkirError: they were scored on different ones.
    """
    scores = (cell.scores(test_set) or {} for cell in cells)
    found = {score["content"] for score in scores if "content" in score}
    if len(found) > 1:
        raise SparkirError(
            f"the images of {test_set} have changed since some methods were scored; delete the "
            f"comparison's seed-*/*/scores/{test_set}.json to score all again"
        )
    return next(iter(found), "")


def _entry(method: Method, own: Sequence[Cell], cells: Sequence[Cell], test_set: str) -> Entry:
    """One method on one test set."""
    seeds = sorted({cell.seed for cell in cells})
    shown: dict[int, list[ImageScore]] = {}
    as_trained: dict[int, list[ImageScore]] = {}
    step_ms: dict[int, float] = {}
    for cell in own:
        result, scores = cell.result() or {}, cell.scores(test_set)
        if scores is None:
            continue
        kind = next(kind for kind in _SHOWN if kind in scores["scores"])
        of = [cell.seed] if method.per_seed else seeds  # or they are the same for all
        shown |= dict.fromkeys(of, images_of(scores, kind))
        if "training" in scores["scores"]:
            as_trained[cell.seed] = images_of(scores, "training")
        if _clock(result) in result:
            step_ms[cell.seed] = result[_clock(result)]
    return Entry(
        name=method.name,
        label=_label(method, shown, seeds),
        scores=shown,
        as_trained=as_trained,
        step_ms=step_ms,
    )


def _label(method: Method, scores: Scores, seeds: Sequence[int]) -> str:
    if 0 < len(scores) < len(seeds):
        return f"{method.label} ({len(scores)} of {len(seeds)} seeds)"
    return method.label


def _clock(result: Mapping[str, Any]) -> str:
    """CPU time does not see what else the machine does; a GPU's work is seen by the clock alone."""
    return "step_ms" if result.get("device") == "cuda" else "step_cpu_ms"


# What is said below a table -------------------------------------------------------------------


def _statistics_notes(lines: Sequence[Line], title: str, baseline: str) -> list[str]:
    base = next(line for line in lines if line.name == baseline)
    if not base.seeds:
        return [f"No differences: {title} failed."]
    paired = f"Differences to {title} are paired by image and seed"
    if base.seeds == 1:
        intervals = (
            f"ONE seed: their bootstrap 95 % intervals are over {base.images} images alone and say "
            "nothing of other trainings"
        )
        if base.images == 1:
            intervals = "ONE seed and image: there is no interval"
    else:
        intervals = (
            f"their bootstrap 95 % intervals resample {base.seeds} seeds and {base.images} images"
        )
    infinite = [x.label for x in lines if x.psnr_db == float("inf")]
    if infinite:
        whole = ", ".join(infinite)
        intervals += f"; no difference of {whole}: an image without an error has an infinite PSNR"
    marked = [line.label for line in lines if line.best_of_family]
    best = [f"{MARK} the best of its strengths on these images."] if marked else []
    return [f"{paired}; {intervals}.", *best]


def _common_notes(
    recipe: Recipe,
    methods: Sequence[Method],
    cells: Sequence[Cell],
    baseline: str,
    failures: Mapping[Cell, str],
) -> list[str]:
    assert recipe.quant is not None
    bits = recipe.quant.label
    notes = [
        f"Students are {bits} and scored as the integer network; 'as trained' is the PSNR of the "
        "same student in the arithmetic of its training, a check."
    ]
    by_clock = any(_clock(cell.result() or {}) == "step_ms" for cell in cells)
    spent = "time, noisy if several trained at once," if by_clock else "CPU time of all cores"
    timed = {c.method.name for c in cells if _clock(c.result() or {}) in (c.result() or {})}
    unit = "qat" if "qat" in timed else baseline
    title = next(method.label for method in methods if method.name == unit)
    notes.append(f"Cost: {spent} of a training step over that of {title}.")
    if any(method.kind == "calibrated" for method in methods):
        after = (
            "after its float training" if not recipe.student.weights else "with its first weights"
        )
        notes.append(f"PTQ: the student {after}, calibrated.")
    said = [(c.method.label, (c.result() or {}).get("remark")) for c in cells]
    remarks = {label: remark for label, remark in said if remark}
    notes += [f"{label}: {remark}." for label, remark in remarks.items()]
    notes += _matched_notes(methods, cells)
    lpips = find_lpips()
    notes.append(lpips.words + "." if lpips.metric else f"No LPIPS: {lpips.words}.")
    missing = missing_rows([method.name for method in methods], recipe)
    if missing:
        notes.append(f"Not in this table: {', '.join(missing)}.")
    for cell in cells:
        reason = failures.get(cell) or (cell.result() or {}).get("failed")
        if reason:
            notes.append(f"{cell.title} failed: {reason}.")
    return notes


def _matched_notes(methods: Sequence[Method], cells: Sequence[Cell]) -> list[str]:
    """What W the controls were matched to."""
    notes = []
    for name in sorted({method.after for method in methods if method.after}):
        results = [c.result() or {} for c in cells if c.method.name == name]
        found = [
            f"{r['mean_weight']:.3f} +- {r['weight_deviation']:.3f}"
            for r in results
            if "mean_weight" in r
        ]
        if found:
            notes.append(f"W of {name}, mean +- deviation, seed by seed: {', '.join(found)}.")
    return notes


# Files ----------------------------------------------------------------------------------------


def _write(
    folder: Path,
    recipe: Recipe,
    tables: Sequence[SetTable],
    notes: Sequence[str],
    cells: Sequence[Cell],
    contents: Mapping[str, str],
) -> dict[str, Path]:
    sets = [table.name for table in tables]
    values = {
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "tables": [asdict(table) for table in tables],
        "notes": list(notes),
        "starts": {cell.seed: start for cell in cells if (start := cell.start())},
        "images": contents,
        "cells": [_cell_values(cell, sets) for cell in cells],
    }
    texts = {
        "table": ("comparison.md", to_markdown(tables, recipe.name, notes)),
        "LaTeX": ("comparison.tex", to_latex(tables, recipe.name, notes)),
        "CSV": ("comparison.csv", to_csv(tables)),
        "each image": ("images.csv", _images_csv(cells, sets)),
        "JSON": ("comparison.json", to_json(values, indent=1)),
    }
    for name, text in texts.values():
        write_text(folder / name, text, then="give the same command again")
    return {what: folder / name for what, (name, _) in texts.items()}


def _cell_values(cell: Cell, sets: Sequence[str]) -> dict[str, Any]:
    """Where a cell's own files are, and what its training left."""
    return {
        "method": cell.method.name,
        "seed": cell.seed,
        "folder": str(cell.folder.relative_to(cell.comparison)),
        "result": cell.result(),
        "scores": {name: f"scores/{name}.json" for name in sets if cell.scores(name)},
    }


def _images_csv(cells: Sequence[Cell], sets: Sequence[str]) -> str:
    """What the tables' means and intervals are of: one line for each image, with every digit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "seed", "method", "arithmetic", "image", "psnr_db", "ssim", "lpips"])
    for name in sets:
        for cell in cells:
            found = (cell.scores(name) or {}).get("scores", {})
            for arithmetic, images in found.items():
                head = (name, cell.seed, cell.method.name, arithmetic)
                for one in images:
                    writer.writerow([*head, *one.values()])
    return text.getvalue()
