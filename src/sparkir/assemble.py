"""From a recipe's words to the objects they name: data, networks, weightings, saved students."""

from __future__ import annotations

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from sparkir.data.catalog import CATALOG
from sparkir.data.codec import one_line
from sparkir.data.degrade import BicubicDownscale, Degradation, GaussianNoise, JpegCompression
from sparkir.data.layouts import Split, clean_images, pair_files, part_of
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.data.photographs import photographs
from sparkir.deploy.parity import SATURATES
from sparkir.deploy.runtime import saturates
from sparkir.distill.method import Setting
from sparkir.distill.methods import method
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import device_of, evaluating
from sparkir.evaluate.metrics import Convention, ssim
from sparkir.models.checkpoint import load_weights, read_metadata, read_weights, save_weights
from sparkir.models.facts import ModelFacts, as_seen, facts_of, smallest_px
from sparkir.models.registry import build
from sparkir.models.spandrel import SPANDREL, recognised
from sparkir.quant.calibrate import calibrate
from sparkir.quant.equalize import equalize
from sparkir.quant.fused import has_compiler
from sparkir.quant.prepare import prepare
from sparkir.quant.spec import QuantSpec
from sparkir.recipe import Data, Network, Recipe, WeightingChoice, from_values, shipped
from sparkir.spark.weighting import ONE_IMAGE, Weighting, options_of, weighting
from sparkir.train.optimize import fast_precision

Report = Callable[[dict[str, Any]], None]
_CALIBRATION_SEED = 7_919
_TRIAL_PX = 24
_OF_A_RUN = re.compile(r"runs/([\w-]+)/student\.safetensors")
_STEPS_WORTH_COMPILING = 2000
"""A start is a quarter of a minute longer with it, and a step shorter by a tenth or more."""


def silent(event: dict[str, Any]) -> None:
    """Report nothing."""


def cache_folder() -> Path:
    """Where decoded images are kept between runs: $SPARKIR_CACHE, or the user's cache."""
    base = os.environ.get("SPARKIR_CACHE") or Path.home() / ".cache" / "sparkir"
    return Path(base).expanduser()


def open_pairs(
    data: Data, where: str, report: Report = silent, *, split: Split = "test"
) -> PairStore:
    """The image pairs of `where`, which is `data.train`, `data.test` or another folder.

    `split` says what they are for: where in a known set's folder they lie, and how test images
    are degraded.
    """

    def progress(done: int, total: int) -> None:
        report({"kind": "decoding", "done": done, "total": total})

    options: dict[str, Any] = {
        "cache": cache_folder(),
        "skip_broken": data.skip_broken,
        "grey": data.channels == 1,
        "progress": progress,
    }
    _require_here(where, split)
    if data.degradation == "pairs":
        files = pair_files(folder_of(where, split), split)
        pairs = PairStore.from_files(files, scale=data.scale, **options)
    else:
        degradation = degradation_of(data.as_tested() if split == "test" else data)
        pairs = PairStore.from_images(_image_paths(where, split), degradation, **options)
    for message in pairs.skipped:
        report({"kind": "warning", "message": message})
    return pairs


def _tested_in_training(train: PairStore, test: PairStore) -> Iterator[str]:
    """What is to be said of test images that are among the training images."""
    trained, tested = ({path.resolve() for path in pairs.sources} for pairs in (train, test))
    if both := sorted(trained & tested):
        yield (
            f"{len(both)} of the {len(tested)} test images are trained on, {both[0]} among them: "
            "what is measured says nothing of other images"
        )


def _image_paths(where: str, split: Split) -> list[Path]:
    scheme, _, part = where.partition(":")
    if scheme == "photographs" and part in ("train", "test"):
        return photographs(cast("Split", part))
    return clean_images(folder_of(where, split))


def _require_here(where: str, split: Split) -> None:
    """Say where a known set is to be had, if it is named and not here."""
    known = next((known for known in CATALOG if known.name == where), None)
    if known is not None and not Path(where).exists():
        raise SparkirError(
            f"there is no folder {where} here; get {known.name} from {known.source} (terms: "
            f"{known.terms}), or take images of your own: give the folder with --data DIR, or "
            f"--set data.{split}=DIR"
        )


def folder_of(where: str, split: Split) -> Path:
    """Where in a folder the images for a purpose lie; the folder itself if that is unknown."""
    folder = Path(where).expanduser()
    return part_of(folder, split) or folder


def degradation_of(data: Data) -> Degradation:
    """What turns a clean image into the network's input."""
    match data.degradation:
        case "bicubic":
            return BicubicDownscale(data.scale, border=data.border)
        case "noise":
            return GaussianNoise(data.sigma)
        case "jpeg":
            return JpegCompression(data.quality)
        case _:
            raise AssertionError(f"{data.degradation} is no degradation")


def convention_of(recipe: Recipe) -> Convention:
    """How this recipe's results are measured."""
    return convention(recipe.metric, recipe.data.scale)


def convention(space: Literal["y", "rgb", "grey"], scale: int) -> Convention:
    """The field's habit: super-resolution on luma leaves a border of `scale` px out."""
    return Convention(space=space, crop_px=scale if space == "y" and scale > 1 else 0)


def build_network(choice: Network) -> nn.Module:
    """A network by name, with its weights if it names any.

    Raises:
        SparkirError: there is no such network, or the weights do not fit it.
    """
    if choice.model == SPANDREL:
        if choice.options:
            raise SparkirError(
                f'"{SPANDREL}" finds the options in the weights; leave out {choice.options}'
            )
        return recognised(weights_path(choice.weights))
    network = build(choice.model, **choice.options)
    if choice.weights:
        load_weights(network, weights_path(choice.weights))
    return network


def weights_path(weights: str) -> Path:
    """A checkpoint's path; `package:NAME` is one that ships."""
    scheme, _, name = weights.partition(":")
    if scheme != "package":
        return Path(weights).expanduser()
    path = Path(str(resources.files("sparkir.models") / "weights" / f"{name}.safetensors"))
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise SparkirError(f"no weights {name!r} ship with sparkir; known: {', '.join(known)}")
    return path


def build_student(recipe: Recipe, teacher: nn.Module | None) -> nn.Module:
    """The float student, the same for every method of one seed."""
    if recipe.student.model == SPANDREL:
        raise SparkirError(
            f'student.model = "{SPANDREL}": what spandrel recognises can teach, but not be '
            "quantized; name a network of `sparkir models`, or a function of yours"
        )
    torch.manual_seed(recipe.seed)
    copied = recipe.student.weights == "teacher"
    own = {"weights": ""} if copied else {}
    student = build_network(recipe.student.model_copy(update=own))
    if copied:
        assert teacher is not None
        try:
            student.load_state_dict(teacher.state_dict())
        except RuntimeError as error:
            raise SparkirError(
                'student.weights = "teacher" needs the teacher\'s architecture and options: '
                + _what_differs(error)
            ) from error
    return student


def quantize_student(student: nn.Module, spec: QuantSpec, crops: list[Tensor]) -> nn.Module:
    """The student with its grids in place, set by `crops` (B, C, H, W) in [0, 1]."""
    prepared = prepare(student, spec)
    calibrate_student(prepared, spec, crops)
    return prepared


def calibrate_student(prepared: nn.Module, spec: QuantSpec, crops: list[Tensor]) -> None:
    """Set the grids of a prepared student, as it is now, by `crops` (B, C, H, W) in [0, 1]."""
    device, facts = device_of(prepared), facts_of(prepared)
    seen = [as_seen(crop.to(device), facts) * facts.value_range for crop in crops]
    if spec.equalize:
        equalize(cast("fx.GraphModule", prepared), seen)
    calibrate(prepared, seen)


def device_for(recipe: Recipe) -> torch.device:
    """Where to train.

    Raises:
        SparkirError: the recipe asks for a GPU and there is none.
    """
    found = torch.cuda.is_available()
    if recipe.train.device == "cuda" and not found:
        raise SparkirError('train.device = "cuda", but torch sees no GPU; use "auto" or "cpu"')
    return torch.device("cuda" if found and recipe.train.device != "cpu" else "cpu")


def trains_in_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether the recipe's training computes in bfloat16 there."""
    chosen = recipe.train.precision
    return chosen == "bfloat16" or (chosen == "auto" and fast_precision(device))


def rounds_compiled(recipe: Recipe, device: torch.device) -> bool:
    """Whether the recipe's training rounds in compiled passes there."""
    if recipe.quant is None:
        return False
    chosen = recipe.train.compile
    return _would_compile(recipe) and has_compiler(device) if chosen == "auto" else chosen


def _would_compile(recipe: Recipe) -> bool:
    """Whether it is left to what is here, and the training is long enough to gain by it."""
    quantized, chosen = recipe.quant is not None, recipe.train.compile
    return quantized and chosen == "auto" and recipe.train.steps >= _STEPS_WORTH_COMPILING


def calibration_crops(pairs: PairStore, recipe: Recipe) -> list[Tensor]:
    """Input crops of the training images, (8, 3, H, W) in [0, 1] each."""
    sampler = PatchSampler(
        pairs, patch_px=recipe.data.patch_px, batch=8, seed=recipe.seed + _CALIBRATION_SEED
    )
    batches = -(-recipe.train.calibration_images // 8)
    return [sampler.next()[0].float() / 255 for _ in range(batches)]


def weighting_of(choice: WeightingChoice) -> Weighting:
    """A source of W.

    Raises:
        SparkirError: it has no such option, or the option's value does not fit.
    """
    weighting(choice.name)  # records were made so: fresh weights are drawn behind those of another
    known = options_of(choice.name)
    for option in choice.options:
        if option not in known:
            raise SparkirError(
                f"weighting {choice.name!r} has no option {option!r}; "
                f"weighting.options may hold: {', '.join(known) or 'nothing'}"
            )
    try:
        return weighting(choice.name, **choice.options)
    except ValueError as error:
        raise SparkirError(
            f"weighting.options = {choice.options} do not fit {choice.name!r}: {error}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What every method of a run shares."""

    train: PairStore
    test: PairStore
    teacher: nn.Module | None
    student: nn.Module
    """In floating point, before quantization."""
    crops: list[Tensor]


def task_of(
    recipe: Recipe, student: nn.Module, source: Weighting, materials: Materials
) -> DistillationTask:
    """The losses of a recipe: its student under its teacher, by its method and weighting.

    Raises:
        SparkirError: the method cannot compare these two networks, or not all through the run.
    """
    if recipe.distill is None:
        return DistillationTask(student, weighting=source)
    assert materials.teacher is not None
    setting = Setting(
        student=student,
        teacher=materials.teacher,
        examples=materials.crops,
        steps=recipe.train.steps,
    )
    choice = recipe.distill
    options = {"encoder": choice.encoder} if choice.encoder else {}
    chosen = method(choice.method, setting, factor=choice.feature_strength, **options)
    scaled_later = recipe.quant is not None and recipe.quant.equalize and recipe.train.float_steps
    if scaled_later and chosen.student_taps:  # a checkpoint does not hold the channels' factors
        raise SparkirError(
            f"distill.method = {choice.method!r} compares features, and train.float_steps would "
            "scale their channels half-way (quant.equalize); set quant.equalize = false, or leave "
            "train.float_steps out and start from trained student.weights"
        )
    return DistillationTask(
        student,
        materials.teacher,
        weighting=source,
        method=chosen,
        norm=choice.norm,
        strength=choice.strength,
        target=choice.target,
    )


def _doubts(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """What a recipe may say, and hardly means."""
    quant, distill = recipe.quant, recipe.distill
    if recipe.train.warmup >= recipe.train.steps:
        yield (
            f"train.warmup = {recipe.train.warmup} of train.steps = {recipe.train.steps}: the "
            "learning rate never gets to train.learning_rate; lower train.warmup"
        )
    if recipe.teacher is not None and not recipe.teacher.weights:
        yield (
            f"teacher.weights is not set: the teacher is as {recipe.teacher.model} returns it, "
            "which should be with its weights"
        )
    if quant is not None and not recipe.student.weights and not recipe.train.float_steps:
        yield (
            "the student starts from fresh weights, and its grids are set to what those compute; "
            "give student.weights, or set train.float_steps"
        )
    if quant is not None and not quant.reduce_range and saturates(quant.runs_on.runtime):
        yield f"{SATURATES}; the file cannot be checked here otherwise"
    if _would_compile(recipe) and not has_compiler(device):
        yield (
            "nothing here compiles, so that training rounds in plain operations, which take "
            "longer; install a C++ compiler such as g++, or Triton for a GPU, or set "
            "train.compile = false"
        )
    if recipe.weighting.name == "spark-paper" and trains_in_bfloat16(recipe, device):
        yield (
            "the reward of spark-paper is what one step changes, which bfloat16 hardly resolves; "
            'set train.precision = "float32"'
        )
    if distill is not None and recipe.weighting.name == "spark" and distill.target == "teacher":
        yield (
            "what the weighting spark does not believe of the teacher is for the truth, and "
            'distill.target = "teacher" gives it to nobody; set distill.target = "both"'
        )
    if distill is not None and recipe.weighting.name == "spark" and distill.norm == "mse":
        yield (
            "the weighting spark was made for a strong loss, and near the truth a squared error "
            'pulls next to nothing; set distill.norm = "matched" and distill.strength = 10.0'
        )
    if distill is not None and recipe.weighting.name == "uniform" and distill.target == "both":
        yield (
            'distill.target = "both" gives the truth what the weighting leaves, and uniform leaves '
            'nothing; choose another weighting, or distill.target = "teacher"'
        )


def gather(recipe: Recipe, report: Report = silent) -> Materials:
    """Build the networks, open the data, and make sure that they fit.

    Raises:
        SparkirError: whatever would stop the run later, as far as it can be known now.
    """
    weighting_of(recipe.weighting)
    if recipe.weighting.name == "spark-paper" and recipe.data.batch == 1:
        raise SparkirError(f"data.batch = 1: {ONE_IMAGE}")
    _require_weights(recipe)
    device = device_for(recipe)
    for message in _doubts(recipe, device):
        report({"kind": "warning", "message": message})
    teacher = None if recipe.teacher is None else build_network(recipe.teacher).eval()
    student = build_student(recipe, teacher).to(device)
    for role, network in (("teacher", teacher), ("student", student)):
        if network is not None:
            _require_fit(role, network.to(device), recipe.data.scale)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise SparkirError(
            f"the student {facts_of(student).name} has no parameter to train; return it from its "
            "function with requires_grad"
        )
    require_channels(recipe.data, facts_of(student), "student")
    _require_alike(student, teacher)
    train_pairs = open_pairs(recipe.data, recipe.data.train, report, split="train")
    test_pairs = open_pairs(recipe.data, recipe.data.test, report)
    for message in _tested_in_training(train_pairs, test_pairs):
        report({"kind": "warning", "message": message})
    require_measurable(test_pairs, convention_of(recipe))
    _require_sizes("student", student, recipe.data.patch_px, test_pairs)
    if teacher is not None:
        measured = test_pairs if "teacher" in recipe.baselines else None
        _require_sizes("teacher", teacher, recipe.data.patch_px, measured)
    materials = Materials(
        train=train_pairs,
        test=test_pairs,
        teacher=teacher,
        student=student,
        crops=calibration_crops(train_pairs, recipe),
    )
    task_of(recipe, student, weighting_of(recipe.weighting), materials)
    return materials


def _require_weights(recipe: Recipe) -> None:
    """Stop now if weights are not there, and say how they come about where that is known."""
    if (
        recipe.teacher is not None
        and not recipe.teacher.weights
        and ":" not in recipe.teacher.model
    ):
        raise SparkirError(
            "the teacher has no weights; set teacher.weights, or give --teacher FILE"
        )
    for role, network in (("teacher", recipe.teacher), ("student", recipe.student)):
        made_by = _OF_A_RUN.fullmatch("" if network is None else network.weights)
        if made_by and made_by[1] in shipped() and not Path(made_by[0]).exists():
            raise SparkirError(
                f"no weights for the {role} at {made_by[0]} yet; make them with "
                f"`sparkir distill {made_by[1]}`, or set {role}.weights"
            )


@torch.no_grad()
def _require_fit(role: str, network: nn.Module, scale: int) -> None:
    """Stop now if the network could not be trained on images of this scale."""
    facts = facts_of(network)
    if facts.scale != scale:
        raise SparkirError(
            f"the {role} restores x{facts.scale}, but the data is x{scale}; "
            f"set {role}.options.scale or data.scale, or choose a network of that scale"
        )
    side = -(-max(_TRIAL_PX, facts.min_size_px) // facts.size_multiple) * facts.size_multiple
    given, expected = ((1, facts.channels, size, size) for size in (side, scale * side))
    try:
        with evaluating(network):
            output = network(torch.zeros(given, device=device_of(network)))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise SparkirError(
            f"the {role} {facts.name} cannot compute an image {given}, which by its facts it can: "
            f"{one_line(error)}; check network.facts"
        ) from error
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != expected:
        raise SparkirError(
            f"the {role} {facts.name} returns {shape} for an image {given}; it must return one "
            f"tensor, the restored image {expected}"
        )


def require_channels(data: Data, facts: ModelFacts, role: str = "network") -> None:
    """Stop now if a network, the student of a recipe or another, restores other channels."""
    if data.channels == 1 and facts.channels == 3:
        raise SparkirError(
            f"data.channels = 1 makes the images grey, but the {role} {facts.name} restores RGB; "
            f"set {role}.options.channels = 1, or leave data.channels out"
        )
    if data.channels == 3 and facts.channels == 1 and data.degradation == "noise":
        raise SparkirError(
            f"the {role} {facts.name} restores grey images, and the luma of coloured noise is "
            f"weaker than the noise; set data.channels = 1, or {role}.options.channels = 3"
        )


def _require_alike(student: nn.Module, teacher: nn.Module | None) -> None:
    """Stop now if student and teacher do not agree on what a channel is."""
    own = facts_of(student)
    if teacher is None or facts_of(teacher).channels == 3:
        return
    theirs = facts_of(teacher)
    if (own.channels, own.luma_range) != (1, theirs.luma_range):
        raise SparkirError(
            f"the teacher {theirs.name} restores luma of {theirs.luma_range} range, which the "
            f"student {own.name} does not; choose networks that restore the same"
        )


def _require_sizes(role: str, network: nn.Module, patch_px: int, tested: PairStore | None) -> None:
    """Stop now if the crops or the images to be measured are smaller than the network can take."""
    facts = facts_of(network)
    sizes = {f"data.patch_px = {patch_px}": (patch_px, patch_px)}
    if tested is not None:
        sizes |= {f"test image {n}": tested.lq_size(i) for i, n in enumerate(tested.names)}
    for what, size in sizes.items():
        for side_px in size:
            least = smallest_px(facts, side_px)
            if side_px < least:
                raise SparkirError(
                    f"{what} is too small ({size[0]}x{size[1]} px): the {role} {facts.name} needs "
                    f"at least {least} px; take a larger one"
                )


def require_measurable(pairs: PairStore, convention: Convention) -> None:
    """Stop now if the smallest image leaves nothing to measure."""
    smallest = min(range(len(pairs)), key=lambda index: min(pairs.lq_size(index)))
    _, gt = pairs.pair(smallest)
    try:
        ssim(gt, gt, convention)
    except SparkirError as error:
        raise SparkirError(
            f"test image {pairs.names[smallest]}: {error}; remove it or take a larger one"
        ) from error


def network_hash(network: nn.Module) -> str:
    """A hash of a network's facts, its modules and their settings, and all its numbers."""
    known = hashlib.sha256(repr((facts_of(network), str(network))).encode())
    tensors = dict(network.state_dict())
    tensors |= dict(network.named_buffers())  # those that are not saved, too
    for name, module in network.named_modules():
        own = {key: value for key, value in sorted(vars(module).items()) if key != "training"}
        tensors |= {f"{name}.{k}": v for k, v in own.items() if isinstance(v, Tensor)}
        settings = [f"{name}.{k}={v}" for k, v in own.items() if _is_setting(v)]
        known.update("\n".join(settings).encode())
    for name, tensor in sorted(tensors.items()):
        known.update(name.encode())
        known.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return known.hexdigest()[:16]


def _is_setting(value: object) -> bool:
    """Whether a module's attribute is of plain values, however they are nested."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_setting, (*value.keys(), *value.values())))
    if isinstance(value, tuple | list):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | str)


def save_student(recipe: Recipe, student: nn.Module, path: Path) -> None:
    """Weights and grids of a trained student, with its facts and all that builds it again.

    The facts are for whoever reads the file without sparkir; they are as in an exported one's card.
    """
    words = {
        "format": "sparkir student 1",
        "sparkir": metadata.version("sparkir"),
        "facts": json.dumps(asdict(facts_of(student))),
        "recipe": json.dumps(recipe.model_dump(mode="json")),
    }
    save_weights(student, path, words)


def recipe_of_student(path: Path) -> Recipe:
    """The recipe that a saved student was trained by.

    Raises:
        SparkirError: the file is no student of sparkir's, or is damaged.
    """
    if not path.is_file():
        raise SparkirError(f"no student at {path}; check the path")
    words = read_metadata(path)
    if "recipe" not in words:
        raise SparkirError(
            f"{path} holds weights, but not how to build their network; for a published "
            "checkpoint give the network's name and --weights"
        )
    try:
        values = json.loads(words["recipe"])
    except (ValueError, RecursionError) as error:
        raise SparkirError(f"{path} has a damaged recipe: {one_line(error)}") from error
    return from_values(values, f"the recipe in {path}")


def load_student(path: Path) -> tuple[nn.Module, Recipe]:
    """What `save_student` wrote: the student in evaluation mode, and its recipe.

    Raises:
        SparkirError: the file is no student of sparkir's, or is damaged.
    """
    recipe = recipe_of_student(path)
    try:
        student = build(recipe.student.model, **recipe.student.options)
    except (RuntimeError, MemoryError) as error:
        raise SparkirError(f"cannot build the student of {path}: {one_line(error)}") from error
    if recipe.quant is not None:
        student = prepare(student, recipe.quant)
    state = read_weights(path)
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise SparkirError(
            f"{path} was made by sparkir {read_metadata(path).get('sparkir')}, whose networks "
            "differ: " + _what_differs(error)
        ) from error
    return student.eval(), recipe


def _what_differs(error: RuntimeError) -> str:
    """The keys that `load_state_dict` complains of, on one line of a readable length."""
    return textwrap.shorten(str(error).partition("\n")[2], 400, placeholder=" ...")
