"""Running an exported file with ONNX Runtime, and asking it what it runs."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from sparkir.deploy.onnx import require_onnx

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
