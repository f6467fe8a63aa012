"""SwinIR-light, super-resolution by attention within windows (Liang et al., ICCV 2021 workshops).

"SwinIR: Image Restoration Using Swin Transformer", arXiv 2108.10257, in its light form for
super-resolution (``SwinIR-S``: 60 channels, 4 groups of 6 layers, 6 heads, windows of 8, one
convolution after each group, pixel shuffle), with the parameter names of the authors' code.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.attention import (
    SHIFT_PX,
    WINDOW_PX,
    WindowAttention,
    from_windows,
    shift_mask,
    to_windows,
)
from sparkir.models.facts import ModelFacts, require_counts

_DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB in [0, 1], as published
torch.fx.wrap("shift_mask")  # one node of a traced network, whose sizes stay variable
_CONSTANTS = ("attn_mask", "relative_position_index")


class Perceptron(nn.Module):
    """Two linear layers with a GELU between them, on every pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class SwinLayer(nn.Module):
    """STL: window attention and a perceptron, each behind a normalisation, each with a shortcut.

    (b, h, w, width) -> the same shape.
    """

    def __init__(self, width: int, heads: int, *, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = WindowAttention(width, heads), Perceptron(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the refined features; a shifted layer needs the ``mask`` of ``shift_mask``."""
        height, width = x.size(1), x.size(2)
        normal = self.norm1(x)
        if self.shifted:
            normal = normal.roll((-SHIFT_PX, -SHIFT_PX), (1, 2))
        windows = to_windows(normal, height, width)
        attended = self.attn(windows, mask) if self.shifted else self.attn(windows)
        residual = from_windows(attended, height, width)
        if self.shifted:
            residual = residual.roll((SHIFT_PX, SHIFT_PX), (1, 2))
        x = x + residual
        refined: Tensor = self.mlp(self.norm2(x))
        return x + refined


class SwinGroup(nn.Module):
    """RSTB: layers, plain and shifted in turn, a convolution, a shortcut; (b, h, w, width)."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.residual_group = nn.Module()
        self.residual_group.blocks = nn.ModuleList(
            SwinLayer(width, heads, shifted=number % 2 == 1) for number in range(depth)
        )
        self.depth = depth
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return ``x`` plus its residual."""
        features = x
        for number in range(self.depth):
            features = self.get_submodule(f"residual_group.blocks.{number}")(features, mask)
        refined: Tensor = self.conv(_planes(features))
        return _pixels(refined) + x


class Embedding(nn.Module):
    """(b, width, h, w) -> normalised (b, h, w, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of each pixel."""
        normal: Tensor = self.norm(_pixels(x))
        return normal


class SwinIR(nn.Module):
    """SwinIR-light: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w), h and w multiples of 8.

    Args:
        scale: output pixels per input pixel along one side.
        width: channels of the features, a multiple of ``heads``.
        depths: layers of each group.
        heads: of every attention.
    """

    mean: Tensor

    def __init__(
        self,
        *,
        scale: int = 2,
        width: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        heads: int = 6,
    ) -> None:
        super().__init__()
        _require_sizes(width, depths, heads)
        self.facts = ModelFacts(
            name="swinir",
            scale=scale,
            channels=3,
            value_range=1.0,
            size_multiple=WINDOW_PX,
            taps=tuple(f"layers.{number}.conv" for number in range(len(depths))),
            halo_px=_reach_px(depths),
            tile_phase_px=WINDOW_PX,
        )
        mean = torch.tensor(_DIV2K_MEAN).reshape(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.patch_embed = Embedding(width)
        self.layers = nn.ModuleList(SwinGroup(width, heads, depth) for depth in depths)
        self.norm = nn.LayerNorm(width)
        self.conv_after_body = nn.Conv2d(width, width, 3, padding=1)
        self.upsample = nn.Sequential(
            nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        mask = shift_mask(x.size(2), x.size(3), x.device)
        shallow = self.conv_first(x - self.mean)
        features = self.patch_embed(shallow)
        for layer in self.layers:
            features = layer(features, mask)
        deep = self.conv_after_body(_planes(self.norm(features)))
        enlarged: Tensor = self.upsample(deep + shallow)
        return enlarged + self.mean

    @staticmethod
    def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state_dict without the masks and indices that are computed here."""
        return {name: state[name] for name in state if not name.endswith(_CONSTANTS)}


def _pixels(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h, w, c)."""
    return x.permute(0, 2, 3, 1)


def _planes(x: Tensor) -> Tensor:
    """(b, h, w, c) -> (b, c, h, w)."""
    return x.permute(0, 3, 1, 2)


def _initialise(module: nn.Module) -> None:
    """Linear layers as the authors start them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _reach_px(depths: Sequence[int]) -> int:
    """How far an output pixel sees, followed back from each pixel of a window."""
    reach = 0
    for pixel in range(WINDOW_PX):
        first, last = pixel - 2, pixel + 2  # the convolutions behind the groups
        for depth in reversed(depths):
            first, last = first - 1, last + 1  # the one at the end of the group
            for number in reversed(range(depth)):
                shift = SHIFT_PX * (number % 2)
                first = (first - shift) // WINDOW_PX * WINDOW_PX + shift
                last = ((last - shift) // WINDOW_PX + 1) * WINDOW_PX + shift - 1
        reach = max(reach, pixel - first + 1, last - pixel + 1)  # the first convolution
    return reach


def _require_sizes(width: int, depths: Sequence[int], heads: int) -> None:
    if width % heads:
        raise SparkirError(f"SwinIR's width must be a multiple of heads, got {width} and {heads}")
    require_counts("swinir", depths=depths)
