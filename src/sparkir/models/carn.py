"""CARN-M, the cascading residual network for mobile devices (Ahn et al., ECCV 2018).

"Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network", arXiv
1803.08664. Parameter names are those of the authors' CARN-pytorch, whose one checkpoint has the
enlarging layers of x2, x3 and x4; a network takes those of its own scale.

A recursive network: the three residual blocks of a cascade share their weights. Here each is a
module of its own over the same parameters, so that every call can be quantized on a grid of its
own and a feature can be tapped behind each.
"""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.models.mean_colour import mean_colour, take_shift

_GROUPS = 4
_CALLS = ("b1", "b2", "b3")  # of the published b1
_FACTORS = {2: (2,), 3: (3,), 4: (2, 2)}


class EfficientResidualBlock(nn.Module):
    """Two grouped convolutions and a 1x1 one, a shortcut around them; keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=_GROUPS),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=_GROUPS),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        refined: Tensor = self.act(self.body(x) + x)
        return refined


class Fusion(nn.Module):
    """A 1x1 convolution with ReLU over what a cascade has so far: -> (b, width, h, w)."""

    def __init__(self, parts: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(parts * width, width, 1), nn.ReLU())

    def forward(self, *parts: Tensor) -> Tensor:
        """Return the fused features."""
        fused: Tensor = self.body(torch.cat(parts, dim=1))
        return fused


class Cascade(nn.Module):
    """Three stages, each of which sees the results of all before it; keeps the shape."""

    b1: nn.Module
    b2: nn.Module
    b3: nn.Module

    def __init__(self, width: int, stages: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.c1, self.c2, self.c3 = (Fusion(parts, width) for parts in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        first = self.b1(x)
        fused = self.c1(x, first)
        second = self.b2(fused)
        fused = self.c2(x, first, second)
        third = self.b3(fused)
        refined: Tensor = self.c3(x, first, second, third)
        return refined


class Enlarging(nn.Module):
    """Grouped convolution, ReLU and pixel shuffle, for each factor."""

    def __init__(self, width: int, factors: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for factor in factors:
            wide = nn.Conv2d(width, width * factor**2, 3, padding=1, groups=_GROUPS)
            layers += [wide, nn.ReLU(), nn.PixelShuffle(factor)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, h, w) -> (b, width, scale*h, scale*w)."""
        enlarged: Tensor = self.body(x)
        return enlarged


class CARNM(Cascade):
    """CARN-M: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w).

    The network is a cascade of three cascades of three residual blocks.

    Args:
        scale: 2, 3 or 4.
        width: channels of the features, a multiple of 4.
    """

    mean: Tensor

    def __init__(self, *, scale: int = 4, width: int = 64) -> None:
        if scale not in _FACTORS:
            raise SparkirError(f"CARN-M enlarges by 2, 3 or 4, got scale {scale}")
        if width % _GROUPS:
            raise SparkirError(f"CARN-M needs a width that is a multiple of 4, got {width}")
        super().__init__(width, {name: _recursive(width) for name in _CALLS})
        self.facts = ModelFacts(
            name="carn-m",
            scale=scale,
            channels=3,
            value_range=1.0,
            taps=_CALLS,
            halo_px=2 * 3 * 3 + 3,  # entry 1, blocks 2 each, the enlarging tail 2 at most
        )
        self.register_buffer("mean", mean_colour(1.0), persistent=False)
        self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.branch = f"up{scale}"
        self.upsample = nn.ModuleDict({self.branch: Enlarging(width, _FACTORS[scale])})
        self.exit = nn.Conv2d(width, 3, 3, padding=1)
        with torch.no_grad():  # the published network adds the mean behind this layer
            cast("Tensor", self.exit.bias).add_(self.mean.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        features = super().forward(self.entry(x - self.mean))
        enlarged: Tensor = self.exit(self.upsample[self.branch](features))
        return enlarged

    def from_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state_dict as this network has it.

        The mean shift is a constant here, its second half a part of the last bias; other scales'
        layers are left out; what the blocks of a cascade share is there under every name.

        Raises:
            SparkirError: the mean shift is another one than EDSR's.
        """
        kept = dict(state)
        take_shift(kept, "sub_mean.shifter", sign=-1, value_range=1.0, network="CARN-M")
        if take_shift(kept, "add_mean.shifter", sign=1, value_range=1.0, network="CARN-M"):
            kept["exit.bias"] = kept["exit.bias"] + mean_colour(1.0).flatten()
        for name in list(kept):
            if name.startswith("upsample.") and not name.startswith(f"upsample.{self.branch}."):
                del kept[name]
            for call in _CALLS:
                if ".b1.body." in name:
                    kept.setdefault(name.replace(".b1.body.", f".{call}.body."), kept[name])
        return kept


def _recursive(width: int) -> Cascade:
    """A cascade that calls one block three times: three modules that share their parameters."""
    block = EfficientResidualBlock(width)
    calls = {
        name: copy.deepcopy(block, {id(shared): shared for shared in block.parameters()})
        for name in _CALLS
    }
    return Cascade(width, calls)
