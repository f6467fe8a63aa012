"""A traced network said in words that integer kernels know, before grids are placed in it.

The network computes what it did, up to the last bits of floating point. What has no such words is
left as it is, and stays in floating point.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparkir.quant.calls import named
from sparkir.quant.forms import (
    ConstantConv2d,
    InterleavedConv2d,
    ScaledConv2d,
    exact_step,
    interleaves,
)
from sparkir.quant.graph import is_learned, shapes_of, tensor_at
from sparkir.quant.layers import GlobalAverage

_IMAGE_DIMS = {2, 3}
_OTHERWISE = {"axis": "dim", "keepdims": "keepdim"}
"""NumPy's words, which torch takes as well."""
_PRODUCTS = (operator.mul, torch.mul)
_MEANS = ("mean", torch.mean)
_HOW = ("how", "chunks", "split_size", "split_size_or_sections")
_CUTS = ("chunk", "split", torch.chunk, torch.split)


def rewrite(
    module: fx.GraphModule, small: Tensor, large: Tensor, *, constant_bits: int = 8
) -> None:
    """Change `module` in place.

    Args:
        module: a traced network.
        small: an input that it can take, (1, C, H, W).
        large: another, of another height and width.
        constant_bits: that constant weights may take.
    """
    shapes = shapes_of(module, small), shapes_of(module, large)
    rewriter = _Rewriter(module, *shapes, constant_bits=constant_bits)
    constants = _constants(module)
    for node in list(module.graph.nodes):
        rewriter.change(node)
    module.graph.eliminate_dead_code()
    for path in constants - _constants(module):  # they belong to a layer now
        owner, _, name = path.rpartition(".")
        delattr(module.get_submodule(owner), name)
    module.delete_all_unused_submodules()
    module.recompile()


def _constants(module: fx.GraphModule) -> set[str]:
    """The parameters and buffers that the graph itself reads."""
    return {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}


class _Rewriter:
    def __init__(
        self,
        module: fx.GraphModule,
        shapes: Mapping[fx.Node, torch.Size],
        shapes_of_larger: Mapping[fx.Node, torch.Size],
        *,
        constant_bits: int,
    ) -> None:
        self.module, self.graph, self.shapes = module, module.graph, shapes
        self.shapes_of_larger, self.constant_bits = shapes_of_larger, constant_bits
        self.calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")

    def channels(self, node: object) -> int | None:
        """The second dimension of a tensor, if it is the same at any size of the image."""
        shape = self.shapes.get(node, ())  # type: ignore[call-overload]
        larger = self.shapes_of_larger.get(node, ())  # type: ignore[call-overload]
        return shape[1] if len(shape) > 1 and shape[1] == larger[1] else None

    def change(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._change_module(node)
            return
        if node.target is F.conv2d:
            self._constant_convolution(node)
        elif node.target is F.adaptive_avg_pool2d and _is_one(node.args[1:2] or node.kwargs):
            self._average(node)
        elif node.target in _MEANS:
            self._mean(node)
        elif node.target in _CUTS:
            self._pieces(node)
        elif node.target in _PRODUCTS:
            self._factor(node)

    def _change_module(self, node: fx.Node) -> None:
        layer = self.module.get_submodule(str(node.target))
        if isinstance(layer, nn.AdaptiveAvgPool2d) and _is_one(layer.output_size):
            self._average(node)
        elif isinstance(layer, nn.ConvTranspose2d) and self._interleaves(node, layer):
            self.module.set_submodule(str(node.target), InterleavedConv2d(layer))
            self._shuffle(node, layer.stride[0])
        elif isinstance(layer, InterleavedConv2d):  # called before
            self._shuffle(node, layer.phases.stride)

    def _interleaves(self, node: fx.Node, layer: nn.ConvTranspose2d) -> bool:
        """Whether its phases make all that its calls want: not a size of their own."""
        calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == node.target]
        return interleaves(layer) and all(n.args == tuple(n.all_input_nodes) for n in calls)

    def _shuffle(self, node: fx.Node, stride: int) -> None:
        with self.graph.inserting_after(node):
            shuffled = self.graph.call_function(F.pixel_shuffle, (node, stride))
        node.replace_all_uses_with(shuffled, delete_user_cb=lambda user: user is not shuffled)

    def _call(self, node: fx.Node, module: nn.Module) -> None:
        """Let `node` call a new module on its first argument."""
        name = f"rewritten.{node.name}"
        self.module.add_submodule(name, module)
        node.op, node.target = "call_module", name
        node.args, node.kwargs = tuple(node.all_input_nodes[:1]), {}

    def _constant_convolution(self, node: fx.Node) -> None:
        """Blurring and interpolating: weights that few bits hold exactly."""
        words = named(node, "input weight bias stride padding dilation groups")
        weight = tensor_at(words.get("weight"), self.module)
        if weight is None or is_learned(weight) or words.get("bias") is not None or not node.args:
            return
        step = exact_step(weight, bits=self.constant_bits)
        padding = words.get("padding", 0)
        if step is None or isinstance(padding, str):
            return
        layer = ConstantConv2d(
            weight,
            step,
            stride=_pair(words.get("stride", 1)),
            padding=_pair(padding),
            dilation=_pair(words.get("dilation", 1)),
            groups=words.get("groups", 1),
        )
        self._call(node, layer)

    def _mean(self, node: fx.Node) -> None:
        """The mean over an image is one operation; that over channels, a convolution."""
        words = named(node, "input dim keepdim")
        words |= {new: words[old] for old, new in _OTHERWISE.items() if old in words}
        shape = self.shapes.get(words["input"], ()) if node.args else ()
        if len(shape) != 4:
            return
        dim, keep = words.get("dim"), bool(words.get("keepdim", False))
        dims = {d % 4 for d in (dim if isinstance(dim, tuple | list) else [dim]) if d is not None}
        channels = self.channels(node.args[0])
        if dims == _IMAGE_DIMS:
            self._average(node, flat=not keep)
        elif dims == {1} and keep and channels is not None:
            weight = torch.full((1, channels, 1, 1), 1 / channels)
            step = cast("Tensor", exact_step(weight, bits=self.constant_bits))
            self._call(node, ConstantConv2d(weight, step))

    def _average(self, node: fx.Node, *, flat: bool = False) -> None:
        self._call(node, GlobalAverage())
        if flat:
            with self.graph.inserting_after(node):
                flattened = self.graph.call_function(torch.flatten, (node, 1))
            node.replace_all_uses_with(flattened, delete_user_cb=lambda user: user is not flattened)

    def _pieces(self, node: fx.Node) -> None:
        """Pieces of the channels: each is a slice, and may have a grid of its own."""
        words = named(node, "input how dim")
        words["how"] = next((words[word] for word in _HOW if word in words), None)
        source, channels = words.get("input"), self.channels(words.get("input"))
        readers = list(node.users)
        if channels is None:
            return
        dims = (1, 1 - len(self.shapes[cast("fx.Node", source)]))
        if words.get("dim", 0) not in dims:
            return
        ends = _ends(channels, words["how"], chunks="chunk" in str(node.target))
        single = [
            reader.target is operator.getitem and isinstance(reader.args[1], int)
            for reader in readers
        ]
        for reader in readers if ends and all(single) else []:
            start, stop = ends[cast("int", reader.args[1])]
            reader.args = (source, (slice(None), slice(start, stop)))

    def _factor(self, node: fx.Node) -> None:
        """A constant factor for each channel, right behind a convolution that nobody else reads."""
        if len(node.args) != 2 or node.kwargs:
            return
        for source, other in (node.args, node.args[::-1]):
            factor = other if isinstance(other, int | float) else tensor_at(other, self.module)
            if factor is not None and isinstance(source, fx.Node) and self._takes(source, factor):
                layer = self.module.get_submodule(str(source.target))
                scaled = ScaledConv2d(cast("nn.Conv2d", layer), factor)
                self.module.set_submodule(str(source.target), scaled)
                node.replace_all_uses_with(source)
                return

    def _takes(self, source: fx.Node, factor: Tensor | float) -> bool:
        """Whether `source` is a convolution that a factor for each of its outputs can join."""
        if source.op != "call_module" or len(source.users) != 1 or self.calls[source.target] != 1:
            return False
        layer = self.module.get_submodule(str(source.target))
        if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros":
            return False
        if not isinstance(factor, Tensor) or factor.numel() == 1:
            return True
        return tuple(factor.shape[-3:]) == (layer.out_channels, 1, 1) and factor.dim() <= 4


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _is_one(size: object) -> bool:
    """Whether an output size, or the arguments that hold it, say one pixel."""
    if isinstance(size, Mapping):
        return _is_one(size.get("output_size"))
    if isinstance(size, tuple | list):
        return bool(size) and all(map(_is_one, size))
    return size == 1


def _ends(channels: int, how: object, *, chunks: bool) -> list[tuple[int, int]]:
    """(start, stop) of each piece, as `torch.chunk` or `torch.split` cut; empty if unknown."""
    if isinstance(how, int):
        side = -(-channels // how) if chunks else how
        return [(at, min(at + side, channels)) for at in range(0, channels, side)]
    if isinstance(how, tuple | list) and all(isinstance(size, int) for size in how):
        stops = list(accumulate(how))
        return list(zip([0, *stops], stops, strict=False))
    return []
