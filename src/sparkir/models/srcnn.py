"""SRCNN, the first super-resolution network (Dong et al., TPAMI 2016).

"Image Super-Resolution Using Deep Convolutional Networks", arXiv 1501.00092, the 9-5-5 variant.
The paper enlarges the image before the network; here the enlarging is the network's first
operation, so that it takes the small image as every other one does and exports as one file.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkir.models.facts import ModelFacts

_REACH_PX = 2  # of the cubic kernel, on either side of the nearest input pixel


class BicubicUpscale(nn.Module):
    """MATLAB's bicubic enlargement by a whole number: (b, c, h, w) -> (b, c, scale*h, scale*w).

    Each of the scale x scale output pixels of an input pixel is one fixed 5x5 convolution; a
    pixel shuffle puts them in place. Plain operations, hence exportable anywhere. It equals
    :func:`sparkir.data.degrade.bicubic_resize` with replicated borders but for the rounding.
    """

    kernels: Tensor

    def __init__(self, scale: int, channels: int) -> None:
        super().__init__()
        self.scale = scale
        self.channels = channels
        kernels = phase_kernels(scale).repeat(channels, 1, 1, 1)
        # Not persistent: a constant of the architecture, absent from published weights.
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; overshoots are kept."""
        padded = F.pad(x, (_REACH_PX,) * 4, mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, self.kernels, groups=self.channels), self.scale)


def cubic(distance_px: Tensor) -> Tensor:
    """Return the cubic convolution kernel with a = -0.5 (Keys 1981, equation 15)."""
    d = distance_px.abs()
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def phase_kernels(scale: int) -> Tensor:
    """Return (scale * scale, 1, 5, 5): one kernel per output pixel of an input pixel.

    The centre of output pixel p lies at (p + 1/2) / scale - 1/2 px from that of its input pixel.
    """
    centres = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = torch.arange(-_REACH_PX, _REACH_PX + 1, dtype=torch.float64)
    rows = cubic(taps - centres[:, None])
    kernels = rows[:, None, :, None] * rows[None, :, None, :]
    return kernels.reshape(scale**2, 1, taps.numel(), taps.numel()).float()


class SRCNN(nn.Module):
    """SRCNN 9-5-5: (b, channels, h, w) in [0, 1] -> (b, channels, scale*h, scale*w).

    The borders are padded with zeros so that the size is kept (the paper crops them instead).

    Args:
        scale: output pixels per input pixel along one side; 1 leaves the bicubic step out.
        channels: 3 (RGB) or 1 (luma of studio range, as in the paper).
    """

    def __init__(self, *, scale: int = 4, channels: int = 3) -> None:
        super().__init__()
        convolutions_reach_px = 4 + 2 + 2  # output pixels
        self.facts = ModelFacts(
            name="srcnn",
            scale=scale,
            channels=channels,
            value_range=1.0,
            taps=("relu1", "relu2"),
            halo_px=math.ceil(convolutions_reach_px / scale) + (_REACH_PX if scale > 1 else 0),
            luma_range="studio",
        )
        self.upscale = BicubicUpscale(scale, channels) if scale > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(channels, 64, 9, padding=4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(64, 32, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(32, channels, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the enlarged image; not clipped."""
        features = self.relu1(self.conv1(self.upscale(x)))
        restored: Tensor = self.conv3(self.relu2(self.conv2(features)))
        return restored
