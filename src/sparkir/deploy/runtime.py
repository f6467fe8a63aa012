"""An exported file as a network, and what a runtime makes of it."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.cpu import get_capabilities

from sparkir.data.codec import one_line
from sparkir.deploy.card import Card, read_card
from sparkir.deploy.session import (
    OnnxRuntimeSession,
    OpenVinoSession,
    Runtime,
    cannot_compute,
    open_session,
)
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

if TYPE_CHECKING:
    import onnx

_INTEGER = ("QLinear", "ConvInteger", "MatMulInteger", "QGemm", "NhwcMaxPool")
_INTEGER_LAYERS = ("QLinearConv", "QLinearMatMul", "QGemm")
_FLOAT_LAYERS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "MatMul")
_FUSED = re.compile(r"_token_\d+$")
"""What ONNX Runtime appends to the name of a layer that it has put together with its grids."""
_NO_WORK = ("Input", "Output", "Const", "Reshape", "ShapeOf", "Reorder")


def saturates(runtime: Runtime) -> bool:
    """Whether `runtime` would add two products of 8 bits in 16 bits on this processor.

    An x86 without VNNI has no instruction that adds them in 32. ONNX Runtime has other kernels for
    it (`session.EXACT_PRODUCTS`); OpenVINO then computes right only with weights of 7 bits.
    """
    here = get_capabilities()
    has_vnni = here.get("avx512_vnni") or here.get("avx_vnni")
    return runtime == "openvino" and here.get("architecture") == "x86_64" and not has_vnni


class RuntimeNetwork(nn.Module):
    """An exported file as a network: same facts, same call, executed by a runtime."""

    def __init__(
        self,
        model: bytes | Path,
        facts: ModelFacts | None = None,
        *,
        runtime: Runtime = "onnxruntime",
    ) -> None:
        """Open a file or its bytes; the facts are those in its metadata unless given.

        Raises:
            SparkirError: it is missing, damaged, or not exported by sparkir.
        """
        super().__init__()
        self.session = open_session(model, runtime=runtime)
        self._name = str(model) if isinstance(model, Path) else "the exported model"
        self.card = None if facts else read_card(self.session.metadata, self._name)
        self.facts = facts or cast("Card", self.card).facts

    def forward(self, lq: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, sH, sW), in the network's value range.

        Raises:
            SparkirError: the runtime cannot compute it.
        """
        try:
            return torch.from_numpy(self.session.run(lq.numpy())[0])
        except Exception as error:  # each runtime raises its own, and they share no base
            raise cannot_compute(self._name, lq.shape, error) from error


@dataclass(frozen=True)
class Fusion:
    """What a runtime made of a file."""

    integer: Counter[str]
    """Operators it runs on integers, by type."""
    other: Counter[str]
    """The rest."""
    layers: dict[str, bool]
    """Every convolution and linear layer: whether it runs on integers."""

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Convolutions and linear layers that it runs in floating point."""
        return tuple(name for name, integer in self.layers.items() if not integer)

    @property
    def integer_share(self) -> float:
        """Operators on integers, of all."""
        integer = self.integer.total()
        return integer / max(1, integer + self.other.total())


def fusion_of(model: onnx.ModelProto, runtime: Runtime = "onnxruntime") -> Fusion:
    """Have `runtime` optimise `model` as it would to run it, and look at the result."""
    look = {"onnxruntime": _onnxruntime_operators, "openvino": _openvino_operators}[runtime]
    operators = look(model)
    kinds = [Counter(o.kind for o in operators if o.integer is yes) for yes in (True, False)]
    layers = {o.name: o.integer for o in operators if o.is_layer}
    return Fusion(integer=kinds[0], other=kinds[1], layers=layers)


class _Operator(NamedTuple):
    name: str
    kind: str
    integer: bool
    is_layer: bool


def _onnxruntime_operators(model: onnx.ModelProto) -> list[_Operator]:
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        try:
            OnnxRuntimeSession(model.SerializeToString(), threads=1, save_optimized=optimized)
            nodes = list(onnx.load(optimized).graph.node)
        except Exception as error:  # ONNX Runtime has kinds of its own for a full disk
            raise SparkirError(
                f"ONNX Runtime cannot write what it makes of the model to {tempfile.gettempdir()}: "
                f"{one_line(error)}; free some space there, or set TMPDIR to another folder"
            ) from error
    return [
        _Operator(
            name=_FUSED.sub("", n.name),
            kind=n.op_type,
            integer=n.op_type.startswith(_INTEGER),
            is_layer=n.op_type in (*_FLOAT_LAYERS, *_INTEGER_LAYERS),
        )
        for n in nodes
    ]


def _openvino_operators(model: onnx.ModelProto) -> list[_Operator]:
    session = OpenVinoSession(model.SerializeToString(), threads=1)
    found = []
    for operator in session.compiled.get_runtime_model().get_ordered_ops():
        facts = operator.get_rt_info()
        kind, kernel, names = (
            facts[key].astype(str) for key in ("layerType", "primitiveType", "originalLayersNames")
        )
        if kind in _NO_WORK or kernel.startswith(("unknown", "ref_any", "ref_i")):
            continue  # constants, and arithmetic on shapes
        parts = [name.partition("/")[0] for name in names.split(",")]
        layer = next((name for name in parts if name in _layer_names(model)), "")
        found.append(
            _Operator(
                name=layer or names,
                kind=kind,
                integer=kernel.upper().endswith(("_I8", "_U8")),
                is_layer=kind in ("Convolution", "FullyConnected", "MatMul", "Deconvolution"),
            )
        )
    return found


def _layer_names(model: onnx.ModelProto) -> set[str]:
    return {n.name for n in model.graph.node if n.op_type in _FLOAT_LAYERS}
