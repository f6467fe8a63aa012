"""The frozen network over PyTorch's `quantized_decomposed` operations, which ExecuTorch lowers.

A grid becomes a quantize node and, for each reader, a dequantize node of its own: XNNPACK's
partitioner takes "dequantize, operation, quantize" as one int8 kernel, and a dequantize node that
is shared with an operation in floating point would be lost to it. Bytes are signed there: the
stored byte less 128.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparkir.deploy.qdq import find_integers, grid_calls
from sparkir.quant.graph import Tap
from sparkir.quant.layers import (
    AbsorbedReLU,
    Add,
    Concatenate,
    Dequantize,
    Multiply,
    PassThrough,
    Table,
)
from sparkir.quant.reference import IntegerLayer, IntegerQuantizer

INT8 = torch.iinfo(torch.int8)
_ON_GRIDS = (
    IntegerLayer,
    IntegerQuantizer,
    AbsorbedReLU,
    Add,
    Multiply,
    Concatenate,
    PassThrough,
    Table,
    Tap,
)


class DecomposedLayer(nn.Module):
    """A layer over real values, with int8 weights that are dequantized per output channel."""

    weight: Tensor
    weight_scale: Tensor
    zero: Tensor

    def __init__(self, layer: IntegerLayer) -> None:
        """The same layer."""
        super().__init__()
        self.apply_weights = layer.apply_weights
        self.register_buffer("weight", layer.weight)
        self.register_buffer("weight_scale", layer.weight_scale)
        self.register_buffer("zero", torch.zeros(len(layer.weight), dtype=torch.int64))
        # XNNPACK's exporter wants the bias in float and rounds it to the very int32 it came from.
        bias = None if layer.bias is None else layer.bias.double() * layer.sum_scale.double()
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Real values in and out."""
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.weight_scale, self.zero, 0, INT8.min, INT8.max, torch.int8
        )
        return self.apply_weights(x, weight, cast("Tensor | None", self.bias))


class _Grid(NamedTuple):
    """How a grid is written in signed bytes."""

    step: float
    zero: int
    lowest: float
    """The real value of its first level."""
    highest: float
    is_narrow: bool

    @classmethod
    def of(cls, grid: IntegerQuantizer) -> _Grid:
        step, zero = float(grid.scale), grid.zero_level
        top = grid.levels - 1
        return cls(
            step, zero + INT8.min, -zero * step, (top - zero) * step, top < INT8.max - INT8.min
        )

    def quantize(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        operation = torch.ops.quantized_decomposed.quantize_per_tensor.default
        return graph.call_function(operation, (source, *self._arguments()))

    def dequantize(self, graph: fx.Graph, stored: fx.Node) -> fx.Node:
        operation = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        return graph.call_function(operation, (stored, *self._arguments()))

    def clip(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        return graph.call_function(F.hardtanh, (source, self.lowest, self.highest))

    def _arguments(self) -> tuple[Any, ...]:
        return self.step, self.zero, INT8.min, INT8.max, torch.int8


def to_decomposed(frozen: fx.GraphModule, *, with_grids: bool = False) -> fx.GraphModule:
    """A copy of an integer network over `quantized_decomposed` operations.

    The module that registers these operations must have been imported; ExecuTorch does.

    Args:
        frozen: what `freeze` returned; it is left as it is.
        with_grids: return the signed bytes of every grid as well, in the order of `grid_calls`.
    """
    view: Any = copy.deepcopy(frozen)
    find_integers(view)
    rewriter = _Rewriter(view)
    rewriter.run(with_grids=with_grids)
    for name, module in rewriter.modules.items():
        if isinstance(module, IntegerLayer):
            view.set_submodule(name, DecomposedLayer(module))
        elif isinstance(module, AbsorbedReLU):  # its grid starts at zero, and saturates there
            view.set_submodule(name, nn.Identity())
    view.delete_all_unused_submodules()
    view.recompile()
    return cast("fx.GraphModule", view)


class _Rewriter:
    """Writes every grid of a copied graph as nodes, in the order of execution."""

    def __init__(self, view: fx.GraphModule) -> None:
        self.graph = view.graph
        self.modules = dict(view.named_modules())
        self.calls = grid_calls(view)
        self.maker = {call: self._maker_of(call) for call in self.calls}
        self.stored: dict[fx.Node, fx.Node] = {}

    def run(self, *, with_grids: bool) -> None:
        self._keep_in_float()
        for call in self.calls:
            self._write(call)
        if with_grids:
            (output,) = (node for node in self.graph.nodes if node.op == "output")
            output.args = ((output.args[0], *(self.stored[call] for call in self.calls)),)
        for call in self.calls:
            self.graph.erase_node(call)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _maker_of(self, call: fx.Node) -> fx.Node:
        """What made the values of a grid, before taps and an absorbed ReLU."""
        (node,) = call.all_input_nodes
        while isinstance(self._module(node), AbsorbedReLU | Tap):
            (node,) = node.all_input_nodes
        return node

    def _write(self, call: fx.Node) -> None:
        """A quantize node in place of `call`, and a dequantize node for each of its readers."""
        grid = _Grid.of(cast("IntegerQuantizer", self._module(call)))
        with self.graph.inserting_before(call):
            maker = self.maker[call]
            if maker.target == call.target and maker in self.stored:
                self.stored[call] = self.stored[maker]  # on this very grid already
            else:
                source = self._clipped(call, grid) if grid.is_narrow else call.all_input_nodes[0]
                self.stored[call] = grid.quantize(self.graph, source)
            for reader in list(call.users):
                own = grid.dequantize(self.graph, self.stored[call])
                reader.replace_input_with(call, own)

    def _clipped(self, call: fx.Node, grid: _Grid) -> fx.Node:
        """The values for a grid that does not fill a byte, so that the byte need not saturate."""
        source, maker = call.all_input_nodes[0], self.maker[call]
        module = self._module(maker)
        if isinstance(module, PassThrough):  # it moved values that were clipped before
            return source
        if not isinstance(module, IntegerLayer):  # only layers have kernels that clip as well
            source = grid.dequantize(self.graph, grid.quantize(self.graph, source))
        return grid.clip(self.graph, source)

    def _keep_in_float(self) -> None:
        """Put a bound that nothing reaches before operations that stay in float.

        Between dequantize and quantize nodes, XNNPACK's partitioner takes upon itself to run many
        an operation on int8, with other roundings, and moves bytes between grids as if they were
        one.
        """
        largest = torch.finfo(torch.float32).max
        for maker in dict.fromkeys(self.maker.values()):
            if isinstance(self._module(maker), _ON_GRIDS) or maker.op == "placeholder":
                continue
            inputs = maker.all_input_nodes
            if all(isinstance(self._module(node), Dequantize) for node in inputs) and inputs:
                with self.graph.inserting_before(maker):
                    bounded = self.graph.call_function(torch.clamp, (inputs[0], -largest, largest))
                maker.replace_input_with(inputs[0], bounded)
