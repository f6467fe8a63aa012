"""Bilinear interpolation that every runtime computes alike.

Runtimes place the samples of a bilinear resize in float32, each in its own order. Here positions
are found in whole numbers and weights are whole parts of 128, so that on values of few bits every
product and sum is exact.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparkir.quant.calls import named

WEIGHT_BITS = 7
_WORDS = "input size scale_factor mode align_corners recompute_scale_factor antialias"


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


def resize_of(node: fx.Node, module: fx.GraphModule) -> dict[str, Any] | None:
    """The options of a call that resizes an image, its first argument; else None."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return vars(called) if isinstance(called, nn.Upsample) else None
    if node.target is not F.interpolate or not node.args:
        return None
    return {"mode": "nearest"} | named(node, _WORDS)


def repeats_pixels(resize: dict[str, Any]) -> bool:
    """Whether it does nothing but repeat every pixel a whole number of times."""
    nearest = resize["mode"] in ("nearest", "nearest-exact")
    return nearest and _whole_factors(resize) is not None


def is_interpolation(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether it is one that `make_interpolation_exact` has put in."""
    return node.op == "call_module" and isinstance(
        module.get_submodule(str(node.target)), ExactBilinear
    )


def make_interpolation_exact(module: fx.GraphModule, example: Tensor) -> None:
    """Replace every bilinear resize in a traced network, to a size or by a whole factor.

    `example` (1, C, H, W) is an image that the network can take.
    """
    found = [(node, resize_of(node, module)) for node in module.graph.nodes]
    bilinear = [
        (node, resize)
        for node, resize in found
        if resize and resize["mode"] == "bilinear" and not resize.get("antialias")
    ]
    if not bilinear:
        return
    sizes = _Sizes(module)
    with torch.no_grad():
        sizes.run(example)
    for node, resize in bilinear:
        size = _size_of(node, resize, sizes)
        if size is None:
            continue
        name = f"operations.{node.name}"
        corners = bool(resize.get("align_corners"))
        module.add_submodule(name, ExactBilinear(align_corners=corners))
        node.op, node.target = "call_module", name
        node.args, node.kwargs = (node.args[0], *size), {}
    module.recompile()


class _Sizes(fx.Interpreter):
    """Notes which nodes are one number, and which are two, as `x.shape[-2:]`."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.single: set[fx.Node] = set()
        self.pairs: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - torch's own signature
        result = super().run_node(n)
        if isinstance(result, int):
            self.single.add(n)
        elif isinstance(result, tuple | list) and len(result) == 2:
            self.pairs.add(n)
        return result


def _whole_factors(resize: dict[str, Any]) -> tuple[int, int] | None:
    """How many times as high and as wide the image becomes, where that is all that is said."""
    factor = resize.get("scale_factor")
    factors = factor if isinstance(factor, tuple | list) else (factor, factor)
    if resize.get("size") is not None or len(factors) != 2:
        return None
    if not all(isinstance(f, int | float) and f >= 1 and f == int(f) for f in factors):
        return None
    return int(factors[0]), int(factors[1])


def _size_of(node: fx.Node, resize: dict[str, Any], sizes: _Sizes) -> tuple[Any, Any] | None:
    """(height, width) of the result, where they are known to be all that decides it."""
    size, factors = resize.get("size"), _whole_factors(resize)
    graph, image = node.graph, node.args[0]
    if isinstance(size, tuple | list) and len(size) == 2:
        return size[0], size[1]
    if isinstance(size, int) or (isinstance(size, fx.Node) and size in sizes.single):
        return size, size
    if isinstance(size, fx.Node) and size in sizes.pairs:
        with graph.inserting_before(node):
            height, width = (graph.call_function(operator.getitem, (size, i)) for i in (0, 1))
        return height, width
    if factors is None:
        return None
    with graph.inserting_before(node):
        height, width = (
            graph.call_function(operator.mul, (graph.call_method("size", (image, dim)), factor))
            for dim, factor in zip((2, 3), factors, strict=True)
        )
    return height, width
