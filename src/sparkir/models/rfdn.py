"""RFDN, the residual feature distillation network (Liu, Tang and Wu, AIM 2020).

"Residual Feature Distillation Network for Lightweight Image Super-Resolution",
arXiv 2009.11551, in the form of the weights released for the AIM 2020 challenge
(``RFDN_AIM``: x4, width 50, 4 blocks, values in [0, 255]), whose parameter names are kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

_NEGATIVE_SLOPE = 0.05
_MIN_SIZE_PX = 15  # the stride-2 convolution of the attention must leave 7 px for its 7 x 7 pooling
_POOLING_WINDOW_PX = 13  # from the centre of the first of 7 cells, 2 px apart, to the last


_CELL_PX, _FIRST_CELL_PX = 6, 7  # a stride of 2 and one of 3; the middle of 3 px and 7 windows


class EnhancedSpatialAttention(nn.Module):
    """ESA (Liu et al., CVPR 2020 workshops): a mask in (0, 1) computed on a coarse grid.

    The grid has about one cell per 6 x 6 px; the mask it gives is interpolated to the input's
    size. (b, width, h, w) -> the same shape, h and w at least 15.

    As published, the mask is stretched so that its first and last cells reach the image's borders,
    and where a cell comes to lie depends on the size of the image. `anchored` puts every cell
    where it was computed, so that a tile sees what the whole image sees.
    """

    def __init__(self, width: int, *, anchored: bool = False) -> None:
        super().__init__()
        self.anchored = anchored
        narrow = width // 4
        self.conv1 = nn.Conv2d(width, narrow, 1)
        self.conv_f = nn.Conv2d(narrow, narrow, 1)
        self.conv_max = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride=2)
        self.conv3 = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv3_ = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv4 = nn.Conv2d(narrow, width, 1)
        self.sigmoid = nn.Sigmoid()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its mask."""
        narrow = self.conv1(x)
        coarse = F.max_pool2d(self.conv2(narrow), kernel_size=7, stride=3)
        coarse = self.relu(self.conv_max(coarse))
        coarse = self.relu(self.conv3(coarse))
        coarse = self.conv3_(coarse)
        if self.anchored:
            context = _spread(coarse, x.size(2), x.size(3))
        else:
            context = F.interpolate(
                coarse, size=(x.size(2), x.size(3)), mode="bilinear", align_corners=False
            )
        mask: Tensor = self.sigmoid(self.conv4(context + self.conv_f(narrow)))
        return x * mask


def _spread(coarse: Tensor, height: int, width: int) -> Tensor:
    """Interpolate between cells whose centres lie at 7, 13, 19, ... px; repeat beyond them."""
    inner = [_CELL_PX * (coarse.size(dim) - 1) + 1 for dim in (2, 3)]
    between = F.interpolate(coarse, size=(inner[0], inner[1]), mode="bilinear", align_corners=True)
    first = _FIRST_CELL_PX
    bottom, right = height - first - inner[0], width - first - inner[1]
    return F.pad(between, (first, right, first, bottom), mode="replicate")


class ResidualFeatureDistillationBlock(nn.Module):
    """RFDB: three steps that each set aside half the channels and refine the rest, then ESA.

    (b, width, h, w) -> the same shape.
    """

    def __init__(self, width: int, *, anchored: bool = False) -> None:
        super().__init__()
        distilled = width // 2
        self.c1_d = nn.Conv2d(width, distilled, 1)
        self.c1_r = nn.Conv2d(width, width, 3, padding=1)
        self.c2_d = nn.Conv2d(width, distilled, 1)
        self.c2_r = nn.Conv2d(width, width, 3, padding=1)
        self.c3_d = nn.Conv2d(width, distilled, 1)
        self.c3_r = nn.Conv2d(width, width, 3, padding=1)
        self.c4 = nn.Conv2d(width, distilled, 3, padding=1)
        self.act = nn.LeakyReLU(_NEGATIVE_SLOPE)
        self.c5 = nn.Conv2d(4 * distilled, width, 1)
        self.esa = EnhancedSpatialAttention(width, anchored=anchored)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        distilled_1 = self.act(self.c1_d(x))
        x = self.act(self.c1_r(x) + x)
        distilled_2 = self.act(self.c2_d(x))
        x = self.act(self.c2_r(x) + x)
        distilled_3 = self.act(self.c3_d(x))
        x = self.act(self.c3_r(x) + x)
        distilled_4 = self.act(self.c4(x))
        distilled = torch.cat([distilled_1, distilled_2, distilled_3, distilled_4], dim=1)
        fused: Tensor = self.esa(self.c5(distilled))
        return fused


class RFDN(nn.Module):
    """RFDN: (b, 3, h, w) in [0, value_range] -> (b, 3, scale*h, scale*w), h and w at least 15.

    Args:
        scale: output pixels per input pixel along one side.
        width: channels of the features, at least 4.
        blocks: number of residual feature distillation blocks.
        value_range: the white level; the published weights want 255.
        anchored: keep the attention's cells where they are computed, so that large images can be
            restored in tiles without a trace. With the published weights Set5 loses 0.006 dB.
    """

    def __init__(
        self,
        *,
        scale: int = 4,
        width: int = 50,
        blocks: int = 4,
        value_range: float = 255.0,
        anchored: bool = False,
    ) -> None:
        super().__init__()
        if width < 4:
            raise SparkirError(f"RFDN needs width >= 4 (its attention uses width / 4), got {width}")
        self.block_names = tuple(f"B{number}" for number in range(1, blocks + 1))
        self.facts = ModelFacts(
            name="rfdn",
            scale=scale,
            channels=3,
            value_range=value_range,
            min_size_px=_MIN_SIZE_PX,
            taps=self.block_names,
            # Every 3x3 convolution reaches 1 px: 4 in each block, 3 around them; and one window
            # of the attention. As published, its grid follows the size of the image, so that no
            # halo makes a tile exactly equal to the whole image: with the published weights and
            # tiles of 32 px the two agree to 62-84 dB, as well with a halo of 32 px as with 128.
            # Anchored, 12 px a block leave 0.04 levels, 16 leave 0.001.
            halo_px=16 * blocks if anchored else 4 * blocks + 3 + _POOLING_WINDOW_PX,
            tile_phase_px=_CELL_PX if anchored else 1,
            exact_tiles=anchored,
        )
        self.fea_conv = nn.Conv2d(3, width, 3, padding=1)
        for name in self.block_names:
            self.add_module(name, ResidualFeatureDistillationBlock(width, anchored=anchored))
        self.c = nn.Sequential(nn.Conv2d(blocks * width, width, 1), nn.LeakyReLU(_NEGATIVE_SLOPE))
        self.LR_conv = nn.Conv2d(width, width, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        shallow = self.fea_conv(x)
        features = shallow
        block_outputs = []
        for name in self.block_names:
            features = self.get_submodule(name)(features)
            block_outputs.append(features)
        fused = self.c(torch.cat(block_outputs, dim=1))
        enlarged: Tensor = self.upsampler(self.LR_conv(fused) + shallow)
        return enlarged
