"""FMEN, the fast and memory-efficient network (Du et al., NTIRE 2022).

"Fast and Memory-Efficient Network Towards Efficient Image Super-Resolution", arXiv 2204.08397, in
the form that is deployed, where each re-parameterised block is one 3x3 convolution ("rep_conv" in
the published parameter names, which are kept).
"""

from torch import Tensor, nn

from sparkir.models.facts import ModelFacts, thirds
from sparkir.models.folded import folded

_NEGATIVE_SLOPE = 0.1
_ATTENTION_WIDTH, _WARMUP_WIDTH = 16, 12
_WARMUP_BLOCKS = 2


class EnhancedResidualBlock(nn.Module):
    """ERB: two convolutions; their shortcuts are folded into them. Keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (folded("rep_conv", width, width) for _ in range(2))
        self.act = nn.LeakyReLU(_NEGATIVE_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        refined: Tensor = self.conv2(self.act(self.conv1(x)))
        return refined


class HighFrequencyAttention(nn.Module):
    """HFAB: a mask in (0, 1) made by a few narrow convolutions at full size; keeps the shape."""

    def __init__(self, width: int, narrow: int, blocks: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, narrow, 3, padding=1)
        self.convs = nn.Sequential(*(EnhancedResidualBlock(narrow) for _ in range(blocks)))
        self.excitate = nn.Conv2d(narrow, width, 3, padding=1)
        self.act, self.sigmoid = nn.LeakyReLU(_NEGATIVE_SLOPE), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its mask."""
        narrow = self.act(self.convs(self.act(self.squeeze(x))))
        attended: Tensor = x * self.sigmoid(self.excitate(narrow))
        return attended


class FMEN(nn.Module):
    """FMEN: (b, 3, h, w) in [0, 255] -> (b, 3, scale*h, scale*w).

    Args:
        scale: output pixels per input pixel along one side.
        width: channels of the features.
        blocks: number of pairs of a residual and an attention block.
    """

    def __init__(self, *, scale: int = 4, width: int = 50, blocks: int = 4) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="fmen",
            scale=scale,
            channels=3,
            value_range=255.0,
            taps=thirds([f"HFABs.{number}" for number in range(blocks)]),
            # Each 3x3 convolution reaches 1 px: 6 in each pair, of whose attention 4; 6 in that of
            # the start; 4 more.
            halo_px=6 * blocks + 10,
        )
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.warmup = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            HighFrequencyAttention(width, _WARMUP_WIDTH, _WARMUP_BLOCKS),
        )
        # The published names.
        self.ERBs = nn.ModuleList(EnhancedResidualBlock(width) for _ in range(blocks))
        self.HFABs = nn.ModuleList(
            HighFrequencyAttention(width, _ATTENTION_WIDTH, 1) for _ in range(blocks)
        )
        self.lr_conv = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Sequential(
            nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        shallow = self.head(x)
        features = self.warmup(shallow)
        for residual, attention in zip(self.ERBs, self.HFABs, strict=True):
            features = attention(residual(features))
        enlarged: Tensor = self.tail(self.lr_conv(features) + shallow)
        return enlarged
