"""An integer network as an ONNX file that ONNX Runtime runs on integer kernels."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from sparkir.data.atomic import atomic_file
from sparkir.deploy.card import Card
from sparkir.deploy.pack import make_small
from sparkir.deploy.qdq import to_qdq
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import evaluating
from sparkir.models.facts import ModelFacts, facts_of
from sparkir.quant.prepare import example_px, placement_of
from sparkir.quant.reference import same_weights

if TYPE_CHECKING:
    import onnx

OPSET = 21
EXAMPLE_PX = 64
_GRID = "grid."  # so that no tensor of the exporter's has the name


def require_onnx() -> None:
    """Say how to install what export needs, if it is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SparkirError(
            f'export needs {error.name}, which is not installed: pip install "sparkir[onnx]"'
        ) from error


def to_onnx(frozen: fx.GraphModule, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The QDQ model of an integer network, with dynamic batch, height and width.

    Input `lq` (N, C, H, W) and output `restored` (N, C, sH, sW) are float32 in the network's
    value range; the file's metadata says which. Every quantize node is named after its grid.

    Raises:
        SparkirError: the ONNX packages are not installed.
    """
    require_onnx()
    view = to_qdq(frozen)
    model = _exported(view, facts_of(frozen), _translations())
    _name_after_grids(model)
    make_small(model, same_weights(frozen))
    spec = placement_of(frozen).spec
    card = Card(facts=facts_of(frozen), quantization=spec.label, target=spec.target)
    return _finished(model, {**card.to_metadata(), **(metadata or {})})


def to_float_onnx(network: nn.Module) -> onnx.ModelProto:
    """The ONNX model of a network in floating point, with dynamic batch, height and width.

    Input and output are those of `to_onnx`. The network runs in evaluation mode and keeps the mode
    it had.

    Raises:
        SparkirError: the ONNX packages are not installed, or the network cannot be exported.
    """
    require_onnx()
    facts = facts_of(network)
    try:
        with evaluating(network):
            model = _exported(network, facts, {})
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SparkirError(f"{facts.name} cannot be exported to ONNX: {reason}") from error
    return _finished(model, Card(facts=facts, quantization="float").to_metadata())


def _exported(
    view: nn.Module, facts: ModelFacts, translations: dict[Any, Callable[..., Any]]
) -> onnx.ModelProto:
    """What torch's exporter makes of a network, without its notes."""
    size = torch.export.Dim.DYNAMIC
    height = example_px(facts, at_least=EXAMPLE_PX)
    width = example_px(facts, at_least=height + 8)
    example = torch.zeros(2, facts.channels, height, width)
    with _quiet():
        program = torch.onnx.export(
            view,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["lq"],
            output_names=["restored"],
            dynamic_shapes=({0: size, 2: size, 3: size},),
            custom_translation_table=translations,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip_traces(model)
    return model


def _finished(model: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The same model, which says what it is, checked."""
    import onnx

    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, whole or not at all.

    Raises:
        SparkirError: the file cannot be written.
    """
    try:
        with atomic_file(path) as file:
            file.write(model.SerializeToString())
    except OSError as error:
        raise SparkirError(f"cannot write the model {path}: {error}") from error


def _translations() -> dict[Any, Callable[..., Any]]:
    """How the operations of the QDQ form are written in ONNX."""
    from onnxscript import opset21

    op: Any = opset21  # its annotations speak of eager values, not of the graph being written

    def write_qdq(
        x: Any,  # noqa: ANN401
        scale: Any,  # noqa: ANN401
        zero: Any,  # noqa: ANN401
        low: int,
        top: int,
        name: str,
        apart: bool = False,
    ) -> Any:  # noqa: ANN401
        stored = op.QuantizeLinear(x, scale, zero)
        stored.name = _GRID + name
        if top - low < 255:  # a narrower grid in bytes
            kind = 2 if low == 0 else 3  # uint8, int8
            bounds = (op.Cast(op.Constant(value_int=v), to=kind) for v in (low, top))
            stored = op.Clip(stored, *bounds)
        if apart:
            stored, _ = op.MaxPool(stored, kernel_shape=(1, 1))
        return op.DequantizeLinear(stored, scale, zero)

    def write_dequantize(ints: Any, scale: Any, zero: Any = None) -> Any:  # noqa: ANN401
        return op.DequantizeLinear(ints, scale, zero, axis=0)

    def write_average(x: Any) -> Any:  # noqa: ANN401
        return op.GlobalAveragePool(x)

    return {
        torch.ops.sparkir.average.default: write_average,
        torch.ops.sparkir.qdq.default: write_qdq,
        torch.ops.sparkir.dequantize.default: write_dequantize,
    }


def _strip_traces(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes for debugging; it names source files and outweighs weights."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for item in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        item.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")


def _name_after_grids(model: onnx.ModelProto) -> None:
    """Name each quantize node after the call that it came from.

    Where calls round the same values to the same grid, the exporter merges them; one name is left.
    """
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            node.name = node.output[0].removeprefix(_GRID)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, advice and deprecations of its own off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
