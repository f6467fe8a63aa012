"""What XNNPACK was given to do: read from the very graphs that a program carries for it."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, fx

Where = Literal["int8", "float", "portable"]
_LAYERS = ("aten.convolution", "aten.linear", "aten.addmm", "aten.mm")
_KERNELS_OF_LAYERS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")
_HEADER_FIELDS = slice(10, 18)
"""Of a delegate's bytes: offset and size of its graph, 4 bytes each, little-endian."""


@dataclass(frozen=True)
class Delegation:
    """Where the operations of a program run."""

    layers: Mapping[str, Where]
    """Convolutions and linear layers, in order: on XNNPACK's `int8` kernels, on its `float`
    kernels, or on ExecuTorch's slow `portable` ones."""
    int8: Counter[str] = field(default_factory=Counter)
    """XNNPACK's operations on int8, by type."""
    float: Counter[str] = field(default_factory=Counter)
    """XNNPACK's operations in float32."""
    conversion: Counter[str] = field(default_factory=Counter)
    """Its steps between the two."""
    portable: Counter[str] = field(default_factory=Counter)
    """Operations that XNNPACK did not take, by name."""
    pieces: list[int] = field(default_factory=list)
    """How many kernels each delegate has; between two of them, ExecuTorch's own run."""

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Convolutions and linear layers that do not run as int8 kernels."""
        return tuple(name for name, where in self.layers.items() if where != "int8")

    def summary(self) -> str:
        """One line for the user."""
        inside = len(self.layers) - len(self.float_layers)
        left = ", ".join(f"{count} x {name}" for name, count in self.portable.items())
        return (
            f"{inside} of {len(self.layers)} layers run as int8 kernels of XNNPACK "
            f"(pieces: {len(self.pieces)}); left to portable kernels: {left or 'nothing'}"
        )


def delegation_of(lowered: fx.GraphModule) -> Delegation:
    """Read a lowered program; `lowered` is the graph of its method `forward`."""
    layers: dict[str, Where] = {}
    found = Delegation(layers=layers)
    for node in lowered.graph.nodes:
        if (delegate := _delegate_of(node, lowered)) is not None:
            kernels = list(_kernels(delegate.processed_bytes))
            layers |= _layers_inside(delegate.original_module.graph, kernels)
            found.pieces.append(len(kernels))
            for kind, where in kernels:
                getattr(found, where)[kind] += 1
        elif _is_operation(node):
            found.portable[_name(node)] += 1
            if _name(node).startswith(_LAYERS):
                layers[_layer_name(node)] = "portable"
    return found


def _delegate_of(node: fx.Node, lowered: fx.GraphModule) -> Any:  # noqa: ANN401
    """The module that a delegate call runs, or None."""
    if node.op != "call_function" or _name(node) != "executorch_call_delegate":
        return None
    return lowered.get_submodule(str(node.all_input_nodes[0].target))


def _is_operation(node: fx.Node) -> bool:
    """Whether a node computes a tensor; sizes and picking from a tuple are not counted."""
    return (
        node.op == "call_function"
        and _name(node) != "getitem"
        and isinstance(node.meta.get("val"), Tensor | tuple | list)
    )


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _layer_name(node: fx.Node) -> str:
    """The network's own name of the layer that a node came from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return (stack[-1][0] if stack else "") or node.name


def _layers_inside(graph: fx.Graph, kernels: Sequence[tuple[str, str]]) -> dict[str, Where]:
    """Layers of one delegate; it holds them in the order of the graph that it was made from."""
    names = [
        _layer_name(node)
        for node in graph.nodes
        if node.op == "call_function" and _name(node).startswith(_LAYERS)
    ]
    found = [where for kind, where in kernels if kind in _KERNELS_OF_LAYERS]
    assert len(names) == len(found), f"{len(names)} layers became {len(found)} kernels"
    return dict(zip(names, cast("list[Where]", found), strict=True))


def _kernels(content: bytes) -> Iterator[tuple[str, str]]:
    """(operation, `int8`, `float` or `conversion`) for each node of a delegate, in order."""
    graph = _xnnpack_graph(content)
    is_float: dict[int, bool] = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        is_float[tensor["id_out"]] = "fp" in tensor["datatype"]
    for node in graph["xnodes"]:
        ends = [key for key in node["xnode_union"] if key.endswith("_id")]
        found = {is_float.get(node["xnode_union"][end]) for end in ends} - {None}
        where = "conversion" if len(found) == 2 else "float" if True in found else "int8"
        yield node["xnode_union_type"], where


def _xnnpack_graph(content: bytes) -> Any:  # noqa: ANN401
    """The graph in a delegate's bytes, read with the schema and reader that ExecuTorch ships."""
    fields = content[_HEADER_FIELDS]
    start, size = (int.from_bytes(fields[i : i + 4], "little") for i in (0, 4))
    schema = files("executorch.backends.xnnpack.serialization") / "schema.fbs"
    with (
        tempfile.TemporaryDirectory() as folder,
        as_file(schema) as rules,
        as_file(files("executorch.data.bin") / "flatc") as flatc,
    ):
        stored = Path(folder) / "graph.bin"
        stored.write_bytes(content[start : start + size])
        options = ["--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", folder]
        subprocess.run([flatc, *options, rules, "--", stored], check=True, capture_output=True)
        text = (Path(folder) / "graph.json").read_text("utf-8")
    return json.loads(re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", text))
