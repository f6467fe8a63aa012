"""IMDN, the information multi-distillation network, as the challenges' baseline has it.

"Lightweight Image Super-Resolution with Information Multi-distillation Network" (Hui et al.,
ACM MM 2019) won the AIM 2019 challenge in this simplified form, without contrast-aware attention,
and has been the baseline of the NTIRE challenges on efficient super-resolution since ("AIM 2019
Challenge on Constrained Super-Resolution", Zhang et al.). The parameter names are theirs.
"""

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, thirds

_NEGATIVE_SLOPE = 0.05


class DistillationBlock(nn.Module):
    """IMDB: each of three steps sets a quarter of its channels aside and refines the rest.

    (b, width, h, w) -> the same shape.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kept = kept = width // 4
        self.conv1 = _activated(width, width)
        self.conv2 = _activated(width - kept, width)
        self.conv3 = _activated(width - kept, width)
        self.conv4 = nn.Conv2d(width - kept, kept, 3, padding=1)
        self.conv1x1 = nn.Conv2d(4 * kept, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        kept = self.kept
        first = self.conv1(x)
        second = self.conv2(first[:, kept:])
        third = self.conv3(second[:, kept:])
        last = self.conv4(third[:, kept:])
        together = torch.cat([first[:, :kept], second[:, :kept], third[:, :kept], last], dim=1)
        refined: Tensor = x + self.conv1x1(together)
        return refined


class Shortcut(nn.Module):
    """A part of a network and what goes around it; keeps the shape."""

    def __init__(self, sub: nn.Module) -> None:
        super().__init__()
        self.sub = sub

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus what is made of it."""
        around: Tensor = x + self.sub(x)
        return around


class IMDN(nn.Module):
    """IMDN: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w).

    Args:
        scale: output pixels per input pixel along one side.
        width: channels of the features, a multiple of 4.
        blocks: number of distillation blocks.
    """

    def __init__(self, *, scale: int = 4, width: int = 64, blocks: int = 8) -> None:
        super().__init__()
        if width % 4:
            raise SparkirError(f"IMDN needs a width that is a multiple of 4, got {width}")
        self.facts = ModelFacts(
            name="imdn",
            scale=scale,
            channels=3,
            value_range=1.0,
            taps=thirds([f"model.1.sub.{number}" for number in range(blocks)]),
            halo_px=4 * blocks + 3,  # every 3x3 convolution reaches 1 px
        )
        body = [DistillationBlock(width) for _ in range(blocks)]
        self.model = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            Shortcut(nn.Sequential(*body, nn.Conv2d(width, width, 3, padding=1))),
            nn.Conv2d(width, 3 * scale**2, 3, padding=1),
            nn.PixelShuffle(scale),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        enlarged: Tensor = self.model(x)
        return enlarged


def _activated(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(_NEGATIVE_SLOPE))
