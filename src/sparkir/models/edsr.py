"""EDSR, the enhanced deep residual network (Lim et al., CVPR 2017 workshops).

"Enhanced Deep Residual Networks for Single Image Super-Resolution", arXiv 1707.02921, with the
parameter names of the authors' EDSR-PyTorch. There two fixed 1x1 convolutions take the mean
colour off and put it back; here it is a constant, so that quantizing the network leaves it exact.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, thirds
from sparkir.models.mean_colour import mean_colour, take_shift

_VALUE_RANGE = 255.0


class ResidualBlock(nn.Module):
    """Two convolutions and a scaled shortcut, no batch normalisation; keeps the shape."""

    def __init__(self, width: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its scaled residual."""
        residual: Tensor = self.body(x)
        if self.res_scale != 1.0:  # decided when the network is built, not by the data
            residual = residual * self.res_scale
        return residual + x


class EDSR(nn.Module):
    """EDSR: (b, 3, h, w) in [0, 255] -> (b, 3, scale*h, scale*w).

    The defaults are the paper's baseline; its large network is width 256, blocks 32,
    res_scale 0.1.

    Args:
        scale: 1, 3 or a power of two.
        width: channels of the features.
        blocks: number of residual blocks.
        res_scale: factor on each block's residual; below 1 it keeps wide networks stable.
    """

    mean: Tensor

    def __init__(
        self, *, scale: int = 4, width: int = 64, blocks: int = 16, res_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="edsr",
            scale=scale,
            channels=3,
            value_range=_VALUE_RANGE,
            taps=thirds([f"body.{number}" for number in range(blocks)]),
            halo_px=2 * blocks + 4,  # head 1, body end 1, the enlarging tail less than 2
        )
        self.register_buffer("mean", mean_colour(_VALUE_RANGE), persistent=False)
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.body = nn.Sequential(
            *(ResidualBlock(width, res_scale) for _ in range(blocks)),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.tail = nn.Sequential(_upsampler(scale, width), nn.Conv2d(width, 3, 3, padding=1))
        self.register_load_state_dict_pre_hook(_drop_mean_shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        shallow = self.head(x - self.mean)
        enlarged: Tensor = self.tail(self.body(shallow) + shallow)
        return enlarged + self.mean

    @staticmethod
    def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state_dict without the mean shift that is a constant here.

        Raises:
            SparkirError: its mean shift is another one than EDSR's.
        """
        kept = dict(state)
        for name, sign in (("sub_mean", -1), ("add_mean", 1)):
            take_shift(kept, name, sign=sign, value_range=_VALUE_RANGE, network="EDSR")
        return kept


def _drop_mean_shift(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Let a plain ``load_state_dict`` take published weights as well (a torch pre-hook)."""
    assert isinstance(module, EDSR)
    own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    for dropped in own.keys() - module.from_published(own).keys():
        del state[prefix + dropped]


def _upsampler(scale: int, width: int) -> nn.Sequential:
    """Return the published enlarging steps: one of 3, or as many of 2 as needed."""
    doublings = round(math.log2(scale))
    if scale == 3:
        factors = [3]
    elif scale == 2**doublings:
        factors = [2] * doublings
    else:
        raise SparkirError(f"EDSR enlarges by 1, 3 or a power of two, got scale {scale}")
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [nn.Conv2d(width, width * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)
