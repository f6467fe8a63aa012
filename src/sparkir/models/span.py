"""SPAN, attention without parameters (Wan et al., NTIRE 2024).

"Swift Parameter-free Attention Network for Efficient Super-Resolution", arXiv 2311.12770, in the
form that is deployed, where each re-parameterised convolution is one 3x3 ("eval_conv" in the
published parameter names, which are kept). The defaults are those of the slim networks of the
NTIRE challenges; the paper's has ``width=48, cat_width=48``.
"""

from typing import cast

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, thirds
from sparkir.models.folded import folded
from sparkir.models.mean_colour import mean_colour

_INNER_RANGE = 255.0  # of the image that the first layer reads


class CentredSigmoid(nn.Module):
    """sigmoid(x) - 1/2, the paper's symmetric activation."""

    of_one_value = True

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        return torch.sigmoid(x) - 0.5


class AttentionBlock(nn.Module):
    """SPAB: three convolutions; what they make says how much of it is wanted. Keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (folded("eval_conv", width, width) for _ in range(3))
        self.act = nn.SiLU()
        self.attention = CentredSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        return self.finish(x, self.start(x))

    def start(self, x: Tensor) -> Tensor:
        """Return what the first convolution makes of it."""
        started: Tensor = self.act(self.c1_r(x))
        return started

    def finish(self, x: Tensor, started: Tensor) -> Tensor:
        """Return the refined features."""
        refined = self.c3_r(self.act(self.c2_r(started)))
        attended: Tensor = (refined + x) * self.attention(refined)
        return attended


class SPAN(nn.Module):
    """SPAN: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w).

    Args:
        scale: output pixels per input pixel along one side.
        width: channels of the features.
        cat_width: channels behind the last layer but one.
        blocks: number of attention blocks, at least 2.
    """

    mean: Tensor

    def __init__(
        self, *, scale: int = 4, width: int = 28, cat_width: int = 28, blocks: int = 6
    ) -> None:
        super().__init__()
        if blocks < 2:
            raise SparkirError(f"SPAN needs blocks >= 2 (its end reads two of them), got {blocks}")
        self.block_names = tuple(f"block_{number}" for number in range(1, blocks + 1))
        self.facts = ModelFacts(
            name="span",
            scale=scale,
            channels=3,
            value_range=1.0,
            taps=thirds((*self.block_names[:-1], "conv_2")),  # the last block is read half-way too
            halo_px=3 * blocks + 3,  # every 3x3 convolution reaches 1 px
        )
        self.register_buffer("mean", mean_colour(1.0), persistent=False)
        self.conv_1 = folded("eval_conv", 3, width)
        for name in self.block_names:
            self.add_module(name, AttentionBlock(width))
        self.conv_2 = folded("eval_conv", width, width)
        self.conv_cat = nn.Conv2d(4 * width, cat_width, 1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(cat_width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        shallow = features = self.conv_1((x - self.mean) * _INNER_RANGE)
        outputs = []
        for name in self.block_names[:-1]:
            features = self.get_submodule(name)(features)
            outputs.append(features)
        last = cast("AttentionBlock", self.get_submodule(self.block_names[-1]))
        started = last.start(features)
        features = self.conv_2(last.finish(features, started))
        together = torch.cat([shallow, features, outputs[0], started], dim=1)
        enlarged: Tensor = self.upsampler(self.conv_cat(together))
        return enlarged
