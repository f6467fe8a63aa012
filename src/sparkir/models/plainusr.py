"""PlainUSR, plain convolutions in a U-Net of channels (Wang et al., ACCV 2024).

"PlainUSR: Chasing Faster ConvNet for Efficient Super-Resolution", arXiv 2409.13435, in the form
that is deployed, where each convolution is one 3x3 ("Rep" in the names of the published weights,
whose parameter names are kept). Each step down works on the first of its channels alone; the rest
waits beside it until the way back.

The published network carries the image itself past the blocks, as three more channels of its first
and last layer. Here they have layers of their own: on a grid shared with features, whose range is
wider, 8 bits would hold a third of the image's levels.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

Size = Literal["u", "t", "s", "m"]
_WIDTHS: dict[Size, tuple[int, ...]] = {
    "u": (16, 8),
    "t": (32, 16),
    "s": (32, 16, 8),
    "m": (48, 32, 16),
}
_ATTENTION_WIDTH: dict[Size, int] = {"s": 4, "m": 8}
_NEGATIVE_SLOPE = 0.05
_WINDOW_PX = 7  # of the soft pooling
_CELL_PX = 6  # the pooling's stride of 3 and a convolution's of 2


class SoftPooling(nn.Module):
    """The mean of each 7x7 window, weighted by exp(x) (Stergiou et al., ICCV 2021); stride 3."""

    stays_in_float = "an exponential needs more than 8 bits"

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h', w')."""
        weights = x.exp()
        total = F.avg_pool2d(weights * x, _WINDOW_PX, stride=3)
        return total / F.avg_pool2d(weights, _WINDOW_PX, stride=3)


class Modulation(nn.Module):
    """x times a mask that has just been interpolated, times a gate.

    On a grid of its own an interpolated mask would lie half-way between two levels again and
    again, for its step is nearly that of the coarse mask, and libraries would round it differently.
    """

    stays_in_float = "an interpolated mask lies between grid points"

    def forward(self, x: Tensor, mask: Tensor, gate: Tensor) -> Tensor:
        """Shapes broadcast."""
        return x * (mask * gate)


class ImportanceAttention(nn.Module):
    """LIA: a mask times a gate, both in (0, 1); keeps the shape, sides at least 7.

    The mask is computed on a grid of about one cell per 6 x 6 px and interpolated to the input's
    size; the gate is made of the first channel. Without a `narrow` width, one convolution makes
    the mask at full size.
    """

    def __init__(self, width: int, narrow: int | None) -> None:
        super().__init__()
        self.coarse = narrow is not None
        if narrow is None:
            self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Sigmoid())
        else:
            self.body = nn.Sequential(
                nn.Conv2d(width, narrow, 1),
                SoftPooling(),
                nn.Conv2d(narrow, narrow, 3, stride=2, padding=1),
                nn.Conv2d(narrow, width, 3, padding=1),
                nn.Sigmoid(),
            )
            self.modulation = Modulation()
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its mask and gate."""
        mask, gate = self.body(x), self.gate(x[:, :1])
        if self.coarse:
            size = (x.size(2), x.size(3))
            mask = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
            attended: Tensor = self.modulation(x, mask, gate)
        else:
            attended = x * (mask * gate)
        return attended


class PlainBlock(nn.Module):
    """Two convolutions, and attention if there is one; keeps the shape."""

    def __init__(self, width: int, *attention: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
            nn.Conv2d(width, width, 3, padding=1),
            *attention,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        refined: Tensor = self.body(x)
        return refined


class PlainUSR(nn.Module):
    """PlainUSR: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w).

    Args:
        scale: output pixels per input pixel along one side.
        size: "u", "t", "s" or "m" (ultra, tiny, small, medium). The first two have no attention
            but in the middle, and no pooling.
    """

    blockm: nn.Module

    def __init__(self, *, scale: int = 4, size: Size = "m") -> None:
        super().__init__()
        if size not in _WIDTHS:
            sizes = ", ".join(get_args(Size))
            raise SparkirError(f"PlainUSR comes in the sizes {sizes}, got {size!r}")
        self.widths, narrow = _WIDTHS[size], _ATTENTION_WIDTH.get(size)
        self.down, self.up = _names(len(self.widths))
        blocks = (*self.down, "blockm", *self.up)
        self.facts = ModelFacts(
            name="plainusr",
            scale=scale,
            channels=3,
            value_range=1.0,
            min_size_px=_WINDOW_PX if narrow else 1,
            taps=(blocks[0], "blockm", blocks[-1]),
            # Head and tail reach 1 px, each block 2; then one window of attention. As that of
            # RFDN, it is stretched to the size of the image, so that no halo is exact.
            halo_px=2 * len(blocks) + 2 + (2 * _CELL_PX if narrow else 1),
            exact_tiles=narrow is None,
        )
        self.head = nn.Conv2d(3, self.widths[0], 3, padding=1)
        self.head_image = nn.Conv2d(3, 3, 3, padding=1)
        for name, width in zip(blocks, (*self.widths, *self.widths[-2::-1]), strict=True):
            attends = narrow is not None or name == "blockm"
            attention = [ImportanceAttention(width, narrow)] if attends else []
            self.add_module(name, PlainBlock(width, *attention))
        self.tail = nn.Conv2d(self.widths[0], 3 * scale**2, 3, padding=1)
        self.tail_image = nn.Conv2d(3, 3 * scale**2, 3, padding=1, bias=False)
        self.shuffle = nn.PixelShuffle(scale)
        _let_the_image_through(self.head_image, self.tail_image)

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        features = self.head(x)
        waiting = []
        for name, width in zip(self.down, self.widths[1:], strict=True):
            features = self.get_submodule(name)(features)
            waiting.append(features[:, width:])
            features = features[:, :width]
        features = self.blockm(features)
        for name in self.up:
            features = torch.cat([features, waiting.pop()], dim=1)
            features = self.get_submodule(name)(features)
        image = self.tail_image(self.head_image(x))
        enlarged: Tensor = self.shuffle(self.tail(features) + image)
        return enlarged

    @staticmethod
    def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state_dict with the image's layers taken out; its own as it is."""
        kept = dict(state)
        if "tail.0.weight" not in kept:
            return kept
        kept["tail.bias"] = kept.pop("tail.0.bias")
        for name, tensor, dim in (
            ("head{}.weight", kept["head.weight"], 0),
            ("head{}.bias", kept["head.bias"], 0),
            ("tail{}.weight", kept.pop("tail.0.weight"), 1),
        ):
            features = tensor.shape[dim] - 3
            kept[name.format("")], kept[name.format("_image")] = tensor.split((features, 3), dim)
        return kept


def _names(levels: int) -> tuple[Sequence[str], Sequence[str]]:
    """Name the blocks on the way down and on the way up, as published."""
    numbered = [f"block{number}" for number in range(1, 2 * levels - 1)]
    return numbered[: levels - 1], numbered[levels - 1 :]


@torch.no_grad()
def _let_the_image_through(head: nn.Conv2d, tail: nn.Conv2d) -> None:
    """Start as the paper does: with the enlarged image itself, pixels repeated, plus the rest."""
    per_colour = len(tail.weight) // 3
    for colour in range(3):
        head.weight[colour, colour, 1, 1] += 1
        tail.weight[colour * per_colour : (colour + 1) * per_colour, colour, 1, 1] += 1
