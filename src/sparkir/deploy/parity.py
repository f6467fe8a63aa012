"""The gate: a file is only written if the runtime shows the same pixels as the integer network.

Values that differ once spread through a network, so that comparing only the final image cannot
tell a fault from a rounding. Every layer is therefore given the runtime's own input and compared
alone; the final image is compared too, as a user will see it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from sparkir.deploy.qdq import grid_calls
from sparkir.deploy.runtime import Fusion, fusion_of, saturates
from sparkir.deploy.session import TITLES, Runtime, open_session
from sparkir.errors import SparkirError
from sparkir.models.facts import facts_of
from sparkir.quant.arithmetic import Quantized
from sparkir.quant.fixed import Fixed
from sparkir.quant.graph import Tap
from sparkir.quant.layers import AbsorbedReLU, Add, PassThrough
from sparkir.quant.prepare import placement_of
from sparkir.quant.reference import IntegerLayer, IntegerQuantizer
from sparkir.quant.steps import made_by

if TYPE_CHECKING:
    import onnx

LARGEST_SHARE = 1e-4
"""Of pixels in the final image that may differ, by one level."""
LARGEST_SHARE_BEHIND_FLOAT = 1e-3
"""The same, where an operation left in floating point feeds a grid: one value that it rounds the
other way reaches a whole neighbourhood of pixels."""
LARGEST_SHARE_ELSEWHERE = 1e-5
"""Of values that may differ by one level where no convolution is involved (additions, tables)."""
LARGEST_SHARE_FLOAT = 1e-4
"""Of values that may differ by one level behind an operation left in floating point, whose sums two
libraries take in different orders."""

SATURATES = (
    "this processor has no VNNI, and OpenVINO's sums of 8-bit products saturate without it: train "
    "with quant.reduce_range = true"
)


@dataclass(frozen=True)
class LayerParity:
    """How often one grid's values differ when both sides get the same input."""

    name: str
    is_layer: bool
    """Whether a convolution or linear layer made the values."""
    differing: int
    total: int
    largest: int
    """Largest difference, in levels of the grid."""
    is_float: bool = False
    """Whether an operation left in floating point made the values."""

    @property
    def passes(self) -> bool:
        """Layers are exact; the rest may round a value now and then the other way."""
        if self.is_layer:
            return self.differing == 0
        share = LARGEST_SHARE_FLOAT if self.is_float else LARGEST_SHARE_ELSEWHERE
        return self.largest <= 1 and self.differing <= max(1, share * self.total)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What the comparison found."""

    layers: list[LayerParity]
    """In order of execution, worst case over the images."""
    differing_pixels: int
    pixels: int
    largest_level: int
    """Largest difference in the final image, in levels of 255."""
    runtime: Runtime
    """What executed the file."""
    fusion: Fusion
    grids: int
    """Quantizer calls of the network; of equal ones in a row the file has one."""
    failures: list[str] = field(default_factory=list)
    saturated: bool = False
    """Whether the runtime cannot be right on this processor, with weights of 8 bits."""

    def summary(self) -> str:
        """One line for the user."""
        exact = sum(layer.differing == 0 for layer in self.layers)
        layers, in_float = len(self.fusion.layers), len(self.fusion.float_layers)
        return (
            f"in {TITLES[self.runtime]}, {layers - in_float} layers run as integer kernels, "
            f"{in_float} in float; {exact} of {len(self.layers)} grids bit for bit; final image: "
            f"{self.differing_pixels} of {self.pixels} values differ"
        )


def check_parity(
    model: onnx.ModelProto,
    frozen: fx.GraphModule,
    images: Sequence[Tensor],
    *,
    runtime: Runtime | None = None,
) -> Parity:
    """Compare a runtime with the integer network on `images` (1, C, H, W), value range its own.

    The runtime is that of the network's target unless given. Nothing is raised; `failures` says
    what is wrong, the first diverging layer first.
    """
    assert images, "nothing would be compared"
    runtime = runtime or placement_of(frozen).spec.runs_on.runtime
    names, shown = _with_grids_as_outputs(model)
    session = open_session(shown.SerializeToString(), runtime=runtime)
    plain = open_session(model.SerializeToString(), runtime=runtime)
    worst: dict[str, LayerParity] = {}
    differing = pixels = largest = 0
    step = facts_of(frozen).value_range / 255
    for image in images:
        _, *stored = session.run(image.numpy())
        bytes_of = dict(zip(names, stored, strict=True))
        for layer in teacher_forced(frozen, image, bytes_of):
            worst[layer.name] = max(
                worst.get(layer.name, layer),
                layer,
                key=lambda one: (not one.passes, one.differing, one.total),
            )
        with torch.inference_mode():
            expected = frozen(image)
        # Measured on the untouched file: extra outputs could change how it is optimised.
        (result,) = plain.run(image.numpy())
        levels = ((torch.from_numpy(result) - expected) / step).round().abs()
        differing += int((levels > 0).sum())
        pixels += levels.numel()
        largest = max(largest, int(levels.max()))
    fusion = fusion_of(model, runtime)
    layers = list(worst.values())
    return Parity(
        layers=layers,
        differing_pixels=differing,
        pixels=pixels,
        largest_level=largest,
        runtime=runtime,
        fusion=fusion,
        grids=len(grid_calls(frozen)),
        failures=_unmatched(names, worst) + _failures(layers, differing, pixels, largest),
        saturated=saturates(runtime) and not placement_of(frozen).spec.reduce_range,
    )


def require_parity(parity: Parity) -> None:
    """Refuse a file that shows other pixels than the network that was trained.

    Raises:
        SparkirError: naming the first layer that diverges.
    """
    if parity.failures:
        hint = f"; {SATURATES}, or export on a machine that has it" if parity.saturated else ""
        raise SparkirError(
            "the exported file does not match the integer network, so it was not written: "
            + "; ".join(parity.failures[:3])
            + hint
        )


def _unmatched(names: Sequence[str], found: Mapping[str, LayerParity]) -> list[str]:
    """The file's grids that were compared with nothing: they have other names, by some mistake."""
    unknown = [name for name in names if name not in found]
    if not unknown:
        return []
    return [
        f"{len(unknown)} of the file's {len(names)} grids are none of the network's, such as "
        f"{unknown[0]}; please report this"
    ]


def _failures(
    layers: Sequence[LayerParity], differing: int, pixels: int, largest: int
) -> list[str]:
    found = [
        f"{layer.name} differs in {layer.differing} of {layer.total} values, by up to "
        f"{layer.largest} levels"
        for layer in layers
        if not layer.passes
    ]
    in_float = any(layer.is_float for layer in layers)
    allowed = LARGEST_SHARE_BEHIND_FLOAT if in_float else LARGEST_SHARE
    if largest > 1 or differing > allowed * pixels:
        found.append(
            f"the final image differs in {differing} of {pixels} values, by up to {largest} levels"
        )
    return found


def _with_grids_as_outputs(model: onnx.ModelProto) -> tuple[list[str], onnx.ModelProto]:
    """The grids' names, and the same model, which also returns their stored bytes."""
    import onnx

    shown = copy.deepcopy(model)
    clipped = {n.input[0]: n.output[0] for n in shown.graph.node if n.op_type == "Clip"}
    kinds = {tensor.name: tensor.data_type for tensor in shown.graph.initializer}
    names = []
    for node in shown.graph.node:
        if node.op_type == "QuantizeLinear":
            names.append(node.name)
            name, kind = clipped.get(node.output[0], node.output[0]), kinds[node.input[2]]
            shown.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return names, shown


class _TeacherForced(fx.Interpreter):
    """Runs the integer network; after each grid, goes on with the runtime's values."""

    def __init__(self, frozen: fx.GraphModule, stored: dict[str, np.ndarray]) -> None:
        super().__init__(frozen)
        self.stored = stored
        self.left_in_float = placement_of(frozen).left_in_float
        self.found: list[LayerParity] = []

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - torch's own signature
        result = super().run_node(n)
        grid = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if not isinstance(grid, IntegerQuantizer):
            return result
        assert isinstance(result, Quantized)
        if n.name not in self.stored:  # the same rounding as another's, and checked there
            return result
        runtime = torch.from_numpy(self.stored[n.name])
        levels = (grid.stored(result).int() - runtime.int()).abs()
        (value,) = n.all_input_nodes
        source = made_by(value, self.submodules, AbsorbedReLU, Tap)
        maker = self.submodules.get(str(source.target))
        self.found.append(
            LayerParity(
                name=n.name,
                is_layer=isinstance(maker, IntegerLayer),
                is_float=self._is_behind_float(source),
                differing=int((levels > 0).sum()),
                total=levels.numel(),
                largest=int(levels.max()),
            )
        )
        return grid.loaded(runtime)

    def _is_behind_float(self, node: fx.Node) -> bool:
        """Whether real values that an operation in floating point made flow through `node`."""
        made_by = self.submodules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(made_by, Fixed) or {node.name, str(node.target)} & self.left_in_float.keys():
            return True
        if isinstance(made_by, AbsorbedReLU | Add | PassThrough | Tap):
            return any(map(self._is_behind_float, node.all_input_nodes))
        return False


def teacher_forced(
    frozen: fx.GraphModule, image: Tensor, stored: dict[str, np.ndarray]
) -> list[LayerParity]:
    """Every grid, computed from the runtime's own values `stored`, beside what it made of them."""
    interpreter = _TeacherForced(frozen, stored)
    with torch.inference_mode():
        interpreter.run(image)
    return interpreter.found
