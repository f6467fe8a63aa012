"""ESA, the enhanced spatial attention of RFDN and its successors, without its layers.

"Residual Feature Aggregation Network for Image Super-Resolution" (Liu et al., CVPR 2020). Every
network makes the layers in its own way and under its own published names; what is done with them
is the same.
"""

import torch.nn.functional as F
from torch import Tensor, nn

MIN_SIZE_PX = 15
"""The stride-2 convolution must leave 7 px for the 7 x 7 pooling."""
WINDOW_PX = 13
"""From the centre of the first of the 7 cells that a window pools, 2 px apart, to the last."""
CELL_PX = 6
"""A stride of 2 and one of 3."""
_FIRST_CELL_PX = 7  # the middle of 3 px and of 7 windows
_ANCHORED_HALO_PX = 16  # per block: 12 leave 0.04 levels between a tile and the whole, 16 0.001


class SpatialAttention(nn.Module):
    """A mask in (0, 1) computed on a coarse grid: (b, width, h, w) -> the same, sides at least 15.

    The grid has about one cell per 6 x 6 px; the mask it gives is interpolated to the input's
    size. As published, the mask is stretched so that its first and last cells reach the image's
    borders, and where a cell comes to lie depends on the size of the image. `anchored` puts every
    cell where it was computed, so that a tile sees what the whole image sees.

    A network's own attention makes the layers and says how the coarse grid is refined.
    """

    conv1: nn.Module
    """Narrows the features, 1x1."""
    conv2: nn.Module
    """3x3, stride 2, no padding."""
    conv_f: nn.Module
    """The narrow features on their way to the mask, 1x1."""
    conv4: nn.Module
    """Widens the mask, 1x1."""

    def __init__(self, *, anchored: bool = False) -> None:
        super().__init__()
        self.anchored = anchored
        self.sigmoid = nn.Sigmoid()

    def refine(self, coarse: Tensor) -> Tensor:
        """(b, narrow, cells, cells) -> the same shape."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times its mask."""
        narrow = self.conv1(x)
        coarse = self.refine(F.max_pool2d(self.conv2(narrow), kernel_size=7, stride=3))
        if self.anchored:
            context = _spread(coarse, x.size(2), x.size(3))
        else:
            context = F.interpolate(
                coarse, size=(x.size(2), x.size(3)), mode="bilinear", align_corners=False
            )
        mask: Tensor = self.sigmoid(self.conv4(context + self.conv_f(narrow)))
        return x * mask


def attention_halo_px(*, reach_px: int, blocks: int, anchored: bool) -> int:
    """Return the halo of a network of `blocks` whose 3x3 convolutions reach `reach_px`.

    As published, the grid follows the size of the image, so that no halo makes a tile exactly
    equal to the whole image: RFDN's with its published weights and tiles of 32 px agree to 62-84
    dB, as well with a halo of 32 px as with 128. One window is therefore enough.
    """
    return _ANCHORED_HALO_PX * blocks if anchored else reach_px + WINDOW_PX


def _spread(coarse: Tensor, height: int, width: int) -> Tensor:
    """Interpolate between cells whose centres lie at 7, 13, 19, ... px; repeat beyond them."""
    inner = [CELL_PX * (coarse.size(dim) - 1) + 1 for dim in (2, 3)]
    between = F.interpolate(coarse, size=(inner[0], inner[1]), mode="bilinear", align_corners=True)
    first = _FIRST_CELL_PX
    bottom, right = height - first - inner[0], width - first - inner[1]
    return F.pad(between, (first, right, first, bottom), mode="replicate")
