"""An exported file as a network, and what ONNX Runtime makes of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparkir.deploy.card import read_card
from sparkir.deploy.session import OnnxRuntimeSession, Runtime, open_session
from sparkir.models.facts import ModelFacts

if TYPE_CHECKING:
    import onnx

_INTEGER = ("QLinear", "ConvInteger", "MatMulInteger", "QGemm", "NhwcMaxPool")
_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "MatMul")


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
        name = str(model) if isinstance(model, Path) else "the exported model"
        self.facts = facts or read_card(self.session.metadata, name).facts

    def forward(self, lq: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, sH, sW), in the network's value range."""
        return torch.from_numpy(self.session.run(lq.numpy())[0])


@dataclass(frozen=True)
class Fusion:
    """What ONNX Runtime made of a file."""

    integer: Counter[str]
    """Operators it runs on integers, by type."""
    other: Counter[str]
    """The rest."""
    float_layers: tuple[str, ...]
    """Convolutions and linear layers that it runs in floating point."""


def fusion_of(model: onnx.ModelProto) -> Fusion:
    """Optimise `model` as a session would and look at the result."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OnnxRuntimeSession(model.SerializeToString(), threads=1, save_optimized=optimized)
        nodes = list(onnx.load(optimized).graph.node)
    integer = Counter(n.op_type for n in nodes if n.op_type.startswith(_INTEGER))
    other = Counter(n.op_type for n in nodes if not n.op_type.startswith(_INTEGER))
    float_layers = tuple(n.name for n in nodes if n.op_type in _CONVOLUTIONS)
    return Fusion(integer=integer, other=other, float_layers=float_layers)
