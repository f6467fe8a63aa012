"""Reading a network's graph: tracing it, and what an integer runtime makes of each operation."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparkir.errors import SparkirError
from sparkir.models.attention import BiasedSoftmax
from sparkir.models.normalize import LayerNorm2d
from sparkir.quant.calls import named
from sparkir.quant.fixed import is_fixed
from sparkir.quant.forms import ConstantConv2d, InterleavedConv2d, ScaledConv2d
from sparkir.quant.interpolate import ExactBilinear, repeats_pixels, resize_of
from sparkir.quant.layers import GlobalAverage


class Kind(Enum):
    """How an operation meets integers."""

    INPUT = auto()
    OUTPUT = auto()
    LAYER = auto()
    """Convolution or linear layer: integers times integer weights."""
    ADD = auto()
    MULTIPLY = auto()
    CONCATENATE = auto()
    TABLE = auto()
    """A function of one value: 256 entries, looked up."""
    AVERAGE = auto()
    """The mean of each channel over the image."""
    MATRIX_PRODUCT = auto()
    """Of two tensors of the network."""
    FIXED = auto()
    """In floating point, with every bit fixed."""
    RELU = auto()
    PASS = auto()
    """Moves or selects values, so the grid stays as it is."""
    TAP = auto()
    """Does nothing; its input goes on as it is."""
    FLOAT = auto()
    """Everything else, left in floating point."""
    NOT_A_TENSOR = auto()
    """Sizes and the like, and tensors that follow from them."""


_FUNCTIONS: dict[Any, Kind] = {
    operator.add: Kind.ADD,
    torch.add: Kind.ADD,
    "add": Kind.ADD,
    operator.mul: Kind.MULTIPLY,
    torch.mul: Kind.MULTIPLY,
    "mul": Kind.MULTIPLY,
    torch.cat: Kind.CONCATENATE,
    torch.concat: Kind.CONCATENATE,
    torch.relu: Kind.RELU,
    F.relu: Kind.RELU,
    "relu": Kind.RELU,
    torch.sigmoid: Kind.TABLE,
    F.sigmoid: Kind.TABLE,
    "sigmoid": Kind.TABLE,
    F.leaky_relu: Kind.TABLE,
    F.gelu: Kind.TABLE,
    F.silu: Kind.TABLE,
    operator.matmul: Kind.MATRIX_PRODUCT,
    torch.matmul: Kind.MATRIX_PRODUCT,
    torch.bmm: Kind.MATRIX_PRODUCT,
    "matmul": Kind.MATRIX_PRODUCT,
    "bmm": Kind.MATRIX_PRODUCT,
    F.max_pool2d: Kind.PASS,
    F.pixel_shuffle: Kind.PASS,
    F.pixel_unshuffle: Kind.PASS,
    torch.pixel_shuffle: Kind.PASS,
    torch.pixel_unshuffle: Kind.PASS,
    torch.max_pool2d: Kind.PASS,
    operator.getitem: Kind.PASS,
    F.pad: Kind.PASS,
}
_MOVING = (
    *("amax", "amin", "contiguous", "expand", "flatten", "movedim", "narrow", "permute"),
    *("reshape", "roll", "squeeze", "transpose", "unflatten", "unsqueeze", "view"),
)
_FUNCTIONS |= dict.fromkeys(_MOVING, Kind.PASS)
_FUNCTIONS |= {getattr(torch, n): Kind.PASS for n in _MOVING if hasattr(torch, n)}
_MODULES: dict[type[nn.Module], Kind] = {
    nn.Conv2d: Kind.LAYER,
    ConstantConv2d: Kind.LAYER,
    InterleavedConv2d: Kind.LAYER,
    ScaledConv2d: Kind.LAYER,
    nn.Linear: Kind.LAYER,
    GlobalAverage: Kind.AVERAGE,
    nn.ReLU: Kind.RELU,
    nn.Sigmoid: Kind.TABLE,
    nn.LeakyReLU: Kind.TABLE,
    nn.PReLU: Kind.TABLE,
    nn.GELU: Kind.TABLE,
    nn.SiLU: Kind.TABLE,
    nn.MaxPool2d: Kind.PASS,
    nn.PixelShuffle: Kind.PASS,
    nn.PixelUnshuffle: Kind.PASS,
    nn.Identity: Kind.PASS,
}
_EXPONENTIAL = "an exponential needs more than 8 bits"
_NORMALISATION = "a normalisation needs the real statistics"
REASONS: dict[Any, str] = {
    nn.ConvTranspose2d: "it does not enlarge by its stride exactly, or has groups or dilation",
    nn.PReLU: "it has a slope for every channel, and a table only one",
    nn.LayerNorm: _NORMALISATION,
    LayerNorm2d: _NORMALISATION,
    F.layer_norm: _NORMALISATION,
    nn.BatchNorm2d: "fold it into its convolution first",
    nn.Softmax: _EXPONENTIAL,
    BiasedSoftmax: _EXPONENTIAL,
    nn.Upsample: "interpolation makes values between grid points",
    F.interpolate: "interpolation makes values between grid points",
    ExactBilinear: "interpolation makes values between grid points",
    operator.sub: "ONNX Runtime has no integer subtraction",
    torch.sub: "ONNX Runtime has no integer subtraction",
    F.conv2d: "its weights are constants that 8 bits do not hold",
    F.pad: "it pads with another constant than zero",
}


class Tap(nn.Identity):
    """Marks where a composite submodule ended, so that its output can still be hooked."""

    factor: Tensor | None
    """(C, 1, 1), by which channels were scaled (`equalize`); whoever looks has to divide."""

    def __init__(self) -> None:
        """Nothing scaled."""
        super().__init__()
        self.register_buffer("factor", None, persistent=False)


class _Tracer(fx.Tracer):
    """Symbolic tracing that leaves a `Tap` where each tapped submodule returned.

    A network's own module is not looked into if it has an attribute `stays_in_float`, which says
    why: what is computed inside it is then put on no grid; or `of_one_value`: it is a table.
    """

    def __init__(self, taps: tuple[str, ...] = ()) -> None:  # a graph that is unpickled gives none
        super().__init__()
        self.taps = set(taps)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own, and what is one operation here."""
        whole = hasattr(m, "stays_in_float") or hasattr(m, "of_one_value") or is_fixed(m)
        return whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401 - torch's own signature
        result = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if path not in self.taps or not isinstance(result, fx.Proxy):
            return result
        return self.create_proxy("call_module", f"taps.{path.replace('.', '_')}", (result,), {})


def trace(network: nn.Module, taps: tuple[str, ...]) -> fx.GraphModule:
    """`network` as a graph of its own submodules, which it shares.

    Every path in `taps` becomes a submodule `taps.<path with underscores>` whose output is that
    of the original submodule.

    Raises:
        SparkirError: its forward cannot be traced; the message has the reason.
    """
    tracer = _Tracer(taps)
    _, *more = inspect.signature(network.forward).parameters.values()
    defaults = {p.name: p.default for p in more if p.default is not p.empty}
    try:
        graph = tracer.trace(network, concrete_args=defaults or None)
    except Exception as error:  # tracing runs the user's code, which may raise anything
        raise SparkirError(
            f"{type(network).__name__}.forward cannot be traced ({error}); make its control flow "
            "independent of tensor values"
        ) from error
    found: dict[str, Any] = dict(network.named_modules(remove_duplicate=False))
    found |= dict(network.named_parameters()) | dict(network.named_buffers())
    found |= _other_tensors(network)
    found |= {f"taps.{path.replace('.', '_')}": Tap() for path in taps}
    for name in defaults:
        _forget(graph, name)
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    root = {name: value for name, value in found.items() if name in used}
    _make_out_of_place(graph, root)
    module = fx.GraphModule(root, graph, type(network).__name__)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _forget(graph: fx.Graph, name: str) -> None:
    """Leave out an argument that was fixed in tracing, and what checks that it is as it was."""
    _, *more = (node for node in graph.nodes if node.op == "placeholder")
    for node in more:
        if re.fullmatch(rf"{name}(_\d+)?", str(node.target)):
            for check in list(node.users):
                for reader in list(check.users):
                    graph.erase_node(reader)
                graph.erase_node(check)
            graph.erase_node(node)


def _other_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Tensors that are attributes and no buffers, or that the tracer found made from nothing."""
    return {
        f"{path}.{name}".removeprefix("."): value
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _make_out_of_place(graph: fx.Graph, root: Mapping[str, Any]) -> None:
    """Let what changes a tensor make a new one, and whoever reads the tensor later read that."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    in_place = {name for name, module in root.items() if getattr(module, "inplace", False)}
    for name in in_place:
        root[name].inplace = False
    for node in graph.nodes:
        module_in_place = node.op == "call_module" and str(node.target) in in_place
        if not (module_in_place or _swap_in_place_function(node)):
            continue
        changed = node.all_input_nodes[0]
        for reader in list(changed.users):
            if place[reader] > place[node]:
                reader.replace_input_with(changed, node)


def _swap_in_place_function(node: fx.Node) -> bool:
    """Whether `node` calls a function that changes its input; it then calls the other form."""
    if node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
        return True
    is_method = node.op == "call_method"
    name = str(node.target) if is_method else getattr(node.target, "__name__", "")
    plain = name.removesuffix("_")
    places = (Tensor,) if is_method else (torch, F)
    found = next((getattr(place, plain) for place in places if hasattr(place, plain)), None)
    if plain == name or found is None:
        return False
    node.target = plain if is_method else found
    return True


class _Recorder(fx.Interpreter):
    """Runs a graph once and notes the shapes of tensors, and which nodes are several in a tuple."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.tuples: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - torch's own signature
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        elif isinstance(result, tuple | list) and any(isinstance(part, Tensor) for part in result):
            self.tuples.add(n)
        return result


@torch.no_grad()
def shapes_of(network: fx.GraphModule, example: Tensor) -> dict[fx.Node, torch.Size]:
    """The shape of every node that is a tensor, found with one run on `example` (1, C, H, W)."""
    recorder = _Recorder(network)
    recorder.run(example)
    return recorder.shapes


def classify(network: fx.GraphModule, example: Tensor) -> dict[fx.Node, Kind]:
    """The kind of every node, found with one run on `example` (1, C, H, W).

    Raises:
        SparkirError: the run gives anything but one tensor.
    """
    recorder = _Recorder(network)
    with torch.no_grad():
        result = recorder.run(example)
    if not isinstance(result, Tensor):
        raise SparkirError("the network returns several values; it must return one image")
    tensors = recorder.shapes.keys() | recorder.tuples
    kinds: dict[fx.Node, Kind] = {}
    for node in network.graph.nodes:
        if node.op == "output":
            kinds[node] = Kind.OUTPUT
        elif node.op == "placeholder" and node in tensors:
            kinds[node] = Kind.INPUT
        elif node not in tensors or all(
            kinds[source] is Kind.NOT_A_TENSOR for source in node.all_input_nodes
        ):
            kinds[node] = Kind.NOT_A_TENSOR
        elif recorder.tuples.intersection((node, *node.all_input_nodes)):
            kinds[node] = Kind.FLOAT
        else:
            kinds[node] = _kind(node, network, kinds)
    return kinds


def parts_of(concatenation: fx.Node) -> list[Any]:
    """What a concatenation joins."""
    parts = concatenation.kwargs.get("tensors") or concatenation.args[0]
    return list(parts) if isinstance(parts, tuple | list) else [None]


def dimension_of(concatenation: fx.Node) -> int:
    """Along which dimension it joins them."""
    args, words = concatenation.args, concatenation.kwargs
    positional = args[1] if len(args) > 1 else 0
    return cast("int", words.get("dim", words.get("axis", positional)))


def _kind(node: fx.Node, network: fx.GraphModule, kinds: Mapping[fx.Node, Kind]) -> Kind:
    resize = resize_of(node, network)
    if resize is not None:
        return Kind.PASS if repeats_pixels(resize) else Kind.FLOAT
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, Tap):
            return Kind.TAP
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return Kind.FLOAT
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            return Kind.FLOAT
        if hasattr(module, "of_one_value"):
            return Kind.TABLE
        if is_fixed(module):
            return Kind.FIXED
        return _MODULES.get(type(module), Kind.FLOAT)
    kind = _FUNCTIONS.get(node.target, Kind.FLOAT)
    tensors = {n for n in node.all_input_nodes if kinds[n] is not Kind.NOT_A_TENSOR}
    of_two = (Kind.ADD, Kind.MULTIPLY, Kind.MATRIX_PRODUCT)
    if kind in of_two and (len(tensors) != 2 or node.kwargs):
        return Kind.FLOAT  # with a constant, or an addition of something with itself
    if kind is Kind.CONCATENATE and not tensors.issuperset(parts_of(node)):
        return Kind.FLOAT
    if kind is Kind.PASS and not _only_moves(node, tensors):
        return Kind.FLOAT
    return kind


def _only_moves(node: fx.Node, tensors: set[fx.Node]) -> bool:
    """Whether one tensor goes in, first of the arguments, and nothing new comes out."""
    if tensors != set(node.args[:1]):
        return False
    if node.target is not F.pad:
        return True
    words = named(node, "input pad mode value")
    return words.get("mode", "constant") != "constant" or not words.get("value")


def is_constant(node: fx.Node, network: fx.GraphModule) -> bool:
    """Whether a layer's weights are constants of the architecture."""
    if node.op != "call_module":
        return False
    return isinstance(network.get_submodule(str(node.target)), ConstantConv2d)


def is_exponential(node: fx.Node, network: fx.GraphModule) -> bool:
    """Whether an operation is a softmax, whose last bits differ from library to library."""
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), nn.Softmax)
    return node.target in (torch.softmax, F.softmax, "softmax")


def is_learned(weight: Tensor) -> bool:
    """Whether training changes it."""
    return isinstance(weight, nn.Parameter) and weight.requires_grad


def tensor_at(node: object, network: fx.GraphModule) -> Tensor | None:
    """The parameter or buffer that `node` gets; None of anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = attrgetter(str(node.target))(network)
    return found if isinstance(found, Tensor) else None


def _weight_is_learned(convolution: fx.Node, network: fx.GraphModule) -> bool:
    weight = tensor_at(named(convolution, "input weight").get("weight"), network)
    return weight is not None and is_learned(weight)


def reason_for_float(node: fx.Node, network: fx.GraphModule) -> str:
    """Why an operation stays in floating point."""
    kind = _FUNCTIONS.get(node.target)
    if kind in (Kind.ADD, Kind.MULTIPLY, Kind.CONCATENATE, Kind.MATRIX_PRODUCT):
        twice = len(node.args) == 2 and node.args[0] is node.args[1]
        return "its operands are one tensor" if twice else "one of its operands is a constant"
    if node.target is F.conv2d and _weight_is_learned(node, network):
        return "its weights are learned, and it is a function; make it an nn.Conv2d"
    if node.op != "call_module":
        return REASONS.get(node.target, "no integer kernel is known for it")
    module = network.get_submodule(str(node.target))
    if hasattr(module, "stays_in_float"):
        return str(module.stays_in_float)
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}; integer kernels pad with zeros"
    if isinstance(module, nn.Conv2d):
        return f"{type(module).__name__} derives from nn.Conv2d, and may do more"
    return REASONS.get(type(module), "no integer kernel is known for it")
