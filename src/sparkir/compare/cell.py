"""One cell of a comparison: one method with one seed, trained once and scored once per test set.

Its folder holds `recipe.toml` (the cell's identity), `events.jsonl`, a checkpoint while it trains,
then `student.safetensors` and `result.json`, and `scores/SET.json` for every test set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparkir.assemble import (
    Materials,
    Report,
    convention_of,
    device_for,
    load_student,
    quantize_student,
    save_student,
)
from sparkir.compare.clock import StepClock, cost_of
from sparkir.compare.controls import WeightRecord, record_of
from sparkir.compare.methods import Method, recipe_of, requirements
from sparkir.data.atomic import held
from sparkir.data.pairs import PairStore
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore, Restorer, evaluate
from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.perceptual import find_lpips
from sparkir.measure import Contender, baselines, trained_contenders
from sparkir.recipe import Recipe, changed, differences, load
from sparkir.report.events import EventLog, read_events
from sparkir.run import Trained, train_student, versions, write_text
from sparkir.spark.weighting import Constant
from sparkir.train.loop import Diverged, Interrupted


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """Where one method with one seed lies."""

    method: Method
    seed: int
    base: Recipe
    """The comparison's recipe with this seed."""
    comparison: Path

    @property
    def folder(self) -> Path:
        """Its own folder."""
        return folder_of(self.comparison, self.seed, self.method.name)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.method.label}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """What training left; None if it is not finished."""
        return _read(self.folder / "result.json")

    def scores(self, test_set: str) -> dict[str, Any] | None:
        """The scores on a test set, as `score` wrote them; None if there are none."""
        return _read(self.folder / "scores" / f"{test_set}.json")

    def start(self) -> dict[str, Any] | None:
        """What its seed's methods have in common, by their hashes; None before the first."""
        return _read(start_file(self.comparison, self.seed))

    def recipe(self) -> Recipe:
        """The full recipe.

        Raises:
            SparkirError: the method that it takes numbers from has none.
        """
        record = None
        if self.method.after:
            record = self._record()
        return recipe_of(self.method, self.base, record)

    def _record(self) -> WeightRecord:
        source = folder_of(self.comparison, self.seed, self.method.after)
        result = _read(source / "result.json") or {}
        if "mean_weight" not in result:
            raise SparkirError(
                f"{self.method.after} did not finish, from which {self.method.name} takes its W"
            )
        return WeightRecord(mean=result["mean_weight"], deviation=result["weight_deviation"])


def folder_of(comparison: Path, seed: int, method: str) -> Path:
    """Where the cell of a method and a seed lies."""
    return comparison / f"seed-{seed}" / method.translate(str.maketrans(":@.", "---"))


def start_file(comparison: Path, seed: int) -> Path:
    """Where a seed's materials are written down."""
    return comparison / f"seed-{seed}" / "materials.json"


def _write(path: Path, text: str) -> None:
    write_text(path, text, then="give the same command again")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file that was written whole; None if it is not there."""
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SparkirError(f"cannot read {path}: {error}; delete it to make it again") from error
    return values


# What is left to do ---------------------------------------------------------------------------


def require_own_recipe(cell: Cell) -> None:
    """Check that what lies in the cell's folder was made by its recipe.

    Raises:
        SparkirError: it was made by another one.
    """
    written = cell.folder / "recipe.toml"
    if not written.is_file():
        return
    try:
        found = differences(load(written), cell.recipe())
    except SparkirError as error:
        raise SparkirError(f"{error}; delete {cell.folder} to make it again") from error
    if found:
        raise SparkirError(
            f"{cell.folder} was made by another recipe: {'; '.join(found)}. "
            "Delete that folder to make it again, or choose another --out"
        )


def is_done(cell: Cell, sets: Mapping[str, str]) -> bool:
    """Whether nothing is left to do; a training that diverged has nothing to score."""
    result = cell.result()
    return result is not None and (bool(result["failed"]) or not unscored(cell, sets))


def unscored(cell: Cell, sets: Mapping[str, str]) -> list[str]:
    """The test sets that are still to be scored, or scored again with LPIPS."""
    lpips = find_lpips().metric is not None
    left = []
    for name, where in sets.items():
        scores = cell.scores(name)
        if scores is None or scores["where"] != where or (lpips and not scores["lpips"]):
            left.append(name)
    return left


# Carrying it out ------------------------------------------------------------------------------


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder: a comparison that was killed may leave one behind.

    It waits: whoever is inside stops at the end of its step when its parent is gone. The file says
    which process that is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / ".lock", wait=True) as file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        yield


def carry_out(
    cell: Cell,
    sets: Mapping[str, str],
    *,
    materials: Callable[[], Materials],
    pairs: Callable[[str], PairStore],
    report: Report,
    stop_requested: Callable[[], bool],
) -> None:
    """Train the cell unless it is, from its checkpoint if there is one, and score it.

    Args:
        cell: what to do.
        sets: name of each test set -> where its images are.
        materials: gives what the methods of this seed share.
        pairs: gives the images of a place.
        report: receives the events of the training.
        stop_requested: asked after each step, and before each image that is scored.

    Raises:
        Diverged: the training did; this is remembered, and the cell is done.
        SparkirError: anything else that the user can mend; it can be tried again.
        Interrupted: `stop_requested` said so.
    """
    with _held(cell.folder):
        require_own_recipe(cell)
        recipe = cell.recipe()
        result = cell.result()
        if result is None:
            _write(cell.folder / "recipe.toml", recipe.to_toml())
            result = _made(cell, recipe, materials(), report, stop_requested)
            _write(cell.folder / "result.json", json.dumps(result, indent=1))
        for name in ("last.pt", "best.pt"):
            (cell.folder / name).unlink(missing_ok=True)
        if result["failed"]:
            raise Diverged(result["failed"])
        for name in unscored(cell, sets):
            report({"kind": "scoring", "set": name})
            score(cell, recipe, name, sets[name], materials(), pairs(sets[name]), stop_requested)


def _made(
    cell: Cell,
    recipe: Recipe,
    materials: Materials,
    report: Report,
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """Make the student, and say how it went."""
    device = device_for(recipe).type
    result: dict[str, Any] = {"failed": "", "device": device, "versions": versions()}
    if cell.method.kind == "calibrated":
        save_student(recipe, _calibrated(cell, recipe, materials), _student_file(cell))
    if cell.method.kind != "trained":
        return result
    checkpoint = cell.folder / "last.pt"
    with EventLog(cell.folder / "events.jsonl") as log:
        clock = StepClock(stop_requested)

        def tell(event: dict[str, Any]) -> None:
            event = clock.timed(event)
            log(event)
            report(event)

        try:
            trained = train_student(
                recipe, materials, cell.folder, report=tell, stop_requested=clock
            )
        except Diverged as error:
            return result | {"failed": str(error).partition(";")[0]}
        save_student(recipe, trained.student, _student_file(cell))
        log({"kind": "done"})
    result["remark"] = trained.remark
    events = read_events(cell.folder / "events.jsonl")
    record = record_of(events)
    if record is not None:
        result |= {"mean_weight": record.mean, "weight_deviation": record.deviation}
    return result | cost_of(events) | {"data_order": _data_order(checkpoint)}


def _student_file(cell: Cell) -> Path:
    return cell.folder / "student.safetensors"


def _calibrated(cell: Cell, recipe: Recipe, materials: Materials) -> nn.Module:
    """The student in integers without training; a fresh one after its training in float."""
    assert recipe.quant is not None
    student = materials.student
    for name in requirements(cell.method, cell.base):
        source = folder_of(cell.comparison, cell.seed, name) / "student.safetensors"
        if not source.is_file():
            raise SparkirError(f"{name} did not finish, whose student {cell.method.name} takes")
        student = load_student(source)[0].to(device_for(recipe))
    return quantize_student(student, recipe.quant, materials.crops)


def _data_order(checkpoint: Path) -> str:
    """Where the sampler ended: equal for trainings that saw the same crops in the same order."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["sampler"]
    where = {key: state[key] for key in ("images", "epoch", "position", "rng")}
    return hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()


def score(
    cell: Cell,
    recipe: Recipe,
    name: str,
    where: str,
    materials: Materials,
    pairs: PairStore,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Measure the cell on every image of a test set, and write it down.

    That a student computes as it was trained is checked on the recipe's own set alone.

    Raises:
        Interrupted: `stop_requested` said so; nothing of this set was written.
    """
    convention, lpips = convention_of(recipe), find_lpips()
    contenders = _contenders(cell, recipe, materials)
    if where != recipe.data.test:
        contenders = contenders[-1:]
    scores = {
        contender.arithmetic or "none": [
            asdict(one)
            for one in evaluate(
                _stoppable(contender.restorer, stop_requested),
                pairs,
                convention,
                lpips=lpips.metric,
            )
        ]
        for contender in contenders
    }
    values = {
        "method": cell.method.name,
        "seed": cell.seed,
        "set": name,
        "where": where,
        "content": pairs.content,
        "convention": convention.label,
        "lpips": lpips.words if lpips.metric else "",
        "scores": scores,
    }
    _write(cell.folder / "scores" / f"{name}.json", json.dumps(values, indent=1))


def _stoppable(restorer: Restorer | nn.Module, stop_requested: Callable[[], bool]) -> Restorer:
    """The same, but for the wish to stop: an image can take as long as many steps."""
    run = partial(restore_image, restorer) if isinstance(restorer, nn.Module) else restorer

    def restored(lq: np.ndarray) -> np.ndarray:
        if stop_requested():
            raise Interrupted
        return run(lq)

    return restored


def _contenders(cell: Cell, recipe: Recipe, materials: Materials) -> list[Contender]:
    if cell.method.kind == "input":
        return baselines(changed(recipe, baselines=["degraded"]), materials)
    if cell.method.kind == "teacher":
        return baselines(changed(recipe, baselines=["teacher"]), materials)
    student = load_student(_student_file(cell))[0].to(device_for(recipe))
    trained = Trained(name=cell.method.label, student=student, weighting=Constant())
    return trained_contenders(recipe, trained)


def images_of(scores: Mapping[str, Any], arithmetic: str) -> list[ImageScore]:
    """The scores of one arithmetic; none if it was not measured."""
    return [ImageScore(**one) for one in scores["scores"].get(arithmetic, [])]
