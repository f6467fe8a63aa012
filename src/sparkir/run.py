"""A recipe becomes a run: the story from top to bottom.

data -> teacher -> student -> losses and weighting -> training -> integer network -> files, table
and picture. Every part is a function of its own that `compare` and notebooks can use as well.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from sparkir.data.degrade import BicubicDownscale, Degradation, GaussianNoise, JpegCompression
from sparkir.data.images import find_images
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.data.photographs import photographs
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore, evaluate, mean
from sparkir.evaluate.metrics import Convention
from sparkir.models.checkpoint import load_weights
from sparkir.models.facts import facts_of
from sparkir.models.registry import build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.spec import QuantSpec
from sparkir.recipe import Data, Network, Recipe, WeightingChoice
from sparkir.spark.weighting import Weighting, weighting
from sparkir.train.loop import LoopSettings, Report, train
from sparkir.train.optimize import build_average, build_optimizer, fast_precision
from sparkir.train.state import TrainState

Silent: Report = lambda event: None  # noqa: E731 - a default value
_CALIBRATION_SEED = 7_919


# Parts ----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where decoded images are kept between runs: $SPARKIR_CACHE, or the user's cache."""
    base = os.environ.get("SPARKIR_CACHE") or Path.home() / ".cache" / "sparkir"
    return Path(base)


def open_pairs(data: Data, where: str, report: Report = Silent) -> PairStore:
    """The image pairs of `where`, which is `data.train`, `data.test` or another folder."""

    def progress(done: int, total: int) -> None:
        report({"kind": "decoding", "done": done, "total": total})

    options = {"cache": cache_folder(), "skip_broken": data.skip_broken, "progress": progress}
    if data.degradation == "pairs":
        folder = Path(where)
        pairs = PairStore.from_folders(
            folder / "input", folder / "target", scale=data.scale, **options
        )
    else:
        paths = _image_paths(where)
        pairs = PairStore.from_images(paths, degradation_of(data), **options)
    for message in pairs.skipped:
        report({"kind": "warning", "message": message})
    return pairs


def _image_paths(where: str) -> list[Path]:
    scheme, _, split = where.partition(":")
    if scheme == "photographs" and split in ("train", "test"):
        return photographs(split)
    return find_images(Path(where))


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
    return Convention(space=recipe.metric, crop_px=recipe.data.scale if recipe.metric == "y" else 0)


def build_network(choice: Network) -> nn.Module:
    """A network by name, with its weights unless they are the teacher's."""
    network = build(choice.model, **choice.options)
    if choice.weights and choice.weights != "teacher":
        load_weights(network, weights_path(choice.weights))
    return network


def weights_path(weights: str) -> Path:
    """A checkpoint's path; `package:NAME` is one that ships."""
    scheme, _, name = weights.partition(":")
    if scheme != "package":
        return Path(weights)
    path = Path(str(resources.files("sparkir.models") / "weights" / f"{name}.safetensors"))
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise SparkirError(f"no weights {name!r} ship with sparkir; known: {', '.join(known)}")
    return path


def build_student(recipe: Recipe, teacher: nn.Module | None) -> nn.Module:
    """The float student, the same for every method of one seed."""
    torch.manual_seed(recipe.seed)
    student = build_network(recipe.student)
    if recipe.student.weights == "teacher":
        assert teacher is not None
        try:
            student.load_state_dict(teacher.state_dict())
        except RuntimeError as error:
            raise SparkirError(
                'student.weights = "teacher" needs the teacher\'s architecture and options: '
                + str(error).partition("\n")[2].strip()
            ) from error
    return student


def quantize_student(student: nn.Module, spec: QuantSpec, crops: list[Tensor]) -> nn.Module:
    """The student with its grids in place, set by `crops` (B, C, H, W) in [0, 1]."""
    prepared = prepare(student, spec)
    calibrate(prepared, (c * facts_of(student).value_range for c in crops), method=spec.calibration)
    return prepared


def calibration_crops(pairs: PairStore, recipe: Recipe, channels: int) -> list[Tensor]:
    """Input crops of the training images, (8, C, H, W) in [0, 1] each."""
    sampler = PatchSampler(
        pairs, patch_px=recipe.data.patch_px, batch=8, seed=recipe.seed + _CALIBRATION_SEED
    )
    batches = -(-recipe.train.calibration_images // 8)
    return [sampler.next()[0].float() / 255 for _ in range(batches)]


def weighting_of(choice: WeightingChoice) -> Weighting:
    """A source of W; an option that it does not have is the user's mistake."""
    try:
        return weighting(choice.name, **choice.options)
    except TypeError as error:
        raise SparkirError(f"weighting.options of {choice.name!r}: {error}") from error


# Training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What every method of a run shares."""

    train: PairStore
    test: PairStore
    teacher: nn.Module | None
    student: nn.Module
    """In floating point, before quantization."""
    crops: list[Tensor]


def gather(recipe: Recipe, report: Report = Silent) -> Materials:
    """Open the data and build the networks."""
    train_pairs = open_pairs(recipe.data, recipe.data.train, report)
    test_pairs = open_pairs(recipe.data, recipe.data.test, report)
    teacher = None if recipe.teacher is None else build_network(recipe.teacher).eval()
    student = build_student(recipe, teacher)
    for role, network in (("teacher", teacher), ("student", student)):
        if network is not None and facts_of(network).scale != train_pairs.scale:
            raise SparkirError(
                f"the {role} restores x{facts_of(network).scale}, but the data is "
                f"x{train_pairs.scale}; set {role}.options.scale or data.scale"
            )
    crops = calibration_crops(train_pairs, recipe, facts_of(student).channels)
    return Materials(
        train=train_pairs, test=test_pairs, teacher=teacher, student=student, crops=crops
    )


def train_student(
    recipe: Recipe,
    materials: Materials,
    folder: Path,
    *,
    report: Report = Silent,
    stop_requested: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train one student in `folder`, going on from its checkpoint if there is one.

    Returns the moving average if the recipe keeps one, else the last student.
    """
    torch.manual_seed(recipe.seed)
    student = copy.deepcopy(materials.student)
    if recipe.quant is not None:
        student = quantize_student(student, recipe.quant, materials.crops)
    source = weighting_of(recipe.weighting)
    task = DistillationTask(
        student,
        materials.teacher if recipe.distill else None,
        weighting=source,
        **({} if recipe.distill is None else recipe.distill.model_dump()),
    )
    settings = recipe.train
    state = TrainState(
        student=student,
        weighting=source,
        optimizer=build_optimizer(
            student,
            name=settings.optimizer,
            learning_rate=settings.learning_rate,
            grid_learning_rate=settings.grid_learning_rate,
            weight_decay=settings.weight_decay,
        ),
        sampler=PatchSampler(
            materials.train,
            patch_px=recipe.data.patch_px,
            batch=recipe.data.batch,
            seed=recipe.seed,
        ),
        average=build_average(student, settings.ema),
    )
    checkpoint = folder / "last.pt"
    if checkpoint.exists():
        state.load(checkpoint)
        report({"kind": "resumed", "step": state.step})
    convention = convention_of(recipe)
    train(
        task,
        state,
        LoopSettings(
            steps=settings.steps,
            schedule=settings.schedule,
            warmup=settings.warmup,
            clip_norm=settings.clip_norm,
            bfloat16=_bfloat16(settings.precision),
            log_every=settings.log_every,
            evaluate_every=settings.evaluate_every,
            checkpoint_every=settings.checkpoint_every,
        ),
        checkpoint=checkpoint,
        evaluate=lambda network: mean(evaluate(network, materials.test, convention)).psnr_db,
        report=report,
        stop_requested=stop_requested,
    )
    return (student if state.average is None else state.average.module).eval()


def _bfloat16(precision: str) -> bool:
    return precision == "bfloat16" or (precision == "auto" and fast_precision(torch.device("cpu")))
