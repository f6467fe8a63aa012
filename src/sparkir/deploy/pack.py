"""A file as small as the bits say: packed weights, and no words that nobody reads.

No CPU runtime multiplies 4-bit or 2-bit integers in a convolution. Such weights are packed, and
the runtime unpacks them when it loads the file; the kernels that run are those of int8, on the
same values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_FOUR_BITS, _TWO_BITS = (-8, 7), (-2, 1)
_PACKED = "weights.int2"


def make_small(model: onnx.ModelProto, alike: Iterable[Sequence[str]]) -> None:
    """Pack the weights, name layers as the network does, and drop what says nothing.

    `alike` groups the layers whose weights are the same and stored once, in order of execution.
    """
    _name_after_layers(model, alike)
    _derive_bias_steps(model)
    _separate_constants(model)
    pack_weights(model)
    _shorten(model)


def _name_after_layers(model: onnx.ModelProto, alike: Iterable[Sequence[str]]) -> None:
    """Call each convolution as its module, and its constants after that.

    The exporter keeps equal constants once, so layers of equal weights take turns at the names of
    their group: no two nodes may have one name.
    """
    waiting = {name: group for group in map(list, alike) for name in tuple(group)}
    stored = [tensor.name for tensor in model.graph.initializer]
    names = {name: re.sub(r"\.layer\.([^.]+)$", r".\1", name) for name in stored}
    _rename(model, names)
    weights = {
        node.output[0]: node.input[0].removesuffix(".weight")
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(".weight")
    }
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
        if len(node.input) > 1 and node.input[1] in weights:
            name = weights[node.input[1]]
            node.name = waiting[name].pop(0)


def _derive_bias_steps(model: onnx.ModelProto) -> None:
    """Compute each bias's steps from those of input and weights, which is where they came from."""
    import onnx

    made_by = {name: node for node in model.graph.node for name in node.output}
    derived: dict[str, onnx.NodeProto] = {}
    factors: set[str] = set()
    for layer in model.graph.node:
        parts = [made_by[name] for name in layer.input if name in made_by]
        if len(parts) != 3 or any(part.op_type != "DequantizeLinear" for part in parts):
            continue
        of_input, of_weights, of_bias = parts
        steps, name = [of_input.input[1], of_weights.input[1]], of_bias.input[1]
        derived[name] = onnx.helper.make_node("Mul", steps, [name])
        factors |= set(steps)
    # Equal constants are one: what is a factor elsewhere must stay.
    for tensor in [t for t in model.graph.initializer if t.name in derived.keys() - factors]:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, derived[tensor.name])


def _separate_constants(model: onnx.ModelProto) -> None:
    """Let every layer read its integers under names of its own; the file still holds weights once.

    For processors without VNNI, ONNX Runtime makes weights unsigned (`session.EXACT_PRODUCTS`). It
    names what it makes after what it was made of, and cannot open a file where two layers read one.
    """
    import onnx

    of_layers = {n.output[0]: n for n in model.graph.node if _is_of_a_layer(n)}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    uses: Counter[str] = Counter()

    def own_copy(dequantize: onnx.NodeProto) -> onnx.NodeProto:
        made = onnx.NodeProto()
        made.CopyFrom(dequantize)
        integers, _, *zeros = dequantize.input
        number = uses[integers]
        if number:  # copied when the file is opened; of the last copy, for equal nodes are joined
            source, made.input[0] = _numbered(integers, number - 1), _numbered(integers, number)
            nodes.append(onnx.helper.make_node("Concat", [source], [made.input[0]], axis=0))
        for zero in zeros:  # a few bytes, which would be joined however they are copied
            if uses[zero]:
                made.input[2] = _numbered(zero, uses[zero])
                model.graph.initializer.add().CopyFrom(stored[zero])
                model.graph.initializer[-1].name = made.input[2]
        made.output[0] = _numbered(dequantize.output[0], uses[dequantize.output[0]])
        uses.update([integers, *zeros, dequantize.output[0]])
        return made

    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            if name in of_layers:
                nodes.append(own_copy(of_layers[name]))
                node.input[slot] = nodes[-1].output[0]
        if not _is_of_a_layer(node):
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _numbered(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name


def _is_of_a_layer(node: onnx.NodeProto) -> bool:
    """Whether it makes a layer's weights or biases, which have a step for each channel."""
    per_channel = any(a.name == "axis" and a.i == 0 for a in node.attribute)
    return node.op_type == "DequantizeLinear" and per_channel


def _shorten(model: onnx.ModelProto) -> None:
    """Number the tensors between nodes, and leave out attributes that are the default."""
    import onnx

    kept = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name]
    _rename(model, {n: f"t{number}" for number, n in enumerate(made) if n not in kept})
    for node in model.graph.node:
        schema = onnx.defs.get_schema(node.op_type, model.opset_import[0].version)
        for attribute in list(node.attribute):
            default = schema.attributes[attribute.name].default_value
            if onnx.helper.get_attribute_value(attribute) == _value_of(default):
                node.attribute.remove(attribute)
        if node.op_type in ("DequantizeLinear", "Clip", "Constant"):
            node.ClearField("name")


def _value_of(default: onnx.AttributeProto) -> object:
    import onnx

    return onnx.helper.get_attribute_value(default) if default.type else None


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    """Give tensors other names everywhere."""
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def pack_weights(model: onnx.ModelProto) -> dict[str, int]:
    """Pack every int8 initializer that fewer bits can hold; {its name: bits}, for those packed.

    4-bit weights become INT4 and a Cast. 2-bit weights of all layers together lie four to a byte;
    a few nodes unpack them once, and are constants to every runtime.
    """
    import onnx

    packed: dict[str, int] = {}
    two_bits: list[onnx.TensorProto] = []
    for tensor in list(model.graph.initializer):
        if tensor.data_type != onnx.TensorProto.INT8 or not tensor.dims:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if not values.any():  # zero points
            continue
        if _fits(values, _TWO_BITS):
            packed[tensor.name] = 2
            two_bits.append(tensor)
        elif _fits(values, _FOUR_BITS):
            packed[tensor.name] = 4
            _store_four_bits(model, tensor, values)
    if two_bits:
        _store_two_bits(model, two_bits)
    return packed


def _fits(values: np.ndarray, bounds: tuple[int, int]) -> bool:
    return bool(values.size and bounds[0] <= values.min() and values.max() <= bounds[1])


def _store_four_bits(model: onnx.ModelProto, tensor: onnx.TensorProto, values: np.ndarray) -> None:
    import onnx

    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, values.dtype)) & 0xF
    name = f"{tensor.name}.int4"
    stored = onnx.TensorProto(name=name, data_type=onnx.TensorProto.INT4, dims=values.shape)
    stored.raw_data = (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
    cast = onnx.helper.make_node("Cast", [name], [tensor.name], to=onnx.TensorProto.INT8)
    model.graph.initializer.remove(tensor)
    model.graph.initializer.append(stored)
    model.graph.node.insert(0, cast)


def _store_two_bits(model: onnx.ModelProto, tensors: list[onnx.TensorProto]) -> None:
    """All tensors end to end, and the nodes that take them apart again."""
    import onnx

    make = onnx.helper.make_node
    flat = np.concatenate([onnx.numpy_helper.to_array(t).reshape(-1) for t in tensors]) + 2
    sizes = [int(np.prod(t.dims)) for t in tensors] + [-len(flat) % 4]
    flat = np.append(flat, np.zeros(sizes[-1], flat.dtype)).astype(np.uint8)
    # Value i lies in byte i % quarter, so that unpacking needs no transposition.
    quarters = flat.reshape(4, -1)
    names = [f"{t.name}.flat" for t in tensors]
    constants = {
        _PACKED: quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6,
        "int2.base": np.array([4], np.int32),
        "int2.middle": np.array([2], np.int32),
        "int2.sizes": np.array(sizes if sizes[-1] else sizes[:-1]),
    }
    nodes = [
        make("Cast", [_PACKED], ["int2.d0"], to=onnx.TensorProto.INT32),
        *(make("Div", [f"int2.d{i}", "int2.base"], [f"int2.d{i + 1}"]) for i in range(3)),
        make("Concat", [f"int2.d{i}" for i in range(4)], ["int2.joined"], axis=0),
        make("Mod", ["int2.joined", "int2.base"], ["int2.digits"]),
        make("Sub", ["int2.digits", "int2.middle"], ["int2.signed"]),
        make("Cast", ["int2.signed"], ["int2.values"], to=onnx.TensorProto.INT8),
        make(
            "Split",
            ["int2.values", "int2.sizes"],
            names + (["int2.rest"] if sizes[-1] else []),
            axis=0,
        ),
    ]
    for tensor, name in zip(tensors, names, strict=True):
        shape = "int2.shape." + "x".join(map(str, tensor.dims))
        constants[shape] = np.array(tensor.dims)
        nodes.append(make("Reshape", [name, shape], [tensor.name]))
        model.graph.initializer.remove(tensor)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in constants.items()
    )
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
