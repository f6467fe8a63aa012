"""NAFNet, restoration without nonlinear activation functions (Chen et al., ECCV 2022).

"Simple Baselines for Image Restoration", arXiv 2204.04676, with the parameter names of the
authors' code (``NAFNet``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, require_counts
from sparkir.models.normalize import LayerNorm2d

_HALO_PX = 64


class SimpleGate(nn.Module):
    """One half of the channels times the other: (b, 2c, h, w) -> (b, c, h, w) (equation 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        first, second = x.chunk(2, dim=1)
        return first * second


class NAFBlock(nn.Module):
    """Two residual branches, each scaled per channel by factors that start at zero (figure 3).

    (b, width, h, w) -> the same shape.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(width), LayerNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.sg = SimpleGate()
        # Simplified channel attention (equation 5).
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1))
        self.conv3 = nn.Conv2d(width, width, 1)
        self.conv4 = nn.Conv2d(width, 2 * width, 1)
        self.conv5 = nn.Conv2d(width, width, 1)
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus both residuals."""
        gated = self.sg(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.conv3(gated * self.sca(gated)) * self.beta
        refined: Tensor = self.conv5(self.sg(self.conv4(self.norm2(x)))) * self.gamma
        return x + refined


class NAFNet(nn.Module):
    """NAFNet: (b, 3, h, w) in [0, 1] -> the same shape, h and w multiples of 2 to the levels.

    The defaults are the paper's network of width 32 for deblurring; for denoising it has blocks
    2, 2, 4, 8, then 12, then 2, 2, 2, 2. The published figures for deblurring come from attention
    that averages over windows of 384 px, which training sees, instead of the whole image.

    Args:
        width: channels at full resolution; each level below has twice as many.
        encoder_blocks: blocks of each level on the way down, the finest first.
        middle_blocks: blocks of the coarsest level.
        decoder_blocks: blocks of each level on the way up, the coarsest first.
    """

    def __init__(
        self,
        *,
        width: int = 32,
        encoder_blocks: Sequence[int] = (1, 1, 1, 28),
        middle_blocks: int = 1,
        decoder_blocks: Sequence[int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        _require_levels(encoder_blocks, decoder_blocks)
        levels = len(encoder_blocks)
        widths = [width * 2**level for level in range(levels + 1)]
        upward = range(levels - 1, -1, -1)
        self.facts = ModelFacts(
            name="nafnet",
            scale=1,
            channels=3,
            value_range=1.0,
            size_multiple=2**levels,
            taps=(
                *(f"encoders.{number}" for number in range(levels)),
                "middle_blks",
                *(f"decoders.{number}" for number in range(levels)),
            ),
            halo_px=min(_HALO_PX, _reach_px(encoder_blocks, middle_blocks, decoder_blocks)),
            exact_tiles=False,  # its attention averages channels over the image
        )
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.encoders = nn.ModuleList(
            _blocks(widths[level], encoder_blocks[level]) for level in range(levels)
        )
        self.downs = nn.ModuleList(
            nn.Conv2d(widths[level], widths[level + 1], 2, stride=2) for level in range(levels)
        )
        self.middle_blks = _blocks(widths[-1], middle_blocks)
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[level + 1], 2 * widths[level + 1], 1, bias=False),
                nn.PixelShuffle(2),
            )
            for level in upward
        )
        self.decoders = nn.ModuleList(
            _blocks(widths[level], count)
            for level, count in zip(upward, decoder_blocks, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the image plus the network's correction; not clipped."""
        features = self.intro(x)
        skipped = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skipped.append(encoder(features))
            features = down(skipped[-1])
        features = self.middle_blks(features)
        for decoder, up in zip(self.decoders, self.ups, strict=True):
            features = decoder(up(features) + skipped.pop())
        correction: Tensor = self.ending(features)
        return correction + x


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(width) for _ in range(count)))


def _reach_px(encoder: Sequence[int], middle: int, decoder: Sequence[int]) -> int:
    """How far an output pixel sees, but for the attention: one pixel of its level in each block."""
    coarsest_px = 1 << len(encoder)
    reach = 2 + middle * coarsest_px  # the first and the last convolution
    for level, (down, up) in enumerate(zip(encoder, reversed(decoder), strict=True)):
        reach += (down + up) << level
    return reach + coarsest_px - 1


def _require_levels(encoder: Sequence[int], decoder: Sequence[int]) -> None:
    require_counts("nafnet", encoder_blocks=encoder, decoder_blocks=decoder)
    if len(encoder) != len(decoder):
        raise SparkirError(
            f"NAFNet goes up as many levels as down, got encoder_blocks {encoder!r} and "
            f"decoder_blocks {decoder!r}"
        )
