"""Running an exported file with ONNX Runtime, and asking it what it runs."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparkir.deploy.onnx import require_onnx
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

if TYPE_CHECKING:
    import onnx
    import onnxruntime

_INTEGER = ("QLinear", "ConvInteger", "MatMulInteger", "QGemm", "NhwcMaxPool")
_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "MatMul")


def open_session(
    model: bytes | Path, *, save_optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session, silent about its own decisions."""
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, lq: np.ndarray) -> list[np.ndarray]:
    """All outputs for `lq` (N, C, H, W) float32 in the network's value range."""
    return cast("list[np.ndarray]", session.run(None, {session.get_inputs()[0].name: lq}))


class RuntimeNetwork(nn.Module):
    """An exported file as a network: same facts, same call, executed by ONNX Runtime."""

    def __init__(self, model: bytes | Path, facts: ModelFacts | None = None) -> None:
        """Open a file or its bytes; the facts are those in its metadata unless given.

        Raises:
            SparkirError: it is missing, damaged, or not exported by sparkir.
        """
        super().__init__()
        try:
            self.session = open_session(model)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise SparkirError(f"ONNX Runtime cannot open {_name_of(model)}: {reason}") from error
        self.facts = facts or self._facts_in_file(_name_of(model))

    def forward(self, lq: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, sH, sW), in the network's value range."""
        (restored,) = run_session(self.session, lq.numpy())
        return torch.from_numpy(restored)

    def _facts_in_file(self, name: str) -> ModelFacts:
        words = self.session.get_modelmeta().custom_metadata_map
        if "facts" not in words:
            raise SparkirError(
                f"{name} does not say its scale and value range; export it with sparkir"
            )
        values = json.loads(words["facts"])
        return ModelFacts(**values | {"taps": tuple(values["taps"])})


def _name_of(model: bytes | Path) -> str:
    return str(model) if isinstance(model, Path) else "the exported model"


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
        open_session(model.SerializeToString(), save_optimized=optimized)
        nodes = list(onnx.load(optimized).graph.node)
    integer = Counter(n.op_type for n in nodes if n.op_type.startswith(_INTEGER))
    other = Counter(n.op_type for n in nodes if not n.op_type.startswith(_INTEGER))
    float_layers = tuple(n.name for n in nodes if n.op_type in _CONVOLUTIONS)
    return Fusion(integer=integer, other=other, float_layers=float_layers)
