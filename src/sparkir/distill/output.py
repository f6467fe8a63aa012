"""Distances between two images, location by location: what a weight map multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Norm = Literal["l1", "mse", "matched"]
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
    difference = student - target
    gap = difference.detach().abs().mean().clamp_min(_SMALLEST_GAP)
    return difference.square() / (2 * gap)


MAPS: dict[Norm, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1_map,
    "mse": mse_map,
    "matched": matched_map,
}
