"""Where a network will run, as far as it changes what is trained.

Two things do. *Placement*: a runtime that computes from grid to grid rounds a convolution's result
before an addition; one that fuses adds first and rounds once. *Steps*: a runtime whose order of
float32 operations is not ours, or not the same on every machine, agrees with the integer network
only if no order makes a difference; `steps` sees to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

TargetName = Literal["onnxruntime", "portable", "openvino", "tensorrt"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a family of runtimes wants of a network."""

    title: str
    fuses: bool = False
    """Sums of a convolution go on in real values, through additions and activation functions, to
    the next convolution's grid; else every kernel writes a grid."""
    any_order: bool = False
    """Steps are such that the order of float32 operations makes no difference."""
    int8_only: bool = False
    """Grids are symmetric, stored as int8 with zero point 0, also where nothing is negative. The
    image itself, of 256 levels from 0 on, then has no grid, and the first layers stay in float."""
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    """What executes the file here, to check it."""
    native: bool = True
    """Whether that is the runtime which the file is for."""


TARGETS: dict[TargetName, Target] = {
    "onnxruntime": Target(title="ONNX Runtime on the CPU"),
    "portable": Target(title="any runtime whose kernels go from grid to grid", any_order=True),
    "openvino": Target(title="OpenVINO on the CPU", fuses=True, any_order=True, runtime="openvino"),
    "tensorrt": Target(title="TensorRT", fuses=True, any_order=True, int8_only=True, native=False),
}
assert set(TARGETS) == set(get_args(TargetName))
