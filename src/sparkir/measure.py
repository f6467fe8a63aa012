"""Measuring: every way of restoring the test images, as rows of one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparkir.assemble import Materials, Report, convention_of, quantize_student
from sparkir.data.degrade import bicubic_resize
from sparkir.data.pairs import PairStore
from sparkir.deploy.runtime import RuntimeNetwork
from sparkir.deploy.session import TITLES
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore, Restorer, evaluate
from sparkir.evaluate.infer import device_of, restore_image
from sparkir.evaluate.metrics import Convention
from sparkir.models.facts import as_seen, facts_of, pad_to_multiple, smallest_px
from sparkir.quant.arithmetic import exact_rounding
from sparkir.quant.reference import freeze, stored_bytes
from sparkir.quant.spec import QuantSpec
from sparkir.recipe import Recipe
from sparkir.report.picture import Panel, compose, crop, paint_weights, sharpest_corner
from sparkir.report.table import Arithmetic, Row
from sparkir.spark.weighting import Constant

if TYPE_CHECKING:
    from sparkir.export import Exported
    from sparkir.run import Trained

_DETAIL_PX = 96
_PARITY_PX = 160


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of restoring an image."""

    name: str
    arithmetic: Arithmetic
    restorer: Restorer | nn.Module
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A contender's row, and its picture of the first test image."""

    row: Row
    picture: np.ndarray


def measure(
    contenders: Sequence[Contender], test: PairStore, convention: Convention, report: Report
) -> list[Measured]:
    """Score every contender on every test image."""
    measured = []
    for done, contender in enumerate(contenders, 1):
        scores = evaluate(contender.restorer, test, convention)
        row = Row(
            name=contender.name,
            arithmetic=contender.arithmetic,
            scores=scores,
            size_bytes=contender.size_bytes,
        )
        report({"kind": "row", "done": done, "total": len(contenders), **_headline(row)})
        measured.append(Measured(row=row, picture=_restored(contender, test.pair(0)[0])))
    return measured


def _headline(row: Row) -> dict[str, object]:
    return {
        "name": row.name,
        "arithmetic": row.arithmetic,
        "psnr_db": row.psnr_db,
        "ssim": row.ssim,
    }


def _restored(contender: Contender, lq: np.ndarray) -> np.ndarray:
    if isinstance(contender.restorer, nn.Module):
        return restore_image(contender.restorer, lq)
    return contender.restorer(lq)


def baselines(recipe: Recipe, materials: Materials) -> list[Contender]:
    """The rows that need no training."""
    chosen, found = recipe.baselines, []
    if "degraded" in chosen:
        found.append(_degraded(recipe))
    if "teacher" in chosen and materials.teacher is not None:
        teacher = materials.teacher
        found.append(
            Contender(
                name="teacher", arithmetic="float", restorer=teacher, size_bytes=_bytes(teacher)
            )
        )
    if recipe.quant is not None:
        in_8_bits = replace(recipe.quant, weight_bits=8, activation_bits=8, first_last_bits=8)
        if "ptq-w8a8" in chosen:
            found.append(_ptq(in_8_bits, materials))
        if "ptq" in chosen and ("ptq-w8a8" not in chosen or recipe.quant != in_8_bits):
            found.append(_ptq(recipe.quant, materials))
    return found


def _degraded(recipe: Recipe) -> Contender:
    """The input itself, enlarged bicubically where the task enlarges."""
    scale = recipe.data.scale
    if scale == 1:
        return Contender(name="degraded input", arithmetic="", restorer=lambda lq: lq)
    border = recipe.data.border
    return Contender(
        name="bicubic",
        arithmetic="",
        restorer=lambda lq: bicubic_resize(lq, scale=scale, border=border),
    )


def _ptq(spec: QuantSpec, materials: Materials) -> Contender:
    prepared = quantize_student(materials.student, spec, materials.crops)
    frozen = freeze(cast("GraphModule", prepared))
    return Contender(
        name=f"PTQ {spec.label}",
        arithmetic="integer",
        restorer=frozen,
        size_bytes=stored_bytes(frozen),
    )


def trained_contenders(recipe: Recipe, trained: Trained) -> list[Contender]:
    """A trained student as it was trained, and as the integer network it becomes."""
    student = trained.student
    if recipe.quant is None:
        size = _bytes(student)
        return [Contender(name=trained.name, arithmetic="float", restorer=student, size_bytes=size)]
    name, frozen = row_name(recipe, trained), freeze(cast("GraphModule", student))
    return [
        Contender(name=name, arithmetic="training", restorer=training_restorer(student)),
        Contender(
            name=name, arithmetic="integer", restorer=frozen, size_bytes=stored_bytes(frozen)
        ),
    ]


def row_name(recipe: Recipe, trained: Trained) -> str:
    """The method with its bits."""
    return trained.name if recipe.quant is None else f"{trained.name} {recipe.quant.label}"


def training_restorer(student: nn.Module) -> Restorer:
    """The student with the rounding that its training saw."""

    def restored(lq: np.ndarray) -> np.ndarray:
        with exact_rounding(False):
            return restore_image(student, lq)

    return restored


def runtime_contender(recipe: Recipe, trained: Trained, exported: Exported) -> Contender:
    """The exported file as its runtime executes it."""
    content = exported.model.SerializeToString()
    return Contender(
        name=row_name(recipe, trained),
        arithmetic="runtime",
        restorer=RuntimeNetwork(
            content, facts_of(exported.frozen), runtime=exported.parity.runtime
        ),
        size_bytes=len(content),
    )


def parity_images(test: PairStore, frozen: GraphModule) -> list[Tensor]:
    """Corners of three real test images, as the network reads them.

    Raises:
        SparkirError: none is large enough for the network.
    """
    facts = facts_of(frozen)
    images: list[Tensor] = []
    for index in range(len(test)):
        lq = torch.from_numpy(test.pair(index)[0][:_PARITY_PX, :_PARITY_PX].copy())
        if len(images) == 3 or any(side < smallest_px(facts, side) for side in lq.shape[:2]):
            continue
        image = as_seen(lq.movedim(-1, 0)[None].float() / 255, facts) * facts.value_range
        images.append(pad_to_multiple(image, facts).contiguous())
    if not images:
        raise SparkirError(
            f"the file of {facts.name} is checked on images, and none of these is large enough for "
            "it; give others with --data, or as data.test"
        )
    return images


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


# The picture ----------------------------------------------------------------------------------


def comparison(
    recipe: Recipe, materials: Materials, own: Trained, measured: Sequence[Measured]
) -> np.ndarray:
    """Every method's view of one detail, and the weight map of the recipe's own method."""
    lq, gt = materials.test.pair(0)
    side = min(_DETAIL_PX, *gt.shape[:2])
    corner = sharpest_corner(gt, side)
    panels = [Panel(title="ground truth", note="", image=crop(gt, corner, side))]
    for one in measured:
        if one.row.arithmetic == "training":
            continue  # the integer network shows the same
        title = one.row.name
        if one.row.arithmetic == "runtime" and recipe.quant is not None:
            title += f" in {TITLES[recipe.quant.runs_on.runtime]}"
        score: ImageScore = one.row.scores[0]
        panels.append(
            Panel(
                title=title,
                note=f"{score.psnr_db:.2f} dB, SSIM {score.ssim:.4f}",
                image=crop(one.picture, corner, side),
            )
        )
    if _shows_weights(materials, own, lq):
        panels.append(_weight_panel(materials, own, lq, gt))
    label = convention_of(recipe).label
    return compose(
        panels, title=f"{recipe.name}: {materials.test.names[0]}", subtitle=f"{label}, whole image"
    )


def _shows_weights(materials: Materials, own: Trained, lq: np.ndarray) -> bool:
    """Whether there is a map, and the teacher takes this image, of which it is made."""
    if materials.teacher is None or isinstance(own.weighting, Constant):
        return False
    facts = facts_of(materials.teacher)
    return all(side >= smallest_px(facts, side) for side in lq.shape[:2])


def _weight_panel(materials: Materials, own: Trained, lq: np.ndarray, gt: np.ndarray) -> Panel:
    """The weight map on the whole test image."""
    weights = weight_map(materials, own, lq, gt)
    note = f"whole image, {weights.min():.2f} (dark) to {weights.max():.2f}"
    return Panel(title="weight map W", note=note, image=paint_weights(weights, gt))


@torch.no_grad()
def weight_map(materials: Materials, own: Trained, lq: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """(H, W), the weighting's mean W for one whole image."""
    task = DistillationTask(own.student, materials.teacher, weighting=own.weighting).eval()
    device = device_of(own.student)
    batch, truth = (
        torch.from_numpy(image.copy()).movedim(-1, 0)[None].to(device).float() / 255
        for image in (lq, gt)
    )
    weights = task(batch, truth).weights
    return cast("np.ndarray", weights[0, 0].cpu().numpy())
