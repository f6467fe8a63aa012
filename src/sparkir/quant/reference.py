"""The integer network: what a prepared student becomes when training is over.

Weights are int8, biases int32, and every value between two layers a whole number on its grid. It
computes what ONNX Runtime's integer kernels compute, bit for bit, and what the student computes
in evaluation mode. It is what gets evaluated, exported and compared against.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparkir.errors import SparkirError
from sparkir.quant.arithmetic import Accumulated, Quantized, Value, quantize
from sparkir.quant.convolve import convolve_integers
from sparkir.quant.fixed import FixedSoftmax
from sparkir.quant.layers import PassThrough, QuantConv2d, QuantLayer, Table, as_constant
from sparkir.quant.prepare import carry_facts, placement_of
from sparkir.quant.quantizer import ActivationQuantizer
from sparkir.quant.spec import STORED_BITS
from sparkir.quant.steps import grid_of_input, leave_ties

_EXACT_FLOAT32 = 2**24
"""Below it every whole number is a float32."""
_HALF = 16
"""A weight of eight bits is so many times -8 .. 8, and a rest of -8 .. 7: its halves."""
_INT32 = 2**31
_STEP_BYTES = _BIAS_BYTES = 4


class IntegerQuantizer(nn.Module):
    """A grid that no longer changes."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        """Freeze `quantizer`.

        Raises:
            SparkirError: nobody has calibrated it.
        """
        super().__init__()
        if not bool(quantizer.scale().isfinite()):
            raise SparkirError("the student has no grids yet; calibrate it before you freeze it")
        self.register_buffer("scale", quantizer.scale().detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        self.levels, self.zero_level = quantizer.levels, quantizer.zero_level
        self.signed, self.shift_reals = quantizer.signed, quantizer.shift_reals

    def forward(self, value: Value) -> Quantized:
        """Round `value` to the grid."""
        if isinstance(value, Quantized) and value.zero is self.zero_point:
            return value
        return quantize(
            value,
            scale=self.scale,
            zero=self.zero_point,
            zero_level=self.zero_level,
            levels=self.levels,
            exact=True,
            shift_reals=self.shift_reals,
        )

    @property
    def stored_zero(self) -> int:
        """The stored number that means zero."""
        return 0 if self.signed else self.zero_level

    @property
    def stored_type(self) -> torch.dtype:
        """Of the stored numbers."""
        return torch.int8 if self.signed else torch.uint8

    def stored(self, value: Quantized) -> Tensor:
        """The bytes of a value on this grid."""
        return (value.ints + self.stored_zero).to(self.stored_type)

    def loaded(self, stored: Tensor) -> Quantized:
        """A value on this grid from its bytes."""
        return Quantized(stored.float() - self.stored_zero, self.scale, self.zero_point)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"levels={self.levels}, zero={self.zero_level}, scale={float(self.scale):.4g}"


class IntegerLayer(nn.Module):
    """A convolution or linear layer with int8 weights and an int32 bias."""

    weight: Tensor
    """(C_out, ...) int8."""
    bias: Tensor | None
    """(C_out,) int32."""
    weight_scale: Tensor
    """(C_out,) float32."""
    sum_scale: Tensor
    """(C_out,) float32, the step of sums and bias."""

    def __init__(self, layer: QuantLayer, name: str, source: IntegerQuantizer) -> None:
        """Freeze `layer`, which reads the grid of `source`."""
        super().__init__()
        weight, bias, scale = layer.integers(source.scale)
        self.register_buffer("weight", weight.detach().to(torch.int8))
        self.register_buffer("weight_scale", layer.weight_scale(source.scale).detach().clone())
        self.register_buffer("sum_scale", scale.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.int32))
        farthest = max(source.zero_level, source.levels - 1 - source.zero_level)
        largest = _largest_sum(self.weight, self.bias, farthest)
        if largest >= _INT32:
            raise SparkirError(
                f"the sums of {name} can reach {largest:.3g}, more than the int32 of every runtime "
                "holds: what it reads is tiny beside its bias. Leave it in float with "
                "quant.float_layers"
            )
        high, low = _halves(self.weight)
        halves = _largest_sum(high, None, farthest), _largest_sum(low, self.bias, farthest)
        self.in_halves = max(halves) < _EXACT_FLOAT32 <= largest
        self.compute_type = torch.float64 if max(halves) >= _EXACT_FLOAT32 else torch.float32

    def sums(self, x: Quantized) -> Tensor:
        """The int32 sums, as whole numbers in float32.

        Where those of a layer may leave what float32 holds, those of each half of its weights are
        taken, which is several times faster than float64.
        """
        ints = x.ints.to(self.compute_type)
        bias = None if self.bias is None else self.bias.to(self.compute_type)
        if not self.in_halves:
            return self.multiply(ints, x.zero, self.weight.to(self.compute_type), bias).float()
        high, low = _halves(self.weight)
        coarse = self.multiply(ints, x.zero, high, None).int()
        return (coarse * _HALF + self.multiply(ints, x.zero, low, bias).int()).float()

    def multiply(self, ints: Tensor, zero: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `apply_weights`, of integers only: with `zero` added, they are bytes."""
        return self.apply_weights(ints, weight, bias)

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation, for integers and for real values alike."""
        raise NotImplementedError


class IntegerConv2d(IntegerLayer):
    """A convolution with int8 weights."""

    def __init__(self, layer: QuantConv2d, name: str, source: IntegerQuantizer) -> None:
        """Freeze `layer`."""
        super().__init__(layer, name, source)
        self.geometry = layer.geometry

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        return self.geometry.convolve(x, weight, bias)

    def multiply(self, ints: Tensor, zero: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `apply_weights`, of integers only: with `zero` added, they are bytes."""
        return convolve_integers(ints, zero, weight, bias, self.geometry)

    def forward(self, x: Quantized) -> Accumulated:
        """Grid values -> sums."""
        return Accumulated(self.sums(x), self.sum_scale.view(-1, 1, 1))


class IntegerLinear(IntegerLayer):
    """A linear layer with int8 weights."""

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        return F.linear(x, weight, bias)

    def forward(self, x: Quantized) -> Accumulated:
        """Grid values -> sums."""
        return Accumulated(self.sums(x), self.sum_scale)


def _halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) of int8 weights, in float32: weight = 16 high + low."""
    high = ((weight.float() + _HALF / 2) / _HALF).floor()
    return high, weight.float() - _HALF * high


def _largest_sum(weight: Tensor, bias: Tensor | None, farthest: int) -> float:
    """The largest sum of a layer, of any sign, over integers of at most `farthest`."""
    sums = weight.double().abs().flatten(1).sum(1) * farthest
    return float((sums if bias is None else sums + bias.double().abs()).max())


@torch.no_grad()
def freeze(student: fx.GraphModule) -> fx.GraphModule:
    """The integer network of a prepared and calibrated student; the student is left as it is.

    Of a function's table whose entries lie on ties the step is another by a few parts in 10,000
    (`steps.leave_ties`). The graph stays the same node for node, so that layers keep their names.

    Raises:
        SparkirError: the student is not calibrated, or sums of a layer do not fit int32.
    """
    frozen: Any = copy.deepcopy(student).eval().cpu()
    leave_ties(frozen)
    grids: dict[str, IntegerQuantizer] = {}
    modules = dict(frozen.named_modules())
    for node in frozen.graph.nodes:
        if node.op != "call_module":
            continue
        name, module = str(node.target), frozen.get_submodule(str(node.target))
        if isinstance(module, ActivationQuantizer):
            grids[name] = IntegerQuantizer(module)
            frozen.set_submodule(name, grids[name])
        elif isinstance(module, QuantLayer):
            source = grids[grid_of_input(node, modules)]
            kind = IntegerConv2d if isinstance(module, QuantConv2d) else IntegerLinear
            frozen.set_submodule(name, kind(cast("Any", module), name, source))
        elif isinstance(module, FixedSoftmax):
            _keep_biases(frozen, node, module, grids[grid_of_input(node, modules)])
        elif isinstance(module, PassThrough):
            module.shuffles = None  # of channels in their own order
        elif isinstance(module, Table):
            frozen.set_submodule(name, Table(as_constant(module.operation)))
    frozen.graph.eliminate_dead_code()
    frozen.recompile()
    carry_facts(student, frozen)
    return cast("fx.GraphModule", frozen)


def _keep_biases(
    frozen: fx.GraphModule, node: fx.Node, softmax: FixedSoftmax, source: IntegerQuantizer
) -> None:
    """Give a softmax its table of biases, rounded to parts of the step of `source`."""
    scores, table, *rest = node.args
    owner, _, name = str(cast("fx.Node", table).target).rpartition(".")
    learned = getattr(frozen.get_submodule(owner), name)
    softmax.levels = softmax.rounded(learned, source.scale)
    node.args = (scores, None, *rest)


def same_weights(frozen: nn.Module) -> list[list[str]]:
    """The layers of an integer network, in groups of the same integers, which a file stores once.

    They are those of a layer that is called again, and of constants.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in placement_of(frozen).layers:
        weight = cast("IntegerLayer", frozen.get_submodule(name)).weight
        groups.setdefault((*weight.shape, weight.numpy().tobytes()), []).append(name)
    return list(groups.values())


def stored_bytes(frozen: nn.Module) -> int:
    """Bytes of an integer network's weights, as files pack them, of its biases and its steps.

    What stayed in floating point counts as it is.
    """
    placement = placement_of(frozen)
    grids = sum(isinstance(module, IntegerQuantizer) for module in frozen.modules())
    total = grids * (_STEP_BYTES + 1)
    for group in same_weights(frozen):
        layers = [cast("IntegerLayer", frozen.get_submodule(name)) for name in group]
        bits, _ = placement.layers[group[0]]
        packed = next(width for width in STORED_BITS if width >= bits)
        total += -(-layers[0].weight.numel() * packed // 8)
        for layer in layers:
            rows = _STEP_BYTES + (0 if layer.bias is None else _BIAS_BYTES)
            total += len(layer.weight) * rows
    return total + _float_bytes(frozen)


def _float_bytes(frozen: nn.Module) -> int:
    """Bytes of all that belongs neither to a layer of integers nor to a grid."""
    counted = IntegerLayer | IntegerQuantizer
    tensors = {
        id(tensor): tensor
        for module in frozen.modules()
        if not isinstance(module, counted)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
