"""A recipe becomes a run: the story from top to bottom.

data -> teacher -> student -> losses and weighting -> training -> integer network -> files, table
and picture.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from sparkir.assemble import (
    Materials,
    calibrate_student,
    convention_of,
    gather,
    network_hash,
    rounds_compiled,
    save_student,
    silent,
    task_of,
    trains_in_bfloat16,
    weighting_of,
)
from sparkir.data.ahead import SampledAhead
from sparkir.data.atomic import atomic_file, held, is_partial, remove_partials
from sparkir.data.codec import one_line
from sparkir.data.images import write_png
from sparkir.data.outputs import OutputStore
from sparkir.data.pairs import PatchSampler
from sparkir.deploy.parity import Parity
from sparkir.distill.methods import title
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import Share, evaluate, joined, mean
from sparkir.evaluate.infer import device_of
from sparkir.evaluate.metrics import Convention
from sparkir.export import Exported, export_onnx, measured_words, require_exporters
from sparkir.measure import (
    baselines,
    comparison,
    measure,
    parity_images,
    runtime_contender,
    trained_contenders,
)
from sparkir.quant.fused import require_compiler
from sparkir.quant.prepare import prepare
from sparkir.quant.quantizer import leave_in_float
from sparkir.quant.reference import freeze
from sparkir.recipe import Recipe, WeightingChoice, differences, load
from sparkir.report.events import EventLog, to_json, training_folder
from sparkir.report.table import Row, to_markdown
from sparkir.spark.weighting import Weighting
from sparkir.teacher import teacher_outputs
from sparkir.train.distribute import Devices
from sparkir.train.loop import LoopSettings, Report, train
from sparkir.train.optimize import build_average, build_optimizer
from sparkir.train.state import TrainState

_LOCK = ".lock"
"""Held by the process that works in a run folder, and never replaced."""
LARGEST_PSNR_CHANGE_DB = 0.02
"""Between the network as trained and the file as executed."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One method's result."""

    name: str
    """What tables call the method."""
    student: nn.Module
    """The moving average if the recipe keeps one, else the last student; evaluation mode."""
    weighting: Weighting
    remark: str = ""
    """What its name does not say of the method, such as which encoder it used."""


def train_student(
    recipe: Recipe,
    materials: Materials,
    folder: Path,
    *,
    report: Report = silent,
    stop_requested: Callable[[], bool] = lambda: False,
    devices: Devices | None = None,
) -> Trained:
    """Train one student in `folder`, going on from its checkpoint if there is one.

    Where several processes share the batches, all call this and get the same student; the first
    one reads and writes the checkpoint.

    Raises:
        SparkirError: training diverged, or the disk is full; the last checkpoint stays.
        Interrupted: `stop_requested` said so.
    """
    name, devices = method_name(recipe), devices or Devices()
    task, state = training_of(recipe, materials, report, devices=devices)
    report({"kind": "stage", "name": f"train {name}", "steps": recipe.train.steps})
    remark = task.method.describe()
    if remark:
        report({"kind": "method", "remark": remark})
    checkpoint = folder / "last.pt"
    if devices.first and checkpoint.exists():
        state.load(checkpoint)
        report({"kind": "resumed", "step": state.step})
    devices.agree(state)
    _leave_in_float(state, on=state.step < recipe.train.float_steps)
    train(
        task,
        state,
        loop_settings(recipe, device_of(state.student)),
        checkpoint=checkpoint,
        evaluate=lambda network: _validated_db(network, recipe, materials, devices),
        report=report,
        stop_requested=stop_requested,
        begin_rounding=lambda: _begin_rounding(state, recipe, materials),
        devices=devices,
    )
    result = state.student if state.average is None else state.average.module
    weighting = task.weighting.eval()
    return Trained(name=name, student=result.eval(), weighting=weighting, remark=remark)


def _leave_in_float(state: TrainState, *, on: bool) -> None:
    leave_in_float(state.student, on=on)
    leave_in_float(state.method, on=on)  # what it keeps of the student
    if state.average is not None:
        leave_in_float(state.average.module, on=on)


def _begin_rounding(state: TrainState, recipe: Recipe, materials: Materials) -> None:
    """Set the grids to what the student has become."""
    assert recipe.quant is not None
    calibrate_student(state.student, recipe.quant, materials.crops)
    if recipe.quant.equalize:
        state.optimizer.state.clear()  # its averages are of gradients by weights of another scale
    state.average = build_average(state.student, recipe.train.ema)  # of what it is now
    state.best = {}  # what was best is no student of this kind
    state.method.begin_rounding()
    _leave_in_float(state, on=False)


def training_of(
    recipe: Recipe,
    materials: Materials,
    report: Report = silent,
    *,
    outputs: OutputStore | None = None,
    devices: Devices | None = None,
) -> tuple[DistillationTask, TrainState]:
    """A student's losses and all that training changes, before the first step.

    `outputs` are what the teacher makes of the training images; unless they are given, the recipe
    says whether to compute them now. Of each batch, `devices` take their shares.
    """
    devices = devices or Devices()
    if recipe.train.float_steps and devices.ranks > 1:
        raise SparkirError(
            "train.float_steps is for one process; train the student in floating point first (a "
            "recipe without [quant]) and give its file as student.weights"
        )
    torch.manual_seed(recipe.seed)
    student = copy.deepcopy(materials.student)
    if recipe.quant is not None:
        student = prepare(student, recipe.quant)
        if recipe.train.float_steps:
            leave_in_float(student, on=True)  # its grids are set when rounding begins
        else:
            calibrate_student(student, recipe.quant, materials.crops)
        if recipe.train.compile is True:
            require_compiler(device_of(student))
    if _channels_last(recipe, device_of(student)):
        # What it computes takes the layout of its weights.
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = weighting_of(recipe.weighting).to(device_of(student))
    task = task_of(recipe, student, source, materials)
    if outputs is None:
        shown = bool(task.method.teacher_taps)
        with devices.in_turn():
            outputs = teacher_outputs(recipe, materials, report, features=shown)
    sampler = PatchSampler(
        materials.train,
        patch_px=recipe.data.patch_px,
        batch=recipe.data.batch,
        seed=recipe.seed,
        outputs=outputs,
        rank=devices.rank,
        ranks=devices.ranks,
    )
    on_gpu = device_of(student).type == "cuda"
    state = TrainState(
        student=student,
        weighting=source,
        method=task.method,
        optimizer=_optimizer(recipe, task),
        sampler=SampledAhead(sampler) if on_gpu else sampler,
        average=build_average(student, recipe.train.ema),
        began_with=_hashes(materials),
    )
    return task, state


def _hashes(materials: Materials) -> dict[str, str]:
    """By which a run knows the networks that it began with."""
    networks = {"student": materials.student, "teacher": materials.teacher}
    return {role: network_hash(n) for role, n in networks.items() if n is not None}


def _validated_db(
    network: nn.Module, recipe: Recipe, materials: Materials, devices: Devices
) -> float:
    """Mean PSNR on the test images, of which each process takes its share."""
    share = Share(materials.test, devices.rank, devices.ranks)
    scores = evaluate(network, share, convention_of(recipe)) if len(share) else []
    return mean(joined(devices.gather(scores))).psnr_db


def _optimizer(recipe: Recipe, task: DistillationTask) -> torch.optim.Optimizer:
    return build_optimizer(
        task.student,
        name=recipe.train.optimizer,
        learning_rate=recipe.train.learning_rate,
        grid_learning_rate=recipe.train.grid_learning_rate,
        weight_decay=recipe.train.weight_decay,
        beside=task.method.parameters(),
    )


def loop_settings(recipe: Recipe, device: torch.device) -> LoopSettings:
    """What the recipe says to the loop, on this device."""
    settings = recipe.train
    return LoopSettings(
        steps=settings.steps,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip_norm=settings.clip_norm,
        float_steps=settings.float_steps,
        bfloat16=trains_in_bfloat16(recipe, device),
        compiled=rounds_compiled(recipe, device),
        recorded=settings.cuda_graphs and device.type == "cuda",
        log_every=settings.log_every,
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
    )


def _channels_last(recipe: Recipe, device: torch.device) -> bool:
    chosen = recipe.train.channels_last
    return trains_in_bfloat16(recipe, device) if chosen == "auto" else chosen


def method_name(recipe: Recipe) -> str:
    """What the recipe's own method is called in tables."""
    if recipe.distill is None:
        return "float" if recipe.quant is None else "QAT"
    method, weighting = recipe.distill.method, recipe.weighting.name
    student = "float" if recipe.quant is None else "QAT"
    loss = title(method) + (" to truth" if recipe.distill.target == "truth" else "")
    if weighting.startswith("spark"):
        name = "SPARK" if weighting == "spark" else "SPARK (paper)"
        return name if loss == title("kd") else f"{name} on {loss}"
    return f"{student} + {loss}" + ("" if weighting == "uniform" else f", {weighting}")


def qat_only(recipe: Recipe) -> Recipe:
    """The same run without a teacher's help: the baseline of every distillation."""
    return recipe.model_copy(update={"distill": None, "weighting": WeightingChoice()})


# The whole run -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run made."""

    folder: Path
    rows: list[Row]
    convention: Convention
    files: dict[str, Path]
    """What each file is -> where it is."""
    parity: Parity | None
    """None for a run in floating point."""
    remark: str = ""
    """What the name of the recipe's method does not say."""
    deviating: str = ""
    """On which test images the exported file shows other values; empty where on none."""

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the report, without a title among the notebook's own."""
        return self.files["table"].read_text("utf-8").partition("\n\n")[2]


def distill(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    report: Report = silent,
    stop_requested: Callable[[], bool] = lambda: False,
    devices: Devices | None = None,
) -> Outcome:
    """Carry out a recipe in `folder`, or go on with what an earlier call began there.

    Of several processes that share the batches, the first calls this, the others `assist`.

    Raises:
        SparkirError: something the user can mend; whatever was trained stays in the folder, and
            if that is nothing, there is no folder.
        Interrupted: `stop_requested` said so; call again with `resume`.
    """
    devices = devices or Devices()
    if recipe.quant is not None:
        require_exporters(recipe.quant.runs_on.runtime)
    with ExitStack() as held:
        with devices.in_turn():
            devices.require_shares(recipe.data.batch)
            held.enter_context(_claimed(folder, recipe, resume=resume))
            log = held.enter_context(EventLog(folder / "events.jsonl"))

            def tell(event: dict[str, Any]) -> None:
                if event["kind"] not in ("decoding", "teacher"):  # one for each image
                    log(event)
                report(event)

            start = {"kind": "start", "recipe": recipe.name, "versions": versions()}
            tell(start | {"processes": devices.ranks})
            materials = gather(recipe, tell)
        trained = _train_methods(recipe, materials, folder, tell, stop_requested, devices)
        return _finish(recipe, materials, trained, folder, tell)


def assist(
    recipe: Recipe,
    *,
    report: Report = silent,
    stop_requested: Callable[[], bool] = lambda: False,
    devices: Devices,
) -> None:
    """Do the part of `distill` that falls to every process but the first; write nothing.

    Of the events, only which stage it is gets to `report`.

    Raises:
        SystemExit: the first process stops for an error, and says it.
        Interrupted: some process's `stop_requested` said so.
    """

    def tell(event: dict[str, Any]) -> None:
        if event["kind"] == "stage":
            report(event)

    with devices.in_turn():
        devices.require_shares(recipe.data.batch)
        materials = gather(recipe)
    nowhere = Path()  # only the first process reads and writes
    _train_methods(recipe, materials, nowhere, tell, stop_requested, devices)


@contextmanager
def _claimed(folder: Path, recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Hold `folder` for a recipe; a new run that ends before its first checkpoint leaves nothing.

    So that a mistake found on the way can be mended and the same command given again.
    """
    try:
        existed, claimed = folder.exists(), False
    except OSError as error:  # a name too long
        raise _not_writable(folder, error) from error
    if resume:
        claim(folder, recipe, resume=True)
    with _alone(folder):
        if resume:
            remove_partials(folder)
        try:
            if not resume:
                claim(folder, recipe, resume=False)
                claimed = True
            yield
        except BaseException:
            if not resume and not (folder / "training").exists():
                made = ("events.jsonl", "recipe.toml") if claimed else ()
                for name in (*made, _LOCK):
                    (folder / name).unlink(missing_ok=True)
                if not existed:
                    with suppress(OSError):  # somebody else put a file there
                        folder.rmdir()
            raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder`, which is made if it is not there."""
    if folder.is_file():
        raise SparkirError(f"{folder} is a file; choose a folder for --out")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder / _LOCK, wait=False))
        except BlockingIOError as error:
            raise SparkirError(
                f"another process is at work in {folder}; wait for it, or stop it"
            ) from error
        except OSError as error:
            raise _not_writable(folder, error) from error
        yield


def _not_writable(folder: Path, error: OSError) -> SparkirError:
    return SparkirError(f"cannot write to {folder}: {one_line(error)}; choose another --out")


def claim(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Make `folder` this recipe's own, or check that it already is.

    Raises:
        SparkirError: it holds a run and `resume` is false, or holds none and `resume` is true, or
            the recipe has changed; the message shows how.
    """
    written = folder / "recipe.toml"
    if resume:
        if not written.is_file():
            raise SparkirError(f"{folder} holds no run to resume; leave out --resume to start one")
        changed = differences(load(written), recipe)
        if changed:
            raise SparkirError(
                f"the recipe differs from the run in {folder}: {'; '.join(changed)}. "
                "Resume with the old values, or start a new run with another --out"
            )
        return
    try:
        if written.is_file():
            raise SparkirError(
                f"{folder} already holds a run; go on with --resume, or choose another --out"
            )
        if folder.is_file():
            raise SparkirError(f"{folder} is a file; choose a folder for --out")
        found = folder.iterdir() if folder.is_dir() else ()
        if any(path.name != _LOCK and not is_partial(path) for path in found):
            raise SparkirError(f"{folder} is not empty and holds no run; choose another --out")
        with atomic_file(written) as file:
            file.write(recipe.to_toml().encode())
    except UnicodeEncodeError as error:
        raise SparkirError(
            f"a path of the recipe is not UTF-8 ({error.object[error.start : error.end]!a}), "
            "and cannot be written down; rename that folder"
        ) from error
    except OSError as error:
        raise _not_writable(folder, error) from error


def versions() -> dict[str, str]:
    """What this run is computed by."""
    names = ("sparkir", "torch", "numpy", "onnxruntime")
    found = {name: _version(name) for name in names}
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _train_methods(
    recipe: Recipe,
    materials: Materials,
    folder: Path,
    report: Report,
    stop_requested: Callable[[], bool],
    devices: Devices,
) -> list[Trained]:
    """The baseline that needs training, then, last, the recipe's own student."""
    wanted = "qat" in recipe.baselines and recipe.distill is not None  # else it is the recipe
    variants = [qat_only(recipe)] if wanted else []
    if wanted and recipe.train.teacher_cache:
        _compute_teacher_outputs(recipe, materials, report, devices)
    trained = []
    for variant in [*variants, recipe]:
        name = method_name(variant)
        where = folder / "training" / training_folder(name)
        trained.append(
            train_student(
                variant,
                materials,
                where,
                report=report,
                stop_requested=stop_requested,
                devices=devices,
            )
        )
    return trained


def _compute_teacher_outputs(
    recipe: Recipe, materials: Materials, report: Report, devices: Devices
) -> None:
    """Make the cache, or find that it has no room, before hours go into a baseline."""

    def tell(event: dict[str, Any]) -> None:
        if event["kind"] != "warning":  # comes again with the training that it is about
            report(event)

    task = task_of(recipe, materials.student, weighting_of(recipe.weighting), materials)
    with devices.in_turn():
        teacher_outputs(recipe, materials, tell, features=bool(task.method.teacher_taps))


def _finish(
    recipe: Recipe,
    materials: Materials,
    trained: list[Trained],
    folder: Path,
    report: Report,
) -> Outcome:
    """Freeze, export, measure and report."""
    own = trained[-1]
    frozen = None if recipe.quant is None else freeze(cast("GraphModule", own.student))
    outcome = Outcome(
        folder=folder,
        rows=[],
        convention=convention_of(recipe),
        files={
            "picture": folder / "comparison.png",
            "table": folder / "report.md",
            "student": folder / "student.safetensors",
            "events": folder / "events.jsonl",
            "recipe": folder / "recipe.toml",
        },
        parity=None,
        remark=own.remark,
    )
    save_student(recipe, own.student, outcome.files["student"])
    contenders = baselines(recipe, materials)
    contenders += [c for method in trained for c in trained_contenders(recipe, method)]
    report({"kind": "stage", "name": "measure", "steps": len(contenders)})
    measured = measure(contenders, materials.test, outcome.convention, report)
    outcome = replace(outcome, rows=[m.row for m in measured])
    if frozen is not None:
        _write_report(outcome, recipe)  # whatever becomes of the file
        report({"kind": "stage", "name": "export", "steps": 1})
        exported = export_onnx(frozen, recipe, parity_images(materials.test, frozen))
        executed = [runtime_contender(recipe, own, exported)]
        measured += measure(executed, materials.test, outcome.convention, report)
        outcome = _exported(outcome, exported, recipe, own.name, measured[-1].row)
    write_png(outcome.files["picture"], comparison(recipe, materials, own, measured))
    _write_report(outcome, recipe)
    report({"kind": "done", "rows": [row.as_values() for row in outcome.rows]})
    return outcome


def _exported(
    outcome: Outcome, exported: Exported, recipe: Recipe, method: str, row: Row
) -> Outcome:
    """Write the file, which restores as well as `row` says, with its card."""
    rows = [*outcome.rows, row]
    _require_same_quality(row, method, rows)
    model, label, count = outcome.folder / "student.onnx", outcome.convention.label, len(row.scores)
    words = measured_words(row.psnr_db, row.ssim, label, count, recipe.data.test)
    card = exported.measured(words).write(model)
    files = dict(outcome.files)
    events = {name: files.pop(name) for name in ("events", "recipe")}  # listed last
    return replace(
        outcome,
        rows=rows,
        files=files | {"ONNX model": model, "model card": card} | events,
        parity=exported.parity,
        deviating=deviating_images(rows),
    )


def _require_same_quality(runtime: Row, method: str, rows: list[Row]) -> None:
    """The exported file must restore as well as the network that was trained.

    Raises:
        SparkirError: it is off by more than `LARGEST_PSNR_CHANGE_DB`.
    """
    training = next(r for r in rows if r.arithmetic == "training" and r.name == runtime.name)
    change = runtime.psnr_db - training.psnr_db
    if abs(change) > LARGEST_PSNR_CHANGE_DB:
        raise SparkirError(
            f"{method} as exported restores {change:+.3f} dB away from the network that was "
            "trained, so no file was exported; please report this with the recipe"
        )


def deviating_images(rows: list[Row]) -> str:
    """Which test images the runtime, the last row, restores otherwise than the integer network.

    The gate executes corners; a rare value elsewhere may spread over a whole image.
    """
    runtime = rows[-1]
    integer = next(r for r in rows if r.arithmetic == "integer" and r.name == runtime.name)
    pairs = list(zip(integer.scores, runtime.scores, strict=True))
    changes = {a.name: b.psnr_db - a.psnr_db for a, b in pairs if a != b}
    if not changes:
        return ""
    largest = max(changes, key=lambda name: abs(changes[name]))
    return (
        f"{len(changes)} of {len(pairs)} test images come out otherwise in the runtime than in the "
        f"integer network, at most by {changes[largest]:+.3f} dB ({largest})"
    )


def _write_report(outcome: Outcome, recipe: Recipe) -> None:
    """report.md for people, report.json for programs."""
    caption = f"{recipe.name}, seed {recipe.seed}. {outcome.convention.label}; SSIM alike."
    parts = [f"# {recipe.name}\n", to_markdown(outcome.rows, caption)]
    if outcome.remark:
        parts.append(f"{outcome.remark}.\n")
    if outcome.parity is not None:
        parts.append(f"Export: {outcome.parity.summary()}.\n")
    if outcome.deviating:
        parts.append(f"{outcome.deviating}.\n")
    write_text(outcome.files["table"], "\n".join(parts))
    values = {
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "convention": outcome.convention.label,
        "rows": [row.as_values() for row in outcome.rows],
        "remark": outcome.remark,
        "export": None if outcome.parity is None else outcome.parity.summary(),
        "deviating": outcome.deviating,
    }
    write_text(outcome.folder / "report.json", to_json(values, indent=1))


def write_text(path: Path, text: str, *, then: str = "go on with --resume") -> None:
    """Write a file whole or not at all.

    Raises:
        SparkirError: it cannot be written; the message says to free some space and `then`.
    """
    try:
        with atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        remedy = "move what is there" if path.is_dir() else "free some space"
        raise SparkirError(
            f"cannot write {path}: {one_line(error)}; {remedy} and {then}"
        ) from error
