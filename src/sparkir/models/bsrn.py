"""BSRN, the blueprint separable residual network (Li et al., NTIRE 2022), and its smaller BSRN-S.

"Blueprint Separable Residual Network for Efficient Image Super-Resolution", arXiv 2205.05996:
RFDN whose convolutions are a 1x1 one and a depthwise one, with contrast-aware channel attention.
BSRN-S, which won the challenge's track for small networks, has weights in its place. Parameter
names are the published ones. Two things of the published networks are folded into weights when
they are loaded, for they are linear: that the image is fed four times, and the channel weights of
BSRN-S. Its linear layers over channels are 1x1 convolutions here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, thirds
from sparkir.models.spatial_attention import MIN_SIZE_PX, SpatialAttention, attention_halo_px

_REDUCTION = 16  # channels per channel in the middle of the channel attention
_REPEATS = 4  # of the image, in the published networks
_TINY = 1e-12  # keeps the gradient of a root at 0 finite


class BlueprintConvolution(nn.Module):
    """BSConv: a 1x1 convolution, then a depthwise 3x3 one (Haase and Amthor, CVPR 2020)."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, padding: int = 1, bias: bool = False
    ) -> None:
        """As torch's convolution; `bias` is the 1x1 one's, the depthwise one always has it."""
        super().__init__()
        self.pw = nn.Conv2d(inputs, outputs, 1, bias=bias)
        self.dw = nn.Conv2d(outputs, outputs, 3, stride, padding, groups=outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h', w')."""
        convolved: Tensor = self.dw(self.pw(x))
        return convolved


class BlueprintAttention(SpatialAttention):
    """RFDN's spatial attention with blueprint convolutions and GELU."""

    def __init__(self, width: int, *, small: bool) -> None:
        super().__init__()
        narrow = width // 4
        self.conv1 = nn.Conv2d(width, narrow, 1)
        self.conv_f = nn.Conv2d(narrow, narrow, 1)
        self.conv_max = BlueprintConvolution(narrow, narrow, bias=small)
        self.conv2 = (
            nn.Conv2d(narrow, narrow, 3, stride=2)
            if small
            else BlueprintConvolution(narrow, narrow, stride=2, padding=0)
        )
        self.conv3 = BlueprintConvolution(narrow, narrow, bias=small)
        self.conv3_ = BlueprintConvolution(narrow, narrow, bias=small)
        self.conv4 = nn.Conv2d(narrow, width, 1)
        self.act = nn.GELU()

    def refine(self, coarse: Tensor) -> Tensor:
        """(b, narrow, cells, cells) -> the same shape."""
        coarse = self.act(self.conv_max(coarse))
        refined: Tensor = self.conv3_(self.act(self.conv3(coarse)))
        return refined


class Contrast(nn.Module):
    """Each channel's mean plus its standard deviation over the image: -> (b, width, 1, 1).

    Computed in float64, where the order in which a library sums cannot be seen in a float32.
    """

    stays_in_float = "statistics of the whole image need more than 8 bits"

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both, in the precision of ``x``."""
        exact = x.double()
        mean = exact.mean((2, 3), keepdim=True)
        variance = (exact - mean).square().mean((2, 3), keepdim=True)
        return (mean + variance.clamp_min(_TINY).sqrt()).to(x.dtype)


class ContrastAttention(nn.Module):
    """CCA (Hui et al., ACM MM 2019): a weight in (0, 1) for each channel; keeps the shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = max(1, width // _REDUCTION)
        self.contrast = Contrast()
        self.conv_du = nn.Sequential(
            nn.Conv2d(width, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its channels' weights."""
        weighted: Tensor = x * self.conv_du(self.contrast(x))
        return weighted


class EfficientSeparableDistillationBlock(nn.Module):
    """ESDB: as RFDN's block, with blueprint convolutions, attention twice, and a shortcut.

    (b, width, h, w) -> the same shape.
    """

    def __init__(self, width: int, *, small: bool) -> None:
        super().__init__()
        distilled = width // 2
        self.c1_d = nn.Conv2d(width, distilled, 1)
        self.c1_r = BlueprintConvolution(width, width, bias=small)
        self.c2_d = nn.Conv2d(width, distilled, 1)
        self.c2_r = BlueprintConvolution(width, width, bias=small)
        self.c3_d = nn.Conv2d(width, distilled, 1)
        self.c3_r = BlueprintConvolution(width, width, bias=small)
        self.c4 = BlueprintConvolution(width, distilled, bias=small)
        self.act = nn.GELU()
        self.c5 = nn.Conv2d(4 * distilled, width, 1)
        self.esa = BlueprintAttention(width, small=small)
        self.end = "conv_out" if small else "cca"  # the published names
        self.add_module(self.end, nn.Conv2d(width, width, 1) if small else ContrastAttention(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        first = self.act(self.c1_r(x) + x)
        second = self.act(self.c2_r(first) + first)
        third = self.act(self.c3_r(second) + second)
        distilled = [
            self.act(self.c1_d(x)),
            self.act(self.c2_d(first)),
            self.act(self.c3_d(second)),
            self.act(self.c4(third)),
        ]
        attended = self.esa(self.c5(torch.cat(distilled, dim=1)))
        refined: Tensor = self.get_submodule(self.end)(attended) + x
        return refined


class _BlueprintNetwork(nn.Module):
    """What BSRN and BSRN-S have in common; see there."""

    def __init__(self, name: str, *, scale: int, width: int, blocks: int, small: bool) -> None:
        super().__init__()
        if width < 4:
            raise SparkirError(
                f"{name.upper()} needs width >= 4 (its attention uses width / 4), got {width}"
            )
        self.block_names = tuple(f"B{number}" for number in range(1, blocks + 1))
        self.facts = ModelFacts(
            name=name,
            scale=scale,
            channels=3,
            value_range=1.0,
            min_size_px=MIN_SIZE_PX,
            taps=thirds(self.block_names),
            # Every 3x3 convolution reaches 1 px: 4 in each block and 3 around them.
            halo_px=attention_halo_px(reach_px=4 * blocks + 3, blocks=blocks, anchored=False),
            exact_tiles=False,
        )
        self.fea_conv = BlueprintConvolution(3, width, bias=small)
        for block in self.block_names:
            self.add_module(block, EfficientSeparableDistillationBlock(width, small=small))
        self.c1 = nn.Conv2d(blocks * width, width, 1)
        self.act = nn.GELU()
        self.c2 = BlueprintConvolution(width, width, bias=small)
        enlarge = nn.Sequential(
            nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )
        self.upsampler = nn.ModuleDict({"upsampleOneStep": enlarge})  # the published name

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        shallow = self.fea_conv(x)
        features = shallow
        block_outputs = []
        for name in self.block_names:
            features = self.get_submodule(name)(features)
            block_outputs.append(features)
        fused = self.act(self.c1(torch.cat(block_outputs, dim=1)))
        enlarged: Tensor = self.upsampler["upsampleOneStep"](self.c2(fused) + shallow)
        return enlarged

    @staticmethod
    def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state_dict as this network has it; its own is returned as it is."""
        kept = {
            name: tensor[:, :, None, None] if _is_linear(name, tensor) else tensor
            for name, tensor in state.items()
        }
        image = kept.get("fea_conv.pw.weight")
        if image is not None and image.shape[1] == 3 * _REPEATS:
            kept["fea_conv.pw.weight"] = image.unflatten(1, (_REPEATS, 3)).sum(1)
        for name in [name for name in kept if name.endswith(".cw")]:
            weight = name.removesuffix("cw") + "conv_out.weight"
            kept[weight] = kept[weight] * kept.pop(name)[:, :, None, None]
        return kept


class BSRN(_BlueprintNetwork):
    """BSRN: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w), h and w at least 15.

    Its channel attention weighs channels by statistics of the whole image, and of a tile by the
    tile's.

    Args:
        scale: output pixels per input pixel along one side.
        width: channels of the features, at least 4.
        blocks: number of distillation blocks.
    """

    def __init__(self, *, scale: int = 4, width: int = 64, blocks: int = 8) -> None:
        super().__init__("bsrn", scale=scale, width=width, blocks=blocks, small=False)


class BSRNS(_BlueprintNetwork):
    """BSRN-S: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w), h and w at least 15.

    Args:
        scale: output pixels per input pixel along one side; the published weights are for x4.
        width: channels of the features, at least 4.
        blocks: number of distillation blocks.
    """

    def __init__(self, *, scale: int = 4, width: int = 48, blocks: int = 5) -> None:
        super().__init__("bsrn-s", scale=scale, width=width, blocks=blocks, small=True)


def _is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a weight is one of a linear layer over channels."""
    return name.endswith(".weight") and tensor.dim() == 2
