"""Bilinear interpolation that every runtime computes alike.

Runtimes place the samples of a bilinear resize in float32, each in its own order. Here positions
are found in whole numbers and weights are whole parts of 128, so that on values of few bits every
product and sum is exact.
"""

from __future__ import annotations

import operator
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
    """Replace every bilinear resize in a traced network, to a size or by a whole factor."""
    for node in list(module.graph.nodes):
        words = _words_of(node, module)
        if words is None:
            continue
        with module.graph.inserting_before(node):
            size = _size_of(node, words)
        if size is None:
            continue
        name = f"operations.{node.name}"
        corners = bool(words.get("align_corners"))
        module.add_submodule(name, ExactBilinear(align_corners=corners))
        node.op, node.target = "call_module", name
        node.args, node.kwargs = (node.args[0], *size), {}
    module.recompile()


def _words_of(node: fx.Node, module: fx.GraphModule) -> dict[str, Any] | None:
    """The options of `node`, if it is a bilinear resize."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        words = vars(called) if isinstance(called, nn.Upsample) else {}
    elif node.op == "call_function" and node.target is F.interpolate and len(node.args) < 5:
        words = dict(zip(("input", "size", "scale_factor", "mode"), node.args, strict=False))
        words |= cast("dict[str, Any]", node.kwargs)
    else:
        return None
    return words if words.get("mode") == "bilinear" and not words.get("antialias") else None


def _size_of(node: fx.Node, words: dict[str, Any]) -> tuple[Any, Any] | None:
    """(height, width) of the result, where they are known to be all that decides it."""
    size, factor = words.get("size"), words.get("scale_factor")
    if size is not None:
        return (size[0], size[1]) if isinstance(size, tuple | list) and len(size) == 2 else None
    factors = factor if isinstance(factor, tuple | list) else (factor, factor)
    if not all(isinstance(f, int | float) and f >= 1 and f == int(f) for f in factors):
        return None
    graph, image = node.graph, node.args[0]
    old = [graph.call_method("size", (image, dim)) for dim in (2, 3)]
    height, width = (
        graph.call_function(operator.mul, (o, int(f))) for o, f in zip(old, factors, strict=True)
    )
    return height, width
