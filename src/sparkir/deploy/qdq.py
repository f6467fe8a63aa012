"""The frozen network in QDQ form: real values, with a quantize-dequantize pair at every grid.

This is the form that exporters and runtimes understand: they recognise the pairs and put integer
kernels between them. It computes the same network, up to float rounding; it exists to be exported,
never to be measured.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from sparkir.quant.arithmetic import Quantized
from sparkir.quant.fixed import Fixed
from sparkir.quant.forms import InterleavedConv2d
from sparkir.quant.graph import Tap, is_exponential
from sparkir.quant.layers import Add, Call, Dequantize, GlobalAverage, MatrixProduct, Table
from sparkir.quant.prepare import placement_of
from sparkir.quant.reference import IntegerLayer, IntegerLinear, IntegerQuantizer
from sparkir.quant.steps import grid_of_input, made_by

_FLOAT_MODULES = (_ConvNd, InterleavedConv2d, nn.Linear)  # and what is derived, or has one inside
_FLOAT_FUNCTIONS = (
    *(F.conv1d, F.conv2d, F.conv3d, F.linear),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)
_RESHAPES = {
    *(Tensor.flatten, Tensor.reshape, Tensor.unflatten, Tensor.view),
    *(torch.flatten, torch.reshape, torch.unflatten),
}


@torch.library.custom_op("sparkir::qdq", mutates_args=())
def qdq(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: int,
    top: int,
    name: str = "",
    apart: bool = False,
) -> Tensor:
    """Round `x` to stored numbers low .. top and back. scale (), zero () uint8 or int8.

    `name` is that of the call, which the exported node keeps. `apart` puts something between the
    two steps that no runtime fuses across; `x` is (B, C, H, W) then.
    """
    stored = (x / scale).round() + zero
    return (stored.clamp(low, top) - zero) * scale


@torch.library.custom_op("sparkir::dequantize", mutates_args=())
def dequantize(ints: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Real weights or biases: integers (C_out, ...) times scale (C_out,). `zero` is all zeros."""
    return ints.float() * scale.view(-1, *[1] * (ints.dim() - 1))


@torch.library.custom_op("sparkir::average", mutates_args=())
def average(x: Tensor) -> Tensor:
    """The mean of each channel: (B, C, H, W) -> (B, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


@average.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


@qdq.register_fake
def _(x: Tensor, *grid: object) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(ints: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    return ints.new_empty(ints.shape, dtype=torch.float32)


class QdqGrid(nn.Module):
    """A quantize-dequantize pair."""

    def __init__(self, grid: IntegerQuantizer) -> None:
        """The same grid."""
        super().__init__()
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", torch.tensor(grid.stored_zero, dtype=grid.stored_type))
        self.low = grid.stored_zero - grid.zero_level
        self.top = self.low + grid.levels - 1

    def forward(self, x: Tensor, name: str = "", apart: bool = False) -> Tensor:
        """Real values on the grid, for the call of this name."""
        return cast("Tensor", qdq(x, self.scale, self.zero, self.low, self.top, name, apart))


class QdqLayer(nn.Module):
    """A layer over real values whose weights and bias are dequantized integers."""

    def __init__(
        self,
        layer: IntegerLayer,
        *,
        in_rows: bool = True,
        adds_bias: bool = False,
        says_zero: bool = False,
    ) -> None:
        """The same layer.

        Args:
            layer: of the integer network.
            in_rows: a linear layer takes all pixels as one matrix. As a product of a tensor and a
                matrix, ONNX Runtime would add its bias in float.
            adds_bias: a convolution's bias is added behind it. As a part of it, OpenVINO gives
                the first's to all channels where a network has a matrix product behind a reshaping.
            says_zero: a convolution's weights have zero points, of zeros. Where it reads real
                values, ONNX Runtime on x86 without VNNI gives all channels one and stops.
        """
        super().__init__()
        self.layer, self.in_rows = layer, in_rows
        self.adds_bias = adds_bias and layer.weight.dim() == 4 and layer.bias is not None
        # Without a zero point, even of zeros, ONNX Runtime keeps a Gemm in floating point.
        needs_zero = says_zero or layer.weight.dim() == 2
        zero = layer.weight.new_zeros(len(layer.weight)) if needs_zero else None
        self.register_buffer("zero", zero)

    def forward(self, x: Tensor) -> Tensor:
        """Real values in and out."""
        layer = self.layer
        weight = dequantize(layer.weight, layer.weight_scale, self.zero)
        bias = None if layer.bias is None else self._bias(layer.bias)
        if self.adds_bias:
            return layer.apply_weights(x, weight, None) + cast("Tensor", bias)
        if weight.dim() == 2 and x.dim() > 2 and self.in_rows:
            rows = layer.apply_weights(x.flatten(0, -2), weight, bias)
            return rows.reshape(*x.shape[:-1], -1)
        return layer.apply_weights(x, weight, bias)

    def _bias(self, bias: Tensor) -> Tensor:
        shaped = bias.view(-1, 1, 1) if self.adds_bias else bias
        return cast("Tensor", dequantize(shaped, self.layer.sum_scale))


class OnIntegers(nn.Module):
    """An operation of fixed bits, whose integers are found again behind the pair that made them."""

    scale: Tensor
    zero: Tensor

    def __init__(self, operation: nn.Module, grid: IntegerQuantizer) -> None:
        """Wrap `operation`, which reads `grid`."""
        super().__init__()
        self.operation = operation
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero_point)

    def forward(self, x: Tensor, *rest: object) -> Tensor:
        """Real values in and out."""
        ints = (x / self.scale).round()
        return cast("Tensor", self.operation(Quantized(ints, self.scale, self.zero), *rest))


class QdqAverage(nn.Module):
    """The mean of each channel over the image, under the name that runtimes know."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        return cast("Tensor", average(x))


def to_qdq(frozen: fx.GraphModule) -> fx.GraphModule:
    """A copy of an integer network in QDQ form."""
    view: Any = copy.deepcopy(frozen)
    find_integers(view)
    runs_on = placement_of(frozen).spec.runs_on
    fuses = runs_on.fuses
    adds_bias = fuses and _multiplies_reshaped(view)
    words: Any = {"in_rows": not fuses, "adds_bias": adds_bias, "says_zero": fuses}
    for name, module in list(view.named_modules()):
        if isinstance(module, IntegerQuantizer):
            view.set_submodule(name, QdqGrid(module))
        elif isinstance(module, IntegerLayer):
            view.set_submodule(name, QdqLayer(module, **words))
        elif isinstance(module, GlobalAverage):
            view.set_submodule(name, QdqAverage())
    for call in grid_calls(view):
        call.args = (*call.args, call.name)
    _keep_in_float(view)
    if runs_on.runtime == "openvino":
        _keep_apart(view)
    view.recompile()
    return cast("fx.GraphModule", view)


def _multiplies_reshaped(view: fx.GraphModule) -> bool:
    """Whether a network reshapes tensors and multiplies matrices."""
    modules = list(view.modules())
    reshapes = any(isinstance(m, Call) and m.function in _RESHAPES for m in modules)
    return reshapes and any(isinstance(m, IntegerLinear | MatrixProduct) for m in modules)


def find_integers(view: fx.GraphModule) -> None:
    """Let operations of fixed bits have the integers of the grid that they read."""
    modules = dict(view.named_modules())
    for node in view.graph.nodes:
        operation = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(operation, Fixed):
            grid = cast("IntegerQuantizer", modules[grid_of_input(node, modules)])
            view.set_submodule(str(node.target), OnIntegers(operation, grid))


def _keep_in_float(view: fx.GraphModule) -> None:
    """Put a bound that nothing reaches before what ONNX Runtime would not leave in float.

    Between a bare DequantizeLinear and a QuantizeLinear it takes it upon itself to round the
    weights of a convolution to 8 bits (its pass WeightBiasQuantization), and of a softmax makes one
    of its own on 8 bits, which is off by a level in a quarter of the values.
    """
    largest = torch.finfo(torch.float32).max
    for node in view.graph.nodes:
        module = view.get_submodule(str(node.target)) if node.op == "call_module" else None
        inside = () if module is None else module.modules()
        weighs = any(isinstance(part, _FLOAT_MODULES) for part in inside)
        if weighs or node.target in _FLOAT_FUNCTIONS or is_exponential(node, view):
            source = node.all_input_nodes[0]
            with view.graph.inserting_before(node):
                bounded = view.graph.call_function(torch.clamp, (source, -largest, largest))
            node.replace_input_with(source, bounded)


def _keep_apart(view: fx.GraphModule) -> None:
    """Let nothing be fused across the grid of a function of one value that an addition reads.

    OpenVINO makes one kernel of a convolution, the function behind it and the addition, and of the
    grids in it rounds to the last alone.
    """
    modules = dict(view.named_modules())

    for node in view.graph.nodes:
        if not isinstance(modules.get(str(node.target)), Add):
            continue
        for source in node.all_input_nodes:
            call = made_by(source, modules, Dequantize, Tap)
            function = made_by(call, modules, QdqGrid, Tap)
            if not isinstance(modules.get(str(function.target)), Table):
                continue
            layer_call = made_by(function, modules, Table, Dequantize, QdqGrid, Tap)
            layer = modules.get(str(layer_call.target))
            if isinstance(layer, QdqLayer) and layer.layer.weight.dim() == 4:
                call.args = (*call.args[:2], True)


def grid_calls(network: fx.GraphModule) -> list[fx.Node]:
    """The calls of grids, in order, of an integer network or its QDQ form: one pair each."""
    return [
        node
        for node in network.graph.nodes
        if node.op == "call_module"
        and isinstance(network.get_submodule(str(node.target)), IntegerQuantizer | QdqGrid)
    ]
