"""What to quantize, and how finely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from sparkir.errors import SparkirError
from sparkir.quant.targets import TARGETS, Target, TargetName

CARRIER_BITS = 8
"""Bits of tensors that are only added, shuffled or passed through a table, never multiplied."""


STORED_BITS = (2, 4, 8)
"""Widths of weights that files pack; others are stored in the next of them."""

ActivationGrid = Literal["auto", "affine", "symmetric"]
Learned = Literal["lsq", "pams", "none"]
Calibration = Literal["mse", "percentile", "minmax"]
_CHOICES = {
    "activation_grid": get_args(ActivationGrid),
    "learned": get_args(Learned),
    "calibration": get_args(Calibration),
}


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a network is quantized. Bits count what a multiplication sees.

    A convolution's weights take `weight_bits` and the tensor it reads takes `activation_bits`.
    Tensors that only flow into additions, tables or the output image are carried at 8 bits, as
    every integer runtime carries them.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {  # for recipes
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    weight_bits: int = 8
    """2 to 8; per output channel, symmetric, signed."""
    activation_bits: int = 8
    """2 to 8; per tensor, stored unsigned."""
    first_last_bits: int = 8
    """Bits of the first and last layer's weights and inputs; they see and make the image itself."""
    reduce_range: bool = False
    """Hold weights of 8 bits to 7, -64 to 63, for OpenVINO on x86 without VNNI: there a sum of two
    8-bit products must fit 16 bits, or it saturates and the image is another. ONNX Runtime needs no
    such thing."""
    float_layers: tuple[str, ...] = ()
    """Layers to leave in floating point, by name; `*` stands for anything, as in `tail.*`. The
    first and last layer stay those of the whole network: no other takes their place."""
    activation_grid: ActivationGrid = "auto"
    """`affine` fits both ends of the range; `symmetric` keeps zero in the middle; `auto` is
    symmetric at 8 bits for targets that fuse, and at all widths for those that take nothing else. A
    tensor that is never negative starts at zero, except where there is only int8."""
    learned: Learned = "lsq"
    """How steps are trained: LSQ (Esser 2020), a clip bound as in PAMS (Li 2020), or not at all."""
    calibration: Calibration = "mse"
    """How ranges start: least squared error, the 99.9th percentile, or the extremes."""
    equalize: bool = False
    """Scale channels before grids are fitted, so that rounding costs the output least
    (`quant.equalize`). The student computes the same before rounding, and its graph stays as it
    is."""
    target: TargetName = "onnxruntime"
    """Where the network will run; see `targets`."""

    def __post_init__(self) -> None:
        """Refuse what there is not, and bit widths that no grid here can hold."""
        for field in ("weight_bits", "activation_bits", "first_last_bits"):
            bits = getattr(self, field)
            if bits not in range(2, 9):
                raise SparkirError(f"{field} is {bits}; choose a whole number from 2 to 8")
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise SparkirError(
                    f"no {field} {getattr(self, field)!r}; known: {', '.join(known)}"
                )
        if self.target not in TARGETS:
            raise SparkirError(f"no target {self.target!r}; known: {', '.join(TARGETS)}")
        if self.runs_on.int8_only and self.activation_grid == "affine":
            raise SparkirError(
                f'{self.runs_on.title} takes symmetric grids only; leave activation_grid at "auto"'
            )

    @property
    def runs_on(self) -> Target:
        """What the target wants."""
        return TARGETS[self.target]

    def symmetric(self, bits: int) -> bool:
        """Whether zero sits in the middle of grids of `bits` that hold negative values."""
        if self.activation_grid == "auto":
            return self.runs_on.int8_only or (self.runs_on.fuses and bits == CARRIER_BITS)
        return self.activation_grid == "symmetric"

    @property
    def most_weight_bits(self) -> int:
        """Of any layer's weights."""
        return 7 if self.reduce_range else 8

    @property
    def label(self) -> str:
        """The field's shorthand, such as `W4A8`."""
        return f"W{min(self.weight_bits, self.most_weight_bits)}A{self.activation_bits}"
