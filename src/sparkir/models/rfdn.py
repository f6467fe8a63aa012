"""RFDN, the residual feature distillation network (Liu, Tang and Wu, AIM 2020).

"Residual Feature Distillation Network for Lightweight Image Super-Resolution",
arXiv 2009.11551, in the form of the weights released for the AIM 2020 challenge
(``RFDN_AIM``: x4, width 50, 4 blocks, values in [0, 255]), whose parameter names are kept.
"""

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.models.spatial_attention import (
    CELL_PX,
    MIN_SIZE_PX,
    SpatialAttention,
    attention_halo_px,
)

_NEGATIVE_SLOPE = 0.05


class EnhancedSpatialAttention(SpatialAttention):
    """RFDN's attention: narrow to a quarter, three convolutions on the coarse grid."""

    def __init__(self, width: int, *, anchored: bool = False) -> None:
        super().__init__(anchored=anchored)
        narrow = width // 4
        self.conv1 = nn.Conv2d(width, narrow, 1)
        self.conv_f = nn.Conv2d(narrow, narrow, 1)
        self.conv_max = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride=2)
        self.conv3 = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv3_ = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv4 = nn.Conv2d(narrow, width, 1)
        self.relu = nn.ReLU()

    def refine(self, coarse: Tensor) -> Tensor:
        """(b, narrow, cells, cells) -> the same shape."""
        coarse = self.relu(self.conv_max(coarse))
        refined: Tensor = self.conv3_(self.relu(self.conv3(coarse)))
        return refined


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
            min_size_px=MIN_SIZE_PX,
            taps=self.block_names,
            # Every 3x3 convolution reaches 1 px: 4 in each block and 3 around them.
            halo_px=attention_halo_px(reach_px=4 * blocks + 3, blocks=blocks, anchored=anchored),
            tile_phase_px=CELL_PX if anchored else 1,
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
