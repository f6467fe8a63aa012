"""Many methods on equal terms: the story of one comparison.

recipe -> cells (a method with a seed) -> each trained and scored once, or found finished ->
tables with paired differences to a baseline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sparkir.assemble import Report, silent, weighting_of
from sparkir.compare.cell import Cell, is_done, require_own_recipe
from sparkir.compare.methods import Method, find, recipe_of, requirements
from sparkir.compare.tabulate import Comparison, tabulate
from sparkir.compare.workers import run_parallel
from sparkir.compare.workspace import Workspace
from sparkir.data.layouts import set_name
from sparkir.errors import SparkirError
from sparkir.recipe import Recipe, changed, differences, load
from sparkir.run import claim
from sparkir.train.loop import Interrupted

_SET_NAME = re.compile(r"[\w.-]+")


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    methods: Sequence[Method],
    seeds: int,
    baseline: str = "qat",
    more_sets: Sequence[str] = (),
    jobs: int = 1,
    report: Report = silent,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Carry out what is left of a comparison in `folder`, and write its tables.

    Args:
        recipe: what all methods share; its own method is one of them only if it is named.
        folder: a new one, or that of an earlier call with the same recipe, whose finished cells
            are taken as they are.
        methods: the rows, as `compare.methods.choose` gives them.
        seeds: how many; the first is the recipe's.
        baseline: the method that differences are taken to.
        more_sets: `NAME=DIR` of test sets besides the recipe's own.
        jobs: processes that work at the same time.
        report: receives events.
        stop_requested: asked after each step.

    Raises:
        SparkirError: something the user can mend; whatever is finished stays. A training that
            fails is a row of the tables instead.
        Interrupted: `stop_requested` said so; the same call goes on.
    """
    sets = sets_of(recipe, more_sets)
    if min(seeds, jobs) < 1:
        raise SparkirError(f"--seeds {seeds} --jobs {jobs}: give 1 or more of each")
    baseline = find(baseline, recipe).name
    if baseline not in {method.name for method in methods}:
        raise SparkirError(
            f"the baseline {baseline} is not among the methods; add it to --methods, or choose "
            f"another with --baseline: {', '.join(method.name for method in methods)}"
        )
    cells = cells_of(recipe, folder, methods, seeds)
    _require_options(cells)
    is_new = not (folder / "recipe.toml").is_file()
    if not is_new:
        _require_own_folder(folder, recipe)
    left = [cell for cell in cells if _is_left(cell, sets)]
    workspace = Workspace(comparison=folder, sets=sets, report=report)
    if left:
        _open_all(left[0].base, workspace)
    if is_new:
        claim(folder, recipe, resume=False)
    report({"kind": "cells", "done": len(cells) - len(left), "total": len(cells)})
    failures = _carry_out(left, workspace, jobs, report, stop_requested)
    return tabulate(folder, methods, cells, sets, baseline=baseline, failures=failures)


def sets_of(recipe: Recipe, more: Sequence[str]) -> dict[str, str]:
    """Name of each test set -> where its images are; the recipe's own first.

    Raises:
        SparkirError: one is not of the form NAME=DIR, or two have the same name.
    """
    own = re.sub(r"[^\w.-]+", "-", set_name(Path(recipe.data.test))) or "test"
    sets = {own: recipe.data.test}
    for text in more:
        name, _, where = text.partition("=")
        if not where or not _SET_NAME.fullmatch(name):
            raise SparkirError(f"--test {text!r}: write it as NAME=DIR, such as Set5=data/Set5")
        if name in sets:
            raise SparkirError(f"--test {text!r}: there is a test set {name} already; rename it")
        sets[name] = where
    return sets


def cells_of(recipe: Recipe, folder: Path, methods: Sequence[Method], seeds: int) -> list[Cell]:
    """Every cell, seed by seed: first those that others wait for, last those that wait."""
    cells = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        base = changed(recipe, seed=seed, baselines=[])
        own = [m for m in methods if m.per_seed or seed == recipe.seed]
        awaited = {name for method in own for name in requirements(method, base)}
        own.sort(key=lambda m: (bool(requirements(m, base)), m.name not in awaited))
        cells += [Cell(method=m, seed=seed, base=base, comparison=folder) for m in own]
    return cells


def _require_options(cells: Sequence[Cell]) -> None:
    """Find a mistake in the weighting's options before anything runs."""
    for cell in cells:
        if cell.method.match is None:
            weighting_of(recipe_of(cell.method, cell.base).weighting)


def _require_own_folder(folder: Path, recipe: Recipe) -> None:
    """Check that the folder's comparison is this recipe's.

    Raises:
        SparkirError: it is not, or the folder holds a run.
    """
    if (folder / "events.jsonl").exists():
        raise SparkirError(f"{folder} holds a run, not a comparison; choose another --out")
    found = differences(load(folder / "recipe.toml"), recipe)
    if found:
        raise SparkirError(
            f"{folder} holds a comparison of another recipe: {'; '.join(found)}. "
            "Go on with the old values, or choose another --out"
        )


def _is_left(cell: Cell, sets: Mapping[str, str]) -> bool:
    """Whether there is something to do, after a check that what is there fits."""
    require_own_recipe(cell)
    return not is_done(cell, sets)


def _open_all(base: Recipe, workspace: Workspace) -> None:
    """Find mistakes in networks and images, and decode, before anything is trained."""
    workspace.materials(base)
    for where in workspace.sets.values():
        workspace.pairs(where, base)


def _carry_out(
    left: Sequence[Cell],
    workspace: Workspace,
    jobs: int,
    report: Report,
    stop_requested: Callable[[], bool],
) -> dict[Cell, str]:
    """Do what is left; returns why cells failed, if they did."""
    failures: dict[Cell, str] = {}

    def done(cell: Cell, reason: str) -> None:
        if reason:
            failures[cell] = reason
        report({"kind": "cell_done", "cell": cell.title, "failed": reason})

    if min(jobs, len(left)) > 1:
        workspace.forget()  # the processes have their own
        run_parallel(
            left,
            workspace,
            jobs=min(jobs, len(left)),
            ready=_ready,
            done=done,
            report=report,
            stop_requested=stop_requested,
        )
        return failures
    for cell in left:
        if stop_requested():
            raise Interrupted
        done(cell, workspace.attempt(cell, report, stop_requested))
    return failures


def _ready(cell: Cell, left: Sequence[Cell]) -> bool:
    """Whether what the cell waits for is over."""
    awaited = requirements(cell.method, cell.base)
    return not any(other.seed == cell.seed and other.method.name in awaited for other in left)
