"""MIRNet, enriched features from parallel streams of three resolutions (Zamir et al., ECCV 2020).

"Learning Enriched Features for Real Image Restoration and Enhancement", arXiv 2003.06792, with
the parameter names of the authors' code. As there, the dual attention units of one stream are one
unit, applied in both columns. What their code computes twice from the same input is computed once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.models.resample import BilinearUp, BlurDown

_LEVELS = 3  # streams, each of half the resolution and twice the channels of the one before
_COLUMNS = 2
_REDUCTION = 8
_BLOCK_REACH_PX = 57  # down to the third stream, through both of its units, and up again
_HALO_PX = 64


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


class SelectiveKernelFusion(nn.Module):
    """SKFF: streams of one shape, mixed per channel by weights that sum to 1 (section 3.1).

    ``height`` tensors (b, channels, h, w) -> one of that shape.
    """

    def __init__(self, channels: int, height: int = _LEVELS) -> None:
        super().__init__()
        self.shape = (height, channels, 1, 1)
        narrow = max(channels // _REDUCTION, 4)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(_convolution(channels, narrow, 1), nn.PReLU())
        self.fcs = nn.ModuleList(_convolution(narrow, channels, 1) for _ in range(height))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        """Return the mixture."""
        total = streams[0]
        for stream in streams[1:]:
            total = total + stream
        summary = self.conv_du(self.avg_pool(total))
        logits = torch.cat([layer(summary) for layer in self.fcs], dim=1)
        weights = self.softmax(logits.reshape(-1, *self.shape))
        mixed: Tensor = streams[0] * weights[:, 0]
        for number, stream in enumerate(streams[1:], start=1):
            mixed = mixed + stream * weights[:, number]
        return mixed


class SpatialAttention(nn.Module):
    """A mask (b, 1, h, w) in (0, 1) from the largest and the mean feature of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential()
        self.spatial.add_module("conv", _convolution(2, 1, 5))
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its mask."""
        summary = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        mask: Tensor = self.sigmoid(self.spatial(summary))
        return x * mask


class ChannelAttention(nn.Module):
    """A factor in (0, 1) for each channel, from the means of all channels over the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            _convolution(channels, channels // _REDUCTION, 1),
            nn.ReLU(),
            _convolution(channels // _REDUCTION, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its factors."""
        factors: Tensor = self.conv_du(self.avg_pool(x))
        return x * factors


class DualAttention(nn.Module):
    """DAU: two convolutions, both attentions side by side, a shortcut (section 3.2).

    (b, channels, h, w) -> the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(channels, channels, 3), nn.PReLU(), _convolution(channels, channels, 3)
        )
        self.SA = SpatialAttention()
        self.CA = ChannelAttention(channels)
        self.conv1x1 = _convolution(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its refined residual."""
        residual = self.body(x)
        attended = torch.cat([self.SA(residual), self.CA(residual)], dim=1)
        refined: Tensor = self.conv1x1(attended)
        return refined + x


class ResidualDown(nn.Module):
    """(b, channels, h, w) -> (b, 2 * channels, h/2, w/2), antialiased (section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.top = nn.Sequential(
            _convolution(channels, channels, 1),
            nn.PReLU(),
            _convolution(channels, channels, 3),
            nn.PReLU(),
            BlurDown(channels),
            _convolution(channels, 2 * channels, 1),
        )
        self.bot = nn.Sequential(BlurDown(channels), _convolution(channels, 2 * channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches."""
        both: Tensor = self.top(x) + self.bot(x)
        return both


class ResidualUp(nn.Module):
    """(b, channels, h, w) -> (b, channels / 2, 2h, 2w) (section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.top = nn.Sequential(
            _convolution(channels, channels, 1),
            nn.PReLU(),
            nn.ConvTranspose2d(
                channels, channels, 3, stride=2, padding=1, output_padding=1, bias=False
            ),
            nn.PReLU(),
            _convolution(channels, channels // 2, 1),
        )
        self.bot = nn.Sequential(BilinearUp(channels), _convolution(channels, channels // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches."""
        both: Tensor = self.top(x) + self.bot(x)
        return both


class Resize(nn.Module):
    """From one stream's shape to another's, by steps of 2; ``steps`` < 0 makes it smaller."""

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        body: list[nn.Module] = []
        for _ in range(abs(steps)):
            body.append(ResidualUp(channels) if steps > 0 else ResidualDown(channels))
            channels = channels // 2 if steps > 0 else 2 * channels
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the other size."""
        resized: Tensor = self.body(x)
        return resized


class MultiScaleBlock(nn.Module):
    """MRB: a grid of 3 streams x 2 columns of dual attention, all streams mixed in between.

    (b, width, h, w) -> the same shape; h and w multiples of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(_LEVELS)]
        self.widths = widths
        units = [DualAttention(channels) for channels in widths]
        self.blocks = nn.ModuleList(nn.ModuleList([unit] * _COLUMNS) for unit in units)
        self.last_up = nn.ModuleDict(
            {str(level): Resize(widths[level], level) for level in range(1, _LEVELS)}
        )
        pairs = [(a, b) for a in range(_LEVELS) for b in range(a + 1, _LEVELS)]
        self.down = nn.ModuleDict(
            {self._key(fine, coarse): Resize(widths[fine], fine - coarse) for fine, coarse in pairs}
        )
        self.up = nn.ModuleDict(
            {
                self._key(coarse, fine): Resize(widths[coarse], coarse - fine)
                for fine, coarse in pairs
            }
        )
        self.conv_out = _convolution(width, width, 3)
        self.selective_kernel = nn.ModuleList(SelectiveKernelFusion(c) for c in widths)

    def _key(self, source: int, target: int) -> str:
        return f"{self.widths[source]}_{2 ** abs(source - target)}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus what the grid found."""
        levels = range(_LEVELS)
        streams, smaller = [self._unit(0, 0, x)], []
        for level in levels[1:]:
            smaller.append(self.down[self._key(level - 1, level)](streams[-1]))
            streams.append(self._unit(level, 0, smaller[-1]))
        for column in range(1, _COLUMNS):
            mixed = []
            for level in levels:
                resized = [self._resized(streams[k], smaller, k, level) for k in levels]
                mixed.append(self._fuse(level, resized))
            streams = [self._unit(level, column, mixed[level]) for level in levels]
        enlarged = [streams[0], *(self.last_up[str(k)](streams[k]) for k in levels[1:])]
        restored: Tensor = self.conv_out(self._fuse(0, enlarged))
        return restored + x

    def _unit(self, level: int, column: int, x: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(f"blocks.{level}.{column}")(x)
        return result

    def _fuse(self, level: int, streams: Sequence[Tensor]) -> Tensor:
        fused: Tensor = self.selective_kernel[level](streams)
        return fused

    def _resized(self, x: Tensor, smaller: Sequence[Tensor], source: int, target: int) -> Tensor:
        if source == target:
            return x
        if target == source + 1:  # made for the first column already
            return smaller[source]
        resize = (self.up if target < source else self.down)[self._key(source, target)]
        resized: Tensor = resize(x)
        return resized


class ResidualGroup(nn.Module):
    """RRG: multi-scale blocks, a convolution, a shortcut; keeps the shape."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(MultiScaleBlock(width) for _ in range(blocks)), _convolution(width, width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its residual."""
        residual: Tensor = self.body(x)
        return residual + x


class MIRNet(nn.Module):
    """MIRNet: (b, 3, h, w) in [0, 1] -> the same shape; h and w multiples of 4.

    The defaults are the paper's network. One of width 16, 1 group and 1 block is a hundredth of
    its work, and trains on a processor.

    Args:
        width: channels of the finest stream, at least 8.
        groups: number of recursive residual groups.
        blocks: number of multi-scale residual blocks in each.
    """

    def __init__(self, *, width: int = 64, groups: int = 3, blocks: int = 2) -> None:
        super().__init__()
        if width < _REDUCTION:
            raise SparkirError(
                f"MIRNet needs width >= {_REDUCTION} (its attention uses width / {_REDUCTION}), "
                f"got {width}"
            )
        self.facts = ModelFacts(
            name="mirnet",
            scale=1,
            channels=3,
            value_range=1.0,
            size_multiple=2 ** (_LEVELS - 1),
            taps=tuple(f"body.{number}" for number in range(groups)),
            halo_px=min(_HALO_PX, groups * (blocks * _BLOCK_REACH_PX + 1) + 2),
            exact_tiles=False,  # both attentions average channels over the image
        )
        self.conv_in = _convolution(3, width, 3)
        self.body = nn.Sequential(*(ResidualGroup(width, blocks) for _ in range(groups)))
        self.conv_out = _convolution(width, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image plus the network's correction; not clipped."""
        correction: Tensor = self.conv_out(self.body(self.conv_in(x)))
        return correction + x

    @staticmethod
    def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state_dict without the blurring filter that is a constant here.

        Raises:
            SparkirError: it blurs with another filter.
        """
        expected = BlurDown(1).kernel
        for name, tensor in state.items():
            if name.endswith(".filt") and not torch.allclose(tensor.float().cpu(), expected):
                raise SparkirError(
                    f"these MIRNet weights blur with another filter ({name}) than (1 2 1)/4 "
                    "either way; they cannot be loaded into this network"
                )
        return {name: tensor for name, tensor in state.items() if not name.endswith(".filt")}
