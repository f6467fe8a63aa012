"""Float network -> network for quantization-aware training: every grid in its place.

The placement is ONNX Runtime's: an integer kernel reads grids and writes a grid. What a tensor's
grid is, its readers decide. A tensor read only by convolutions of one bit width takes that width;
one that is only added, looked up or shuffled is carried at 8 bits; one that does both is carried
at 8 bits and rounded again for the convolution. All parts of a concatenation share one grid, so
that nothing is rounded twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from sparkir.errors import SparkirError, did_you_mean
from sparkir.models.facts import ModelFacts, facts_of
from sparkir.models.modes import device_of
from sparkir.quant.fixed import fixed
from sparkir.quant.graph import (
    Kind,
    classify,
    dimension_of,
    is_constant,
    is_exponential,
    parts_of,
    reason_for_float,
    trace,
)
from sparkir.quant.interpolate import is_interpolation, make_interpolation_exact
from sparkir.quant.layers import (
    AbsorbedReLU,
    Add,
    Call,
    Concatenate,
    Dequantize,
    GlobalAverage,
    MatrixProduct,
    Multiply,
    PassThrough,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    Table,
)
from sparkir.quant.quantizer import ActivationQuantizer, leave_in_float
from sparkir.quant.rewrite import rewrite
from sparkir.quant.rows import shuffle_in_rows
from sparkir.quant.spec import CARRIER_BITS, QuantSpec
from sparkir.quant.steps import restrict_steps
from sparkir.quant.together import take_steps_together

_INTERPOLATED = 0.1
"""Of the output: bilinear weights are whole parts of 128 (`interpolate`)."""
EXAMPLE_PX = 48
_OWN_NAMES = {
    *("code", "dequantize", "graph", "meta", "operations", "placement", "quantizers"),
    *("rewritten", "taps", "to_image"),
}
"""What a prepared network calls its own parts."""
_MORE_PX = 16


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was quantized, and what was not, and why."""

    spec: QuantSpec
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Layer name -> (weight bits, bits of the tensor it reads)."""
    left_in_float: dict[str, str] = field(default_factory=dict)
    """Operation -> reason."""


@dataclass(frozen=True)
class _Request:
    """The grid that a reader of a tensor asks for."""

    what: str
    """`bits`, `image`, `concatenation`, `float`, or `sums` (no grid yet: a ReLU is absorbed)."""
    bits: int = CARRIER_BITS
    owner: fx.Node | None = None
    """The concatenation."""


def carry_facts(original: nn.Module, duplicate: nn.Module) -> None:
    """Give a copy what the original carries: copying a graph leaves attributes behind."""
    for name in ("facts", "placement"):
        if hasattr(original, name):
            setattr(duplicate, name, getattr(original, name))


def placement_of(network: nn.Module) -> Placement:
    """What a prepared or frozen network carries."""
    placement = getattr(network, "placement", None)
    assert isinstance(placement, Placement), "not a prepared network"
    return placement


_FLOAT, _SUMS, _IMAGE, _CARRIER = (_Request(w) for w in ("float", "sums", "image", "bits"))
_WRITES_A_GRID = {Kind.LAYER, Kind.ADD, Kind.MULTIPLY, Kind.TABLE, Kind.CONCATENATE}
_WRITES_A_GRID |= {Kind.AVERAGE, Kind.MATRIX_PRODUCT}
_PASSES = {Kind.PASS, Kind.RELU, Kind.TAP}
_ABSORBS_RELU = {Kind.LAYER, Kind.ADD, Kind.MULTIPLY}


def _is_narrow(asked: set[_Request]) -> bool:
    """Whether somebody asks for fewer bits than sums travel in."""
    return any(request.what == "bits" and request.bits < CARRIER_BITS for request in asked)


def prepare(network: nn.Module, spec: QuantSpec) -> fx.GraphModule:
    """A copy of `network` with quantizers, its float weights kept as parameters.

    The result is uncalibrated: run `calibrate` before use. It carries `facts` like the network,
    `placement` with what was and was not quantized, and one submodule `taps.<name>` for each of
    the network's feature taps. It maps (B, C, H, W) in the network's value range to the output
    image on the image's own grid of 256 levels: what a PNG file would hold.

    Raises:
        SparkirError: the forward cannot be traced, does not take the images that the facts promise,
            or returns several values; or `spec` leaves layers in float that there are not.
    """
    _require_plain(network)
    facts, device = facts_of(network), device_of(network)
    network = copy.deepcopy(network).cpu()  # where grids and constants are made
    module = trace(copy.deepcopy(network).eval(), facts.taps)  # examples must teach it nothing
    side = example_px(facts, at_least=EXAMPLE_PX)
    draw = torch.Generator().manual_seed(0)
    example = torch.rand(1, facts.channels, side, side, generator=draw) * facts.value_range
    more = example_px(facts, at_least=side + _MORE_PX) - side
    larger = F.pad(example, (0, more, 0, more))
    original, _ = _outputs(network, example, larger)
    if not _computes(original, module, example):
        raise SparkirError(
            f"{type(network).__name__} computes something else when traced: its forward changes a "
            "tensor in place that it also uses under another name; write y = x + ... instead of "
            "x += ..."
        )
    rewrite(module, example, larger, constant_bits=spec.most_weight_bits)
    make_interpolation_exact(module, example)
    plan = _Plan(module, classify(module, example), spec)
    prepared = _Rewriter(module, plan, image_step=facts.value_range / 255).run()
    setattr(prepared, "facts", facts)  # noqa: B010 - for mypy
    leave_in_float(prepared, on=True)
    same = _computes(original, prepared, example, within=_INTERPOLATED)
    leave_in_float(prepared, on=False)
    if not same:
        raise SparkirError(
            f"{type(network).__name__} would compute something else in layers of integers; please "
            "report this with its forward"
        )
    prepared.train(network.training)
    take_steps_together(prepared)
    shuffle_in_rows(prepared)
    return prepared.to(device)


@torch.no_grad()
def _outputs(network: nn.Module, *images: Tensor) -> list[object]:
    """What it makes of images of several sizes, whatever that is.

    Raises:
        SparkirError: it does not take one of them.
    """
    restoring, found = copy.deepcopy(network).eval(), []
    for image in images:
        try:
            found.append(restoring(image))
        except Exception as error:  # of the user's code, which may raise anything
            _, channels, height, width = image.shape
            raise SparkirError(
                f"{type(network).__name__} does not take an image of {width}x{height} px and "
                f"{channels} channels, as its facts promise ({error}); set channels, size_multiple "
                "and min_size_px of its ModelFacts, and let its forward take any size"
            ) from error
    return found


def _require_plain(network: nn.Module) -> None:
    """Stop now if a layer's weight is made of others, or something has a name that is needed here.

    Raises:
        SparkirError: the message says what to call or to rename.
    """
    for name, module in network.named_modules():
        hooks = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
        if is_parametrized(module) or hooks & {"WeightNorm", "SpectralNorm"}:
            raise SparkirError(
                f"the weight of {name} is made anew for every call (weight_norm, spectral_norm or "
                "the like), and what is quantized is the weight itself; call "
                "torch.nn.utils.remove_weight_norm, remove_spectral_norm or "
                "parametrize.remove_parametrizations first"
            )
    own = {*network._modules, *network._parameters, *network._buffers}
    for name in sorted(own & _OWN_NAMES):
        raise SparkirError(
            f"{type(network).__name__}.{name} has a name that quantized networks use for something "
            "else; rename it"
        )


@torch.no_grad()
def _computes(
    original: object, network: nn.Module, example: Tensor, *, within: float = 1e-3
) -> bool:
    """Whether `network` makes of `example` what the original did.

    Tracing follows values, not memory: writing into a tensor that has two names escapes it.
    """
    found = copy.deepcopy(network)(example)
    if not isinstance(original, Tensor) or not isinstance(found, Tensor):
        return True  # refused elsewhere, with a better reason
    atol = within * float(original.abs().nan_to_num().mean())
    return torch.allclose(original, found, rtol=within, atol=atol, equal_nan=True)


def example_px(facts: ModelFacts, *, at_least: int) -> int:
    """Height or width of an image that the network can take."""
    smallest = max(at_least, facts.min_size_px)
    return smallest + -smallest % facts.size_multiple


def _function(node: fx.Node) -> Callable[..., Tensor]:
    """What a call of a function or method calls."""
    return cast(
        "Callable[..., Tensor]",
        getattr(Tensor, node.target) if isinstance(node.target, str) else node.target,
    )


class _Plan:
    """Which grid every tensor gets, decided from its readers backwards."""

    def __init__(self, module: fx.GraphModule, kinds: dict[fx.Node, Kind], spec: QuantSpec) -> None:
        self.spec, self.kinds, self.fuses = spec, kinds, spec.runs_on.fuses
        self.tensors = [n for n in module.graph.nodes if kinds[n] is not Kind.NOT_A_TENSOR]
        self.constant = {n for n in self.tensors if is_constant(n, module)}
        self.edge_layers = self._reached_layers(Kind.INPUT) | self._reached_layers(Kind.OUTPUT)
        self.left_out = dict.fromkeys(self._chosen_layers(), "the recipe's float_layers name it")
        if spec.runs_on.int8_only:
            why = "it reads the image, whose 256 levels no int8 holds"
            self.left_out |= dict.fromkeys(self._reached_layers(Kind.INPUT), why)
        self.kinds = kinds | dict.fromkeys(self.left_out, Kind.FLOAT)
        # Runtimes approximate some of these functions, and the product of sums and a slope has more
        # bits than float32; a grid on either side makes them a table for all.
        self.tables = {n for n in self.tensors if kinds[n] is Kind.TABLE}
        self.on_carriers = self._on_carriers(module)
        self.absorbed: set[fx.Node] = set()
        self.owners: dict[fx.Node, fx.Node] = {}
        self.asked: dict[fx.Node, set[_Request]] = {n: set() for n in self.tensors}
        for node in reversed(self.tensors):
            if self._can_be_absorbed(node):
                self.absorbed.add(node)
            elif self._is_rectified_part(node):
                self.kinds = self.kinds | {node: Kind.TABLE}
            if self.kinds[node] is Kind.CONCATENATE:
                self.owners[node] = self._owner_of(node)
            for source in self.tensor_inputs(node):
                self.asked[source].add(self.request_of(node))

    def tensor_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of `node` that depend on the image."""
        return [n for n in node.all_input_nodes if self.kinds[n] is not Kind.NOT_A_TENSOR]

    def reading_bits(self, layer: fx.Node) -> int:
        """Bits of the tensor that `layer` reads."""
        if layer in self.constant:
            return CARRIER_BITS
        spec = self.spec
        return spec.first_last_bits if layer in self.edge_layers else spec.activation_bits

    def weight_bits(self, layer: fx.Node) -> int:
        """Bits of `layer`'s weights."""
        spec = self.spec
        if layer in self.constant:
            return spec.most_weight_bits
        bits = spec.first_last_bits if layer in self.edge_layers else spec.weight_bits
        return min(bits, spec.most_weight_bits)

    def request_of(self, node: fx.Node) -> _Request:
        """What `node` asks of the tensors it reads."""
        match self.kinds[node]:
            case Kind.LAYER:
                return _Request("bits", self.reading_bits(node))
            case Kind.CONCATENATE:
                on_grid = self.grid_of(node) is not None
                owner = self.owners[node]
                return _Request("concatenation", owner=owner) if on_grid else _FLOAT
            case Kind.RELU if node in self.absorbed:
                return _SUMS
            case Kind.TAP if self.asked[node] == {_SUMS}:
                return _SUMS
            case Kind.PASS | Kind.RELU | Kind.TAP:
                return self.grid_of(node) or _FLOAT
            case Kind.OUTPUT:
                return _FLOAT if self.spec.runs_on.int8_only else _IMAGE
            case Kind.FLOAT:
                return _FLOAT
            case Kind.FIXED:
                return _CARRIER
            case _:
                return _FLOAT if self.fuses and node not in self.tables else _CARRIER

    def grid_of(self, node: fx.Node) -> _Request | None:
        """The grid on which `node`'s result is made; None when it is not on one."""
        if self.kinds[node] is Kind.INPUT:
            return None if self.spec.runs_on.int8_only else _IMAGE
        asked = self.asked[node] - {_FLOAT}
        if asked == {_SUMS}:
            return None
        if self.fuses and _FLOAT in self.asked[node] and _is_narrow(asked):
            return _CARRIER
        if len(asked) == 1:
            return next(iter(asked))
        if asked or node in self.absorbed:
            return _CARRIER
        writes = self.kinds[node] in _WRITES_A_GRID and not self.fuses
        return _CARRIER if writes or node in self.on_carriers else None

    def _chosen_layers(self) -> set[fx.Node]:
        """The layers that the recipe leaves in floating point."""
        layers = [n for n in self.tensors if self.kinds[n] is Kind.LAYER and n not in self.constant]
        found: set[fx.Node] = set()
        for pattern in self.spec.float_layers:
            named = {n for n in layers if fnmatchcase(str(n.target), pattern)}
            if not named:
                names = list(dict.fromkeys(str(n.target) for n in layers))
                hint = did_you_mean(pattern, names, listed="layers")
                raise SparkirError(f"quant.float_layers: no layer is called {pattern!r}; {hint}")
            found |= named
        return found

    def _on_carriers(self, module: fx.GraphModule) -> set[fx.Node]:
        """What must be made on a grid, although its readers take real values.

        No two libraries compute an exponential alike; and where real values flow, a product of
        them is exact only if few bits come in, and so is an interpolation.
        """
        found = {n for n in self.tensors if n in self.tables or is_exponential(n, module)}
        multiplies = (Kind.MULTIPLY, Kind.MATRIX_PRODUCT, Kind.AVERAGE)
        for node in self.tensors if self.fuses else []:
            if self.kinds[node] in multiplies or is_interpolation(node, module):
                found.update(self._maker(source) for source in self.tensor_inputs(node))
        return found

    def _maker(self, node: fx.Node) -> fx.Node:
        """What made a tensor, before it was moved."""
        while self.kinds[node] in (Kind.TAP, Kind.PASS):
            (node,) = self.tensor_inputs(node)
        return node

    def _can_be_absorbed(self, node: fx.Node) -> bool:
        """A ReLU whose own grid can do its work, right behind a layer that feeds only it."""
        if self.kinds[node] is not Kind.RELU:
            return False
        grid = self.grid_of(node)
        if self.spec.runs_on.int8_only or (grid is None and self.fuses):
            return False
        if grid is not None and grid.what == "concatenation":
            return False
        (source,) = self.tensor_inputs(node)
        while self.kinds[source] is Kind.TAP and len(source.users) == 1:
            (source,) = self.tensor_inputs(source)
        return self.kinds[source] in _ABSORBS_RELU and len(source.users) == 1

    def _owner_of(self, concatenation: fx.Node) -> fx.Node:
        """Whose grid a concatenation is made on: that of a later one which shares a part with it.

        As in dense blocks, whose every step reads all results so far; a grid for each would have
        them rounded for each.
        """
        grid, parts = self.grid_of(concatenation), self.tensor_inputs(concatenation)
        owners = {request.owner for part in parts for request in self.asked[part]}
        sharing = [n for n in self.tensors if n in owners and self.grid_of(n) == grid]
        return sharing[-1] if sharing else concatenation

    def _is_rectified_part(self, node: fx.Node) -> bool:
        """A ReLU between sums and a concatenation, for a runtime that fuses.

        Behind the concatenation's grid, whose zero may lie anywhere, OpenVINO would do it in
        floating point, and the concatenation and its readers with it. Ahead of the grid it makes
        the same integers.
        """
        if self.kinds[node] is not Kind.RELU or not self.fuses:
            return False
        grid = self.grid_of(node)
        (source,) = self.tensor_inputs(node)
        sums = self.kinds[source] in _ABSORBS_RELU and len(source.users) == 1
        return sums and grid is not None and grid.what == "concatenation"

    def _reached_layers(self, start: Kind) -> set[fx.Node]:
        """Layers met first when walking from the image, or back from the output."""
        waiting = [n for n in self.tensors if self.kinds[n] is start]
        found: set[fx.Node] = set()
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            for near in node.users if start is Kind.INPUT else self.tensor_inputs(node):
                if near in seen or self.kinds[near] is Kind.NOT_A_TENSOR:
                    continue
                seen.add(near)
                if self.kinds[near] is Kind.LAYER and near not in self.constant:
                    found.add(near)
                else:
                    waiting.append(near)
        return found


class _Rewriter:
    """Carries the plan out, node by node in the order of execution."""

    def __init__(self, module: fx.GraphModule, plan: _Plan, *, image_step: float) -> None:
        self.module, self.graph, self.plan = module, module.graph, plan
        self.image_step = image_step
        self.placement = Placement(spec=plan.spec)
        self.grids: dict[tuple[fx.Node, _Request], str] = {}
        self.made: dict[tuple[fx.Node, _Request], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        """Rewrite the whole graph."""
        for node in list(self.graph.nodes):
            kind = self.plan.kinds[node]
            self._read(node)
            if kind is Kind.OUTPUT:
                self._return_image(node)
            elif kind is not Kind.NOT_A_TENSOR:
                self._swap(node)
                self._write(node)
        self.graph.lint()
        self.module.delete_all_unused_submodules()
        spec = self.plan.spec
        if spec.runs_on.any_order:
            # Without VNNI, OpenVINO halves the weights of a layer that reads int8, and rounds them.
            signed = not spec.reduce_range
            restrict_steps(self.module, fuses=spec.runs_on.fuses, signed=signed)
        self.module.recompile()
        setattr(self.module, "placement", self.placement)  # noqa: B010 - for mypy
        return self.module

    def _read(self, node: fx.Node) -> None:
        """Point `node` at its inputs on the grid it asks for."""
        sizes = self.plan.kinds[node] is Kind.NOT_A_TENSOR  # asks for them only, or for a device
        request = _FLOAT if sizes else self.plan.request_of(node)
        for source in self.plan.tensor_inputs(node):
            node.replace_input_with(source, self._on_grid(source, request, before=node))

    def _on_own_grid(self, source: fx.Node) -> fx.Node:
        own = self.plan.grid_of(source)
        return self.made[source, own] if own else source

    def _on_grid(self, source: fx.Node, request: _Request, *, before: fx.Node) -> fx.Node:
        """`source` as `request` wants it, made once."""
        own, made = self.plan.grid_of(source), self._on_own_grid(source)
        if own is None and not self._is_sums(source, request):
            return made
        if own == _IMAGE and request == _CARRIER:
            return made  # the image's own grid has 8 bits
        if (source, request) not in self.made:
            with self.graph.inserting_before(before):
                if request == _FLOAT:
                    made = self._call(f"dequantize.{source.name}", Dequantize(), made)
                else:
                    made = self.graph.call_module(self._grid(source, request), (made,))
            self.made[source, request] = made
        return self.made[source, request]

    def _is_sums(self, source: fx.Node, request: _Request) -> bool:
        """Whether a layer's sums, on no grid, are wanted as real values."""
        return self.plan.kinds[source] is Kind.LAYER and request == _FLOAT

    def _swap(self, node: fx.Node) -> None:
        """Turn the operation into its integer layer, in place."""
        on_grid = self.plan.grid_of(node) is not None
        match self.plan.kinds[node]:
            case Kind.LAYER:
                self._swap_layer(node)
            case Kind.ADD:
                self._become(node, Add())
            case Kind.MULTIPLY:
                self._become(node, Multiply())
            case Kind.CONCATENATE:
                self._become(node, Concatenate(dimension_of(node)), parts_of(node))
            case Kind.TABLE:
                constants = {name: x for name, x in node.kwargs.items() if name != "input"}
                self._become(node, Table(self._operation(node, *node.args[1:], **constants)))
            case Kind.AVERAGE:
                self._become(node, GlobalAverage())
            case Kind.MATRIX_PRODUCT:
                self._become(node, MatrixProduct())
            case Kind.FIXED:
                self._fix(node)
            case Kind.RELU if node in self.plan.absorbed:
                self._become(node, AbsorbedReLU())
            case Kind.PASS:
                self._pass_through(node)
            case Kind.RELU if on_grid:
                self._pass_through(node)
            case Kind.FLOAT:
                own = node.op == "call_module" and str(node.target) != f"operations.{node.name}"
                name = str(node.target) if own else node.name
                reason = self.plan.left_out.get(node) or reason_for_float(node, self.module)
                self.placement.left_in_float[name] = reason
            case _:
                pass

    def _write(self, node: fx.Node) -> None:
        """Put the result on its grid."""
        own = self.plan.grid_of(node)
        if own is None:
            return
        passed = self.plan.kinds[node] in _PASSES and node not in self.plan.absorbed
        if self.plan.fuses and (passed or self.plan.kinds[node] is Kind.CONCATENATE):
            self.made[node, own] = node  # on its grid already
            return
        # What only moves keeps its grid, but a file for kernels of grids must say it again.
        name = str(cast("fx.Node", node.args[0]).target) if passed else self._grid(node, own)
        with self.graph.inserting_after(node):
            self.made[node, own] = self.graph.call_module(name, (node,))

    def _return_image(self, node: fx.Node) -> None:
        (result,) = node.all_input_nodes
        with self.graph.inserting_before(node):
            node.args = (self._call("to_image", Dequantize(), result),)

    def _grid(self, node: fx.Node, request: _Request) -> str:
        """The name of the quantizer for `node` on the grid `request`, made at its first use."""
        if request.owner is not None:
            owner_grid = self.plan.grid_of(request.owner)
            assert owner_grid is not None
            return self._grid(request.owner, owner_grid)
        if request == self.plan.grid_of(node):
            node = self.plan.owners.get(node, node)
        if (node, request) not in self.grids:
            spec = self.plan.spec
            own = self.plan.grid_of(node) == request
            name = f"quantizers.{node.name}" + ("" if own else f"_{request.bits}bit")
            self.module.add_submodule(
                name,
                ActivationQuantizer(
                    bits=request.bits,
                    symmetric=spec.symmetric(request.bits),
                    learned=spec.learned,
                    non_negative=node in self.plan.absorbed,
                    image_step=self.image_step if request == _IMAGE else None,
                    int8_only=spec.runs_on.int8_only,
                ),
            )
            self.grids[node, request] = name
        return self.grids[node, request]

    def _swap_layer(self, node: fx.Node) -> None:
        name, bits = str(node.target), self.plan.weight_bits(node)
        layer = self.module.get_submodule(name)
        linear = isinstance(layer, nn.Linear | QuantLinear)
        kind: Any = QuantLinear if linear else QuantConv2d
        swapped = kind(layer, bits=bits, learned=self.plan.spec.learned)
        if isinstance(layer, QuantLayer):  # called again, and each call reads another grid
            name = node.target = self._unused(name)
        self.module.set_submodule(name, swapped)
        node.args, node.kwargs = tuple(node.all_input_nodes), {}
        self.placement.layers[name] = (bits, self.plan.reading_bits(node))

    def _unused(self, name: str) -> str:
        """`name` with a number that makes it another layer's."""
        number = 2
        while f"{name}_call{number}" in self.placement.layers:
            number += 1
        return f"{name}_call{number}"

    def _operation(self, node: fx.Node, *constants: object, **options: object) -> nn.Module:
        """The node's own operation as a module; of a function, with these constants for good."""
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))
        return Call(_function(node), *constants, **options)

    def _pass_through(self, node: fx.Node) -> None:
        """Make `node` move integers as it moves values; sizes stay its arguments."""
        args, words = node.args, node.kwargs
        self._become(node, PassThrough(self._operation(node)))
        node.args, node.kwargs = args, words

    def _fix(self, node: fx.Node) -> None:
        """Let a normalisation or a softmax read integers; its other arguments stay."""
        name, rest = str(node.target), node.args[1:]
        self.placement.left_in_float[name] = reason_for_float(node, self.module)
        self._become(node, fixed(self.module.get_submodule(name)))
        node.args = (*node.all_input_nodes[:1], *rest)

    def _become(
        self, node: fx.Node, module: nn.Module, inputs: Sequence[fx.Node] | None = None
    ) -> None:
        """Make `node` a call of `module` on its tensor inputs."""
        name = f"operations.{node.name}"
        self.module.add_submodule(name, module)
        node.args = tuple(node.all_input_nodes if inputs is None else inputs)
        node.kwargs = {}
        node.op, node.target = "call_module", name

    def _call(self, name: str, module: nn.Module, value: fx.Node) -> fx.Node:
        self.module.add_submodule(name, module)
        return self.graph.call_module(name, (value,))
