"""Bilinear interpolation that every runtime computes alike.

Runtimes place the samples of a bilinear resize in float32, each in its own order. Here positions
are found in whole numbers and weights are whole parts of 128, so that on values of few bits every
product and sum is exact.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

WEIGHT_BITS = 7


class ExactBilinear(nn.Module):
    """`F.interpolate(x, size, mode="bilinear")`, weights rounded to 1/128."""

    def __init__(self, *, align_corners: bool = False) -> None:
        """As torch's: whether the first and last samples stay at the ends."""
        super().__init__()
        self.align_corners = align_corners

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, C, h, w) -> (B, C, height, width)."""
        for dim, size in ((3, width), (2, height)):  # rows are gathered faster than columns
            x = _resize(x, dim, size, corners=self.align_corners)
        return x


def _resize(x: Tensor, dim: int, size: int, *, corners: bool) -> Tensor:
    """Along one dimension; sample i lies at place / unit of the old ones, not before the first."""
    old, index = x.shape[dim], torch.arange(size, device=x.device)
    if corners:
        place, unit = 2 * index * (old - 1), 2 * max(size - 1, 1)
    else:  # (i + 1/2) * old / size - 1/2
        place, unit = ((2 * index + 1) * old - size).clamp_min(0), 2 * size
    before = torch.div(place, unit, rounding_mode="floor")
    rest = place - before * unit
    parts = torch.div(rest * 2**WEIGHT_BITS + unit // 2, unit, rounding_mode="floor")
    weight = (parts.float() / 2**WEIGHT_BITS).view([-1, 1] if dim == 2 else [-1])
    low = x.index_select(dim, before)
    high = x.index_select(dim, (before + 1).clamp_max(old - 1))
    between: Tensor = low + (high - low) * weight
    return between


def make_interpolation_exact(module: fx.GraphModule) -> None:
    """Replace every bilinear `F.interpolate` to a given size in a traced network."""
    for node in module.graph.nodes:
        size = _size_of(node)
        if size is None:
            continue
        name = f"operations.{node.name}"
        corners = bool(node.kwargs.get("align_corners"))
        module.add_submodule(name, ExactBilinear(align_corners=corners))
        node.op, node.target = "call_module", name
        node.args, node.kwargs = (node.args[0], *size), {}
    module.recompile()


def _size_of(node: fx.Node) -> tuple[Any, Any] | None:
    """(height, width) if `node` is a bilinear resize to them."""
    if node.op != "call_function" or node.target is not F.interpolate:
        return None
    words = dict(zip(("input", "size", "scale_factor", "mode"), node.args, strict=False))
    words |= cast("dict[str, Any]", node.kwargs)
    plain = words.get("mode") == "bilinear" and len(node.args) < 5
    size = words.get("size")
    if not plain or words.get("antialias") or not isinstance(size, tuple | list) or len(size) != 2:
        return None
    return (size[0], size[1])
