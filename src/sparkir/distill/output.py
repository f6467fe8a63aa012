"""Distances between two images, location by location: what a weight map multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Norm = Literal["l1", "mse"]


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


MAPS: dict[Norm, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1_map, "mse": mse_map}
