"""SAFMN, spatially adaptive feature modulation (Sun et al., ICCV 2023; NTIRE 2023).

"Spatially-Adaptive Feature Modulation for Efficient Image Super-Resolution", arXiv 2302.13800, in
the form of the NTIRE 2023 challenge, whose parameter names are kept: one response normalisation
behind the first layer in place of a layer normalisation in every block.

The published code pools to a 4th, 8th and 16th of the image's size, whatever that is; here images
are completed to whole cells of 16 px, so that every window is as large as the next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, thirds
from sparkir.models.resample import BilinearUp

_CELLS_PX = (1, 4, 8, 16)  # of the four parts of the channels
_GROWTH = 2
_TINY = 1e-6


class ResponseNormalisation(nn.Module):
    """GRN (Woo et al., CVPR 2023): each channel by its norm over the image; keeps the shape.

    The norms are computed in float64, where the order in which a library sums cannot be seen in a
    float32.
    """

    stays_in_float = "statistics of the whole image need more than 8 bits"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` and what its channels' norms, relative to their mean, make of it."""
        norm = x.double().square().sum((2, 3), keepdim=True).sqrt()
        relative = (norm / (norm.mean(1, keepdim=True) + _TINY)).to(x.dtype)
        return self.gamma * (x * relative) + self.beta + x


class FeatureModulation(nn.Module):
    """SAFM: a mask from four scales, of a quarter of the channels each; keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.quarter = quarter = width // len(_CELLS_PX)
        self.mfr = nn.ModuleList(
            nn.Conv2d(quarter, quarter, 3, padding=1, groups=quarter, bias=False) for _ in _CELLS_PX
        )
        self.aggr = nn.Conv2d(width, width, 1, bias=False)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its mask; height and width are multiples of 16."""
        seen = []
        for number, (cell, convolution) in enumerate(zip(_CELLS_PX, self.mfr, strict=True)):
            part = x[:, number * self.quarter : (number + 1) * self.quarter]
            if cell > 1:
                part = convolution(F.max_pool2d(part, cell))
                seen.append(F.interpolate(part, scale_factor=cell, mode="nearest"))
            else:
                seen.append(convolution(part))
        modulated: Tensor = self.act(self.aggr(torch.cat(seen, dim=1))) * x
        return modulated


class ChannelMixer(nn.Module):
    """CCM: a 3x3 convolution to twice the channels, and a 1x1 one back; keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ccm = nn.Sequential(
            nn.Conv2d(width, _GROWTH * width, 3, padding=1, bias=False),
            nn.GELU(),
            nn.Conv2d(_GROWTH * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed features."""
        mixed: Tensor = self.ccm(x)
        return mixed


class ModulationBlock(nn.Module):
    """Modulation, then mixing, each beside a shortcut; keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.safm, self.ccm = FeatureModulation(width), ChannelMixer(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        x = self.safm(x) + x
        refined: Tensor = self.ccm(x) + x
        return refined


class SAFMN(nn.Module):
    """SAFMN: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w), h and w multiples of 16.

    Its normalisation looks at the whole image, and in a tile at the tile.

    Args:
        scale: output pixels per input pixel along one side; the published weights are for x4.
        width: channels of the features, a multiple of 4.
        blocks: number of modulation blocks.
    """

    def __init__(self, *, scale: int = 4, width: int = 36, blocks: int = 8) -> None:
        super().__init__()
        if width % len(_CELLS_PX):
            raise SparkirError(f"SAFMN needs a width that 4 divides, got {width}")
        self.facts = ModelFacts(
            name="safmn",
            scale=scale,
            channels=3,
            value_range=1.0,
            size_multiple=max(_CELLS_PX),
            taps=thirds([f"feats.{number}" for number in range(blocks)]),
            # Each block reaches 2 px and the layers around them 1; then one cell beside that of
            # the pixel. Through all blocks it would be 16 times as many.
            halo_px=2 * blocks + 2 + 2 * max(_CELLS_PX),
            tile_phase_px=max(_CELLS_PX),
            exact_tiles=False,
        )
        self.to_feat = nn.Conv2d(3, width, 3, padding=1)
        self.norm = ResponseNormalisation(width)
        self.feats = nn.Sequential(*(ModulationBlock(width) for _ in range(blocks)))
        self.to_img = nn.Sequential(
            nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )
        self.enlarge = BilinearUp(3, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        features = self.feats(self.norm(self.to_feat(x)))
        enlarged: Tensor = self.to_img(features) + self.enlarge(x)
        return enlarged
