"""What the smaller commands do: open any model, evaluate, restore, export, bench, check."""

from __future__ import annotations

import json
import pickle
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

from sparkir.assemble import (
    Report,
    build_network,
    convention,
    convention_of,
    folder_of,
    gather,
    load_student,
    network_hash,
    open_pairs,
    quantize_student,
    require_channels,
)
from sparkir.data.catalog import known_set
from sparkir.data.codec import one_line
from sparkir.data.inventory import recognise, take_inventory
from sparkir.data.layouts import holds_pairs
from sparkir.data.pairs import PairStore
from sparkir.deploy.bench import fitting, measure, require_sizes
from sparkir.deploy.card import Card, read_card
from sparkir.deploy.contenders import (
    Contender,
    executorch_contender,
    float_contenders,
    installed,
    integer_contenders,
    missing,
    torch_contenders,
)
from sparkir.deploy.onnx import require_onnx, to_float_onnx, to_onnx, write_model
from sparkir.deploy.results import Benchmark, Plan
from sparkir.deploy.runtime import RuntimeNetwork
from sparkir.deploy.session import TITLES, cannot_compute
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import device_of, evaluating
from sparkir.evaluate.metrics import Convention
from sparkir.export import export_onnx, measured_words, require_no_other_card
from sparkir.measure import parity_images
from sparkir.models.facts import ModelFacts, facts_of
from sparkir.models.registry import available, build
from sparkir.models.spandrel import SPANDREL
from sparkir.quant.prepare import placement_of
from sparkir.quant.reference import freeze
from sparkir.recipe import Data, Network, Recipe, from_values, load, with_overrides
from sparkir.restore.memory import is_allocation_failure
from sparkir.restore.network import Restorer, runtime_for

_EXPORTS = {"onnx": ".onnx", "executorch": ".pte"}
_SPACES: dict[str, Literal["y", "rgb", "grey"]] = {"y": "y", "rgb": "rgb", "grey": "grey"}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that can restore images."""

    network: nn.Module
    label: str
    recipe: Recipe | None = None
    """How it was trained, when it says so."""


def open_model(
    name: str, weights: Path | None = None, options: Mapping[str, Any] | None = None
) -> Opened:
    """Open a run folder, a student's .safetensors, an exported .onnx, or a network by name.

    A run folder gives its exported file if there is one; a file is executed by the runtime that it
    was made for, if that is installed. Quantized students become their integer networks.

    Raises:
        SparkirError: nothing of the kind is there, or it is damaged.
    """
    path = Path(name)
    is_file = path.exists() or path.suffix in (".onnx", ".safetensors", ".pth", ".pt")
    if name in available() or not is_file:
        return _open_by_name(name, weights, options or {})
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix not in (".onnx", ".safetensors"):
        raise SparkirError(
            f"{path} does not say which network it is; give the network's name and --weights "
            f"{path}, or, if it was exported, let its name end in .onnx"
        )
    if weights is not None or options:
        raise SparkirError(f"{path} has its own weights; leave out --weights and --option")
    if path.is_dir():
        return _open_run(path)
    if suffix == ".onnx":
        runtime = runtime_for(path)
        network = RuntimeNetwork(path, runtime=runtime)
        label = f"{path} in {TITLES[runtime]}"
        return Opened(network=network, label=label, recipe=_recipe_of(network.card))
    student, recipe = load_student(path)
    if recipe.quant is not None:
        student = freeze(cast("GraphModule", student))
    return Opened(network=student, label=f"{path}", recipe=recipe)


def _recipe_of(card: Card | None) -> Recipe | None:
    """The recipe that a card carries; None without one, or of a version that has other keys."""
    with suppress(SparkirError, tomllib.TOMLDecodeError):
        if card is not None and card.training:
            return from_values(tomllib.loads(card.training), "the card")
    return None


def _open_run(folder: Path) -> Opened:
    """The exported file if there is one, to be measured as the run's recipe says."""
    student = finished_student(folder)
    if not (folder / "student.onnx").is_file():
        return open_model(str(student))
    return replace(open_model(str(folder / "student.onnx")), recipe=load(folder / "recipe.toml"))


def finished_student(folder: Path) -> Path:
    """The student's file in a run folder.

    Raises:
        SparkirError: it is no run folder, or the run is not finished.
    """
    if not (folder / "recipe.toml").is_file():
        raise SparkirError(f"{folder} is no run folder; give what `sparkir distill` wrote to")
    if not (folder / "student.safetensors").is_file():
        raise SparkirError(f"the run in {folder} is not finished; finish it with --resume")
    return folder / "student.safetensors"


def _open_by_name(name: str, weights: Path | None, options: Mapping[str, Any]) -> Opened:
    known = name in available() or ":" in name or name == SPANDREL
    if known and weights is None and ":" not in name:
        raise SparkirError(f"the network {name} has no weights yet; add --weights FILE")
    choice = Network(model=name, options=dict(options), weights=str(weights or ""))
    try:
        network = build_network(choice)
    except SparkirError as error:
        if known:
            raise
        raise SparkirError(f"there is no run or file {name}, and {error}") from error
    label = facts_of(network).name if name == SPANDREL else name
    return Opened(network=network.eval(), label=f"{label} with {weights}" if weights else label)


def evaluation_setup(
    opened: Opened,
    where: str,
    metric: str | None,
    report: Report,
    overrides: Sequence[str] = (),
) -> tuple[PairStore, Convention]:
    """The pairs in `where` for this model, and how to measure.

    A folder of pairs is taken as such; any other holds clean images, which are degraded as the
    model's recipe says, or bicubically by its scale. `overrides` such as `data.test_sigma=50`
    change that.
    """
    facts = facts_of(opened.network)
    if metric not in (None, *_SPACES):
        raise SparkirError(f"--metric {metric!r}: choose y, rgb or grey")
    enlarges = facts.scale > 1
    data = opened.recipe.data if opened.recipe else Data(train=where, test=where)
    if holds_pairs(folder_of(where, "test")):
        data = data.as_pairs()
    elif opened.recipe is None:
        data = data.model_copy(update={"degradation": "bicubic" if enlarges else "pairs"})
    data = with_overrides(data.model_copy(update={"scale": facts.scale}), overrides)
    require_channels(data, facts)
    usual = "y" if enlarges else "grey" if data.channels == 1 else "rgb"
    space = metric or (opened.recipe.metric if opened.recipe else usual)
    return open_pairs(data, where, report), convention(_SPACES[space], facts.scale)


def restorer_of(opened: Opened) -> Restorer:
    """An opened model as a function of pixels, on the device of its weights."""
    network = opened.network
    device = device_of(network)

    def run(lq: np.ndarray) -> np.ndarray:
        try:
            with evaluating(network), torch.inference_mode():
                restored: torch.Tensor = network(torch.from_numpy(lq).to(device))
                return restored.float().cpu().numpy()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_allocation_failure(error):
                raise
            raise cannot_compute(opened.label, lq.shape, error) from error

    return Restorer(
        facts=facts_of(network), run=run, label=opened.label, identity=network_hash(network)
    )


def export_run(
    folder: Path,
    to: str,
    file: Path | None,
    data: str | None,
    report: Report,
    *,
    allow_mismatch: bool = False,
) -> tuple[Path, list[str]]:
    """Export the student of a finished run, checked on the recipe's test images or `data`.

    Returns the file, and what is to be said of it, a line each.

    Raises:
        SparkirError: no such format, no finished run, a float student, or the file would show
            other pixels than the integer network.
    """
    if to not in _EXPORTS:
        raise SparkirError(f"no export format {to!r}; known: {', '.join(_EXPORTS)}")
    student, recipe = load_student(finished_student(folder))
    if recipe.quant is None:
        raise SparkirError(f"the student in {folder} is in floating point; export is for integers")
    path = file or folder / f"student{_EXPORTS[to]}"
    if path.suffix != _EXPORTS[to] or path.is_dir():
        raise SparkirError(f"{path} is no name for this format; give a file *{_EXPORTS[to]}")
    if to == "onnx":
        require_no_other_card(path)
    metrics = _measured_before(folder, recipe.data.test)
    pairs = open_pairs(recipe.data, data or recipe.data.test, report)
    frozen = freeze(cast("GraphModule", student))
    images = parity_images(pairs, frozen)
    if to == "executorch":
        return path, _export_program(frozen, recipe, images, path, allow_mismatch=allow_mismatch)
    exported = export_onnx(frozen, recipe, images, allow_mismatch=allow_mismatch)
    card = exported.measured(metrics).write(path)
    said = [exported.parity.summary(), f"how each layer is stored and run: {card}"]
    if exported.card.differs:
        said.append(f"it is NOT what was trained: {exported.card.differs}")
    return path, said


def _export_program(
    frozen: GraphModule,
    recipe: Recipe,
    images: list[torch.Tensor],
    path: Path,
    *,
    allow_mismatch: bool,
) -> list[str]:
    """Make and check an ExecuTorch program, and write it."""
    from sparkir.deploy.executorch import to_executorch, write_program
    from sparkir.deploy.mobile_parity import check_mobile_parity, require_mobile_parity

    words = {"recipe": recipe.name, "training": recipe.to_toml()}
    words |= {"licence": recipe.data.licence} if recipe.data.licence else {}
    program = to_executorch(frozen, words)
    parity = check_mobile_parity(program, frozen, images)
    if not allow_mismatch:
        require_mobile_parity(parity)
    said = parity.summary().splitlines()
    if parity.failures:
        differs = "; ".join(parity.failures[:3])
        program = to_executorch(frozen, words | {"differs": differs})
        said.append(f"it is NOT what was trained: {differs}")
    write_program(program, path)
    return said


def _measured_before(folder: Path, tested: str) -> str:
    """What the run's report says of the exported file, if there is one."""
    report = folder / "report.json"
    if not report.is_file():
        return ""
    try:
        values = json.loads(report.read_text("utf-8"))
        rows = [row for row in values["rows"] if row["arithmetic"] == "runtime"]
        if not rows:
            return ""
        psnr_db, ssim = rows[-1]["psnr_db"], rows[-1]["ssim"]
        psnr_db = float("inf") if psnr_db is None else psnr_db  # which JSON has not
        images = len(rows[-1]["scores"])
        return measured_words(psnr_db, ssim, values["convention"], images, tested)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SparkirError(
            f"{report} is damaged ({one_line(error)}); delete it to export without its figures"
        ) from error


def bench_model(model: str, plan: Plan, report: Report) -> Benchmark:
    """Measure a model and its float twin in every runtime that is here.

    The twin is the float network that the student's recipe names, in its initial weights: values
    do not change how long it takes. An exported file alone has no recipe, and so no twin.

    Raises:
        SparkirError: it is no run folder, student or exported file, is not finished or damaged, or
            cannot take images of a size in the plan.
    """
    material = _benchable(Path(model))
    plan = fitting(plan, material.facts)
    require_sizes(plan.sizes_px, material.facts)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        try:
            contenders, absent = _contenders(material, plan, Path(folder))
            rows = measure(contenders, material.facts, plan, report)
        finally:
            torch.set_num_threads(threads)
    return Benchmark(model=model, plan=plan, rows=rows, absent=absent + missing())


@dataclass(frozen=True, kw_only=True)
class _Benchable:
    """What a benchmark can be made of."""

    facts: ModelFacts
    twin: nn.Module | None = None
    """The network in floating point."""
    frozen: GraphModule | None = None
    """The integer network."""
    exported: Path | None = None
    """An .onnx that is there already."""


def _benchable(path: Path) -> _Benchable:
    if path.is_dir():
        exported = path / "student.onnx"
        found = _benchable(finished_student(path))
        return replace(found, exported=exported if exported.is_file() else None)
    if path.suffix == ".onnx":
        return _Benchable(facts=_card_of(path).facts, exported=path)
    if path.suffix != ".safetensors":
        raise SparkirError(
            f"bench takes a run folder, a student .safetensors or an exported .onnx, and {path} "
            "is none; check the path"
        )
    student, recipe = load_student(path)
    if recipe.quant is None:
        return _Benchable(facts=facts_of(student), twin=student)
    twin = build(recipe.student.model, **recipe.student.options).eval()
    return _Benchable(facts=facts_of(twin), twin=twin, frozen=freeze(cast("GraphModule", student)))


def _card_of(path: Path) -> Card:
    """What an exported file says of itself, whichever runtime is here."""
    require_onnx()
    import onnx

    if not path.is_file():
        raise SparkirError(f"no file {path}; check the path")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own, which is no public name
        raise SparkirError(f"{path} is no ONNX file, or is damaged: {error}") from error
    return read_card({entry.key: entry.value for entry in model.metadata_props}, str(path))


def _contenders(
    material: _Benchable, plan: Plan, folder: Path
) -> tuple[list[Contender], list[str]]:
    """Everything that can take part, and what cannot."""
    contenders: list[Contender] = []
    absent: list[str] = []
    if material.twin is not None:
        contenders += torch_contenders(_saved(material.twin, folder / "twin.pt"))
    else:
        absent.append("the float twin and ExecuTorch (give the run folder instead of its .onnx)")
    try:
        contenders += _onnx_contenders(material, folder)
    except SparkirError as error:
        absent.append(f"ONNX files ({error})")
    if material.frozen is not None and installed("executorch"):
        contenders += [executorch_contender(material.frozen, s, folder) for s in plan.sizes_px]
    return contenders, absent


def _saved(network: nn.Module, file: Path) -> Path:
    try:
        torch.save(network, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        name = facts_of(network).name
        raise SparkirError(f"{name} cannot be pickled for a child process: {error}") from error
    return file


def _onnx_contenders(material: _Benchable, folder: Path) -> list[Contender]:
    found: list[Contender] = []
    if material.twin is not None:
        write_model(to_float_onnx(material.twin), folder / "twin.onnx")
        found += float_contenders(folder / "twin.onnx")
    exported = material.exported
    if exported is None and material.frozen is not None:
        exported = folder / "student.onnx"
        write_model(to_onnx(material.frozen), exported)
    if exported is None:
        return found
    card = _card_of(exported)
    is_float = card.quantization == "float"
    return found + (float_contenders(exported) if is_float else integer_contenders(exported, card))


def check_folder(folder: Path, name: str | None) -> tuple[list[str], bool]:
    """What of a known set a folder holds, a line each, and whether all that is there is whole.

    Raises:
        SparkirError: no such folder or set, or the folder does not tell which set it is.
    """
    if not folder.is_dir():
        raise SparkirError(f"no folder {folder}; check the path")
    known = recognise(folder) if name is None else known_set(name)
    found = take_inventory(folder, known)
    lines = [f"{known.name}, for {known.task}", *(one.line() for one in found)]
    lines += [f"from {known.source}", f"terms: {known.terms}"]
    if known.notes:
        lines.append(f"note: {known.notes}")
    return lines, not any(one.problems for one in found)


def check_recipe(recipe: Recipe, report: Report) -> list[str]:
    """Everything short of training: what was found, one line each.

    Raises:
        SparkirError: the first thing that would have stopped the run.
    """
    materials = gather(recipe, report)
    findings = [
        f"training images: {len(materials.train)}, test images: {len(materials.test)}, "
        f"x{materials.train.scale}; measured as {convention_of(recipe).label}"
    ]
    for role, network in (("teacher", materials.teacher), ("student", materials.student)):
        if network is not None:
            count = sum(p.numel() for p in network.parameters())
            findings.append(f"{role}: {facts_of(network).name}, {count:,} parameters")
    if recipe.quant is not None:
        placement = placement_of(
            quantize_student(
                materials.student, replace(recipe.quant, equalize=False), materials.crops[:1]
            )
        )
        findings.append(f"quantized to {recipe.quant.label}: {len(placement.layers)} layers")
        for bits in dict.fromkeys(placement.layers.values()):
            named = [name for name, of_it in placement.layers.items() if of_it == bits]
            findings.append("W{}A{}: {}".format(*bits, ", ".join(named)))
        findings += [
            f"left in float: {name} ({why})" for name, why in placement.left_in_float.items()
        ]
    return findings
