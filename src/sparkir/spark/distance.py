"""Distances between two images, location by location: what a weight map multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sparkir.spark.batch import of_all

Norm = Literal["l1", "mse", "matched"]
Distance = Callable[[Tensor, Tensor], Tensor]
"""(student, other image) -> a map of distances, location by location."""

_SMALLEST_GAP = 1e-6


def l1_map(
    student: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """|student - target|; its mean is the L1 loss (SPARK eq. 2)."""
    return (student - target).abs()


def mse_map(
    student: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """(student - target)**2; its weighted mean is SPARK eq. 3."""
    return (student - target).square()


def matched_map(
    student: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """A squared error that pulls as hard as an L1: (student - target)**2 / (2 * mean gap).

    The mean of |gradient| over the image is that of `l1_map`, whatever the task and however near
    the student has come; a plain squared error of images in [0, 1] pulls a hundred times less, and
    needs a strength of its own for every task. The mean gap carries no gradient.
    """
    return mse_map(student, target) / (2 * _gap(student, target))


MAPS: dict[str, Distance] = {
    "l1": l1_map,
    "mse": mse_map,
    "matched": matched_map,
}


def shared_maps(
    distance: Distance,
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    truth: Float[Tensor, "b c h w"],
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """The distances to teacher and truth in one unit, so that W and 1 - W mix what they say.

    `matched` has its gap to the truth for both: with gaps of their own, a teacher that is nearer
    would count for more than its weight.
    """
    if distance is not matched_map:
        return distance(student, teacher), distance(student, truth)
    unit = 2 * _gap(student, truth)
    return mse_map(student, teacher) / unit, mse_map(student, truth) / unit


def _gap(student: Tensor, target: Tensor) -> Tensor:
    """Of the whole batch, however many processes share it."""
    own = (student - target).detach().abs().mean()
    return of_all(own[None]).mean().clamp_min(_SMALLEST_GAP)
