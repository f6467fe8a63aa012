"""RLFN, the residual local feature network (Kong et al., NTIRE 2022).

"Residual Local Feature Network for Efficient Super-Resolution", arXiv 2205.07514: RFDN without
its side branches. Parameter names and the range [0, 255] are those of the published weights, of
which there are three kinds: RLFN as in the paper (the defaults), RLFN-S (``width=48``), and the
pruned winner of the NTIRE 2022 challenge (``width=46, inner_width=48, blocks=4``).
"""

from torch import Tensor, nn

from sparkir.models.facts import ModelFacts, thirds
from sparkir.models.spatial_attention import (
    CELL_PX,
    MIN_SIZE_PX,
    SpatialAttention,
    attention_halo_px,
)

_NEGATIVE_SLOPE = 0.05
_ATTENTION_WIDTH = 16


class LocalAttention(SpatialAttention):
    """RLFN's attention: narrow to 16 channels, one convolution on the coarse grid."""

    def __init__(self, width: int, *, anchored: bool) -> None:
        super().__init__(anchored=anchored)
        narrow = _ATTENTION_WIDTH
        self.conv1 = nn.Conv2d(width, narrow, 1)
        self.conv_f = nn.Conv2d(narrow, narrow, 1)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride=2)
        self.conv3 = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv4 = nn.Conv2d(narrow, width, 1)

    def refine(self, coarse: Tensor) -> Tensor:
        """(b, 16, cells, cells) -> the same shape."""
        refined: Tensor = self.conv3(coarse)
        return refined


class ResidualLocalFeatureBlock(nn.Module):
    """RLFB: three convolutions with a shortcut around them, then attention.

    (b, width, h, w) -> the same shape.
    """

    def __init__(self, width: int, inner_width: int, *, anchored: bool) -> None:
        super().__init__()
        self.c1_r = nn.Conv2d(width, inner_width, 3, padding=1)
        self.c2_r = nn.Conv2d(inner_width, inner_width, 3, padding=1)
        self.c3_r = nn.Conv2d(inner_width, width, 3, padding=1)
        self.c5 = nn.Conv2d(width, width, 1)
        self.esa = LocalAttention(width, anchored=anchored)
        self.act = nn.LeakyReLU(_NEGATIVE_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        refined = self.act(self.c1_r(x))
        refined = self.act(self.c2_r(refined))
        refined = self.act(self.c3_r(refined))
        attended: Tensor = self.esa(self.c5(refined + x))
        return attended


class RLFN(nn.Module):
    """RLFN: (b, 3, h, w) in [0, value_range] -> (b, 3, scale*h, scale*w), h and w at least 15.

    Args:
        scale: output pixels per input pixel along one side.
        width: channels of the features.
        inner_width: channels inside a block, between its three convolutions; ``width`` if None.
        blocks: number of residual local feature blocks.
        value_range: the white level; the published weights want 255.
        anchored: keep the attention's cells where they are computed, so that large images can be
            restored in tiles without a trace; see :class:`~sparkir.models.rfdn.RFDN`.
    """

    def __init__(
        self,
        *,
        scale: int = 4,
        width: int = 52,
        inner_width: int | None = None,
        blocks: int = 6,
        value_range: float = 255.0,
        anchored: bool = False,
    ) -> None:
        super().__init__()
        self.block_names = tuple(f"block_{number}" for number in range(1, blocks + 1))
        self.facts = ModelFacts(
            name="rlfn",
            scale=scale,
            channels=3,
            value_range=value_range,
            min_size_px=MIN_SIZE_PX,
            taps=thirds(self.block_names),
            # Every 3x3 convolution reaches 1 px: 3 in each block and 3 around them.
            halo_px=attention_halo_px(reach_px=3 * blocks + 3, blocks=blocks, anchored=anchored),
            tile_phase_px=CELL_PX if anchored else 1,
            exact_tiles=anchored,
        )
        self.conv_1 = nn.Conv2d(3, width, 3, padding=1)
        for name in self.block_names:
            block = ResidualLocalFeatureBlock(width, inner_width or width, anchored=anchored)
            self.add_module(name, block)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        shallow = self.conv_1(x)
        features = shallow
        for name in self.block_names:
            features = self.get_submodule(name)(features)
        enlarged: Tensor = self.upsampler(self.conv_2(features) + shallow)
        return enlarged
