"""A deployed file in a runtime that executes it. Imports no torch: restoring needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

import numpy as np

from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

if TYPE_CHECKING:
    import onnxruntime

Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
TITLES: dict[Runtime, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
EXACT_PRODUCTS = "session.x64quantprecision"
"""ONNX Runtime's setting "1" for x86 without VNNI, whose sums of two 8-bit products saturate in 16
bits: weights are then read as unsigned, by kernels that do not. Elsewhere it changes nothing."""
_EXTRAS: dict[Runtime, str] = {"onnxruntime": "onnx", "openvino": "openvino"}


class Session(Protocol):
    """A file ready to run."""

    runtime: Runtime
    metadata: Mapping[str, str]
    """What the file says of itself; see `card`."""

    def run(self, lq: np.ndarray) -> list[np.ndarray]:
        """All outputs for `lq` (N, C, H, W) float32 in the network's value range.

        The first is the restored image; a file made for inspection has more.
        """


def installed(runtime: Runtime) -> bool:
    """Whether this runtime can be used here."""
    return find_spec(runtime) is not None


def require_runtime(runtime: Runtime) -> None:
    """Say how to install this runtime, if it is missing."""
    if not installed(runtime):
        raise SparkirError(
            f"{TITLES[runtime]} is not installed: "
            f'pip install "sparkir[{_EXTRAS[runtime]}]", or pip install {runtime} alone'
        )


def cannot_compute(what: object, shape: Sequence[int], error: BaseException) -> SparkirError:
    """What is to be said of an input at which a network or a runtime fails."""
    return SparkirError(
        f"{what} cannot compute an input of {tuple(shape)}: {one_line(error)[:300]}"
    )


def open_session(
    model: bytes | Path, *, runtime: Runtime = "onnxruntime", threads: int | None = None
) -> Session:
    """Open an ONNX file, or its bytes, in a runtime on the CPU; `threads` None lets it choose.

    Raises:
        SparkirError: the runtime is not installed, or cannot open the file.
    """
    require_runtime(runtime)
    if isinstance(model, Path) and not model.is_file():
        raise SparkirError(f"there is no file {model}; check the path")
    opener = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}[runtime]
    try:
        return cast("Session", opener(model, threads=threads))
    except Exception as error:  # each runtime raises its own, and they share no base
        name = model if isinstance(model, Path) else "the exported model"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1 if runtime == "openvino" else 0] if lines else type(error).__name__
        raise SparkirError(f"{TITLES[runtime]} cannot open {name}: {reason}") from error


class OnnxRuntimeSession:
    """ONNX Runtime on the CPU, silent about its own decisions."""

    runtime: Runtime = "onnxruntime"

    def __init__(
        self, model: bytes | Path, *, threads: int | None, save_optimized: Path | None = None
    ) -> None:
        """Open `model`; `save_optimized` keeps the graph that will really run."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Between calls its threads sleep, and leave the processor to whatever else runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if save_optimized is not None:
            options.optimized_model_filepath = str(save_optimized)
        source = str(model) if isinstance(model, Path) else model
        self.session: onnxruntime.InferenceSession = _open_onnxruntime(source, options)
        self.metadata: Mapping[str, str] = self.session.get_modelmeta().custom_metadata_map
        self._input = self.session.get_inputs()[0].name

    def run(self, lq: np.ndarray) -> list[np.ndarray]:
        """All outputs."""
        return cast("list[np.ndarray]", self.session.run(None, {self._input: lq}))


def _open_onnxruntime(
    source: str | bytes, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:
        if "y_zero_point" not in str(error):
            raise
        # Where int8 passes a pooling, version 1.32 inserts a pair of which one half is uint8.
        return onnxruntime.InferenceSession(
            source, options, providers=providers, disabled_optimizers=["QDQPropagationTransformer"]
        )


@cache
def openvino_core() -> Any:  # noqa: ANN401 - an openvino.Core
    """The process's only one, and kept to its end.

    A core that compiles gives the main thread another stack for signal handlers, and takes it away
    when it goes. Of two that go in the order in which they came, the second puts back the stack of
    the first, which is gone: the next signal, such as Ctrl-C, then ends the process.
    """
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """OpenVINO on the CPU, from an ONNX file or its own .xml."""

    runtime: Runtime = "openvino"

    def __init__(
        self,
        model: bytes | Path,
        *,
        threads: int | None,
        precision: Literal["f32", "bf16"] = "f32",
    ) -> None:
        """Open `model`; layers in floating point compute in `precision`."""
        core = openvino_core()
        network: Any = core.read_model(str(model) if isinstance(model, Path) else model)
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self.compiled: Any = core.compile_model(network, "CPU", settings)
        self.metadata: Mapping[str, str] = _said_in(network)

    def run(self, lq: np.ndarray) -> list[np.ndarray]:
        """All outputs."""
        # Copied: the arrays belong to the request, which the next call writes into.
        return [np.array(value) for value in self.compiled([lq], share_outputs=True).to_tuple()]


def _said_in(network: Any) -> Mapping[str, str]:  # noqa: ANN401 - an openvino.Model
    """The ONNX metadata, which OpenVINO keeps as its runtime information."""
    if not network.has_rt_info(["framework"]):
        return {}
    entries = network.get_rt_info(["framework"])
    found = entries.astype(dict) if hasattr(entries, "astype") else entries
    return {str(key): str(getattr(value, "value", value)) for key, value in found.items()}
