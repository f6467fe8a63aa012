"""Networks of a few hundred weights with features to look at, and steps of training on them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparkir.distill.method import Seen, Setting
from sparkir.models.facts import ModelFacts
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.spec import QuantSpec


class Tapped(nn.Module):
    """A block of features, another, and the image; x2 unless told otherwise."""

    def __init__(
        self,
        *,
        width: int = 4,
        blocks: int = 2,
        scale: int = 2,
        value_range: float = 1.0,
        size_multiple: int = 1,
        enlarge_first: bool = False,
    ) -> None:
        super().__init__()
        self.enlarge_first = enlarge_first
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
                for _ in range(blocks)
            )
        )
        self.enlarge = nn.Upsample(scale_factor=scale) if enlarge_first else nn.Identity()
        factor = 1 if enlarge_first else scale
        self.last = nn.Conv2d(width, 3 * factor**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(factor) if factor > 1 else nn.Identity()
        self.facts = ModelFacts(
            name="tapped",
            scale=scale,
            channels=3,
            value_range=value_range,
            size_multiple=size_multiple,
            taps=tuple(f"blocks.{i}" for i in range(blocks)),
            halo_px=blocks + 2,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The enlarged image."""
        return self.shuffle(self.last(self.blocks(self.first(self.enlarge(x)))))


def _block(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())


def lq_images(count: int = 2, side: int = 12) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def quantized(network: nn.Module, bits: int = 4) -> nn.Module:
    prepared = prepare(network, QuantSpec(weight_bits=bits, activation_bits=bits))
    calibrate(prepared, [lq_images() * network.facts.value_range])
    return prepared


def setting(student: nn.Module, teacher: nn.Module, *, steps: int = 100) -> Setting:
    return Setting(student=student, teacher=teacher, examples=[lq_images()], steps=steps)


def seen(
    student: Sequence[Tensor] = (),
    teacher: Sequence[Tensor] = (),
    *,
    output: Tensor | None = None,
    teacher_output: Tensor | None = None,
    lq: Tensor | None = None,
    gt: Tensor | None = None,
) -> Seen:
    """What a method sees, made up."""
    image = torch.zeros(1, 3, 2, 2) if output is None else output
    return Seen(
        lq=image if lq is None else lq,
        gt=image if gt is None else gt,
        output=image,
        teacher_output=image if teacher_output is None else teacher_output,
        student_features=tuple(student),
        teacher_features=tuple(teacher),
    )
