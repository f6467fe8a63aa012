"""The gate of the mobile path: a program is executed, and every grid compared with the reference.

As in `parity`, each grid is computed from the runtime's own input to it. XNNPACK's convolutions
and linear layers are exact. Its additions are not: they work in fixed point and round half-way
cases up, where the integer network rounds them to even, as ONNX Runtime does. So long as no step
is a simple multiple of another, half-way cases are rare; with steps that are powers of two they
are common, and this gate refuses the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from sparkir.deploy.decomposed import INT8
from sparkir.deploy.delegation import Delegation
from sparkir.deploy.executorch import ExecuTorchSession, MobileProgram, to_executorch
from sparkir.deploy.parity import LayerParity, teacher_forced
from sparkir.deploy.qdq import grid_calls
from sparkir.errors import SparkirError
from sparkir.models.facts import facts_of
from sparkir.quant.arithmetic import Quantized
from sparkir.quant.reference import IntegerQuantizer

LARGEST_SHARE = 1e-3
"""Of values of a grid that may differ, by one level, where no convolution is involved. Learned
steps stay below it; powers of two exceed it many times."""
LARGEST_RMS_LEVELS = 2.0
"""Of the final image's differences, in levels of 255. Single differences spread in a deep network,
so that their number says nothing; a fault shows in their size."""


@dataclass(frozen=True, kw_only=True)
class MobileParity:
    """What the comparison found."""

    grids: list[LayerParity]
    """In order of execution, summed over the images."""
    differing: int
    """Values of the final images that differ, by a level of 255 or more."""
    total: int
    largest_level: int
    rms_levels: float
    """Root mean square of the final images' differences."""
    delegation: Delegation
    failures: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Two lines for the user."""
        exact = sum(grid.differing == 0 for grid in self.grids)
        return (
            f"{self.delegation.summary()}\n{exact} of {len(self.grids)} grids bit for bit; final "
            f"image: {self.differing} of {self.total} values differ, by "
            f"{self.rms_levels:.2f} levels of 255 (root mean square)"
        )


def check_mobile_parity(
    program: MobileProgram, frozen: fx.GraphModule, images: Sequence[Tensor]
) -> MobileParity:
    """Run `program` and compare it with the integer network that it was made from.

    Args:
        program: from `to_executorch`, without its grids.
        frozen: the integer network.
        images: each (1, C, H, W), of a size that the program takes, in the network's value range.

    Raises:
        SparkirError: ExecuTorch cannot open or run the program.
    """
    plain = ExecuTorchSession(program.content)
    shown = ExecuTorchSession(
        to_executorch(
            frozen, largest_px=plain.largest_px, fixed_size=plain.fixed_size, with_grids=True
        ).content
    )
    grids: dict[str, LayerParity] = {}
    levels = []
    for image in images:
        for found in teacher_forced(frozen, image, _grids_of(shown, frozen, image)):
            grids[found.name] = _summed(grids[found.name], found) if found.name in grids else found
        levels.append(_levels_between(plain, frozen, image))
    off = torch.cat(levels)
    rms = float(off.square().mean().sqrt())
    return MobileParity(
        grids=list(grids.values()),
        differing=int((off > 0).sum()),
        total=off.numel(),
        largest_level=int(off.max()),
        rms_levels=rms,
        delegation=program.delegation,
        failures=_failures(list(grids.values()), rms),
    )


def require_mobile_parity(parity: MobileParity) -> None:
    """Refuse a program that differs too much.

    Raises:
        SparkirError: it does; the first diverging grid comes first.
    """
    if parity.failures:
        raise SparkirError(
            "the mobile program does not match the integer network: "
            + "; ".join(parity.failures[:3])
        )


def _grids_of(
    shown: ExecuTorchSession, frozen: fx.GraphModule, image: Tensor
) -> dict[str, np.ndarray]:
    """The runtime's values of every grid, as that grid itself stores them."""
    _, *signed = shown.run(image.numpy())
    stored = {}
    for call, values in zip(grid_calls(frozen), signed, strict=True):
        grid = frozen.get_submodule(str(call.target))
        assert isinstance(grid, IntegerQuantizer)
        ints = torch.from_numpy(values).float() - (grid.zero_level + INT8.min)
        stored[call.name] = grid.stored(Quantized(ints, grid.scale, grid.zero_point)).numpy()
    return stored


def _levels_between(plain: ExecuTorchSession, frozen: fx.GraphModule, image: Tensor) -> Tensor:
    """(n,) by how many levels of 255 each value of the final image differs."""
    (restored,) = plain.run(image.numpy())
    with torch.inference_mode():
        expected = frozen(image)
    step = facts_of(frozen).value_range / 255
    off: Tensor = (torch.from_numpy(restored) - expected) / step
    return off.round().abs().flatten()


def _summed(a: LayerParity, b: LayerParity) -> LayerParity:
    return LayerParity(
        name=a.name,
        is_layer=a.is_layer,
        is_float=a.is_float,
        differing=a.differing + b.differing,
        total=a.total + b.total,
        largest=max(a.largest, b.largest),
    )


def _failures(grids: Sequence[LayerParity], rms: float) -> list[str]:
    found = [
        f"{grid.name} differs in {grid.differing} of {grid.total} values, by up to "
        f"{grid.largest} levels"
        for grid in grids
        if grid.largest > 1 or grid.differing > _allowed(grid)
    ]
    if rms > LARGEST_RMS_LEVELS:
        found.append(f"the final image differs by {rms:.1f} levels of 255 (root mean square)")
    return found


def _allowed(grid: LayerParity) -> float:
    """How many values may differ: of a layer none, else a small share or a single one."""
    return 0 if grid.is_layer else max(1, LARGEST_SHARE * grid.total)
