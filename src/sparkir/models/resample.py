"""Changes of size inside a network, from plain operations with constant whole-number weights.

Eight bits hold these weights exactly, so that quantization turns them into integer convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BINOMIAL = (1.0, 2.0, 1.0)
_BILINEAR = ((1.0, 3.0, 0.0), (0.0, 3.0, 1.0))  # rows: the first and the second output pixel


class BlurDown(nn.Module):
    """Half the size without aliasing: blurred by (1 2 1)/4 either way, then every second pixel.

    "Making Convolutional Networks Shift-Invariant Again" (Zhang, ICML 2019), filter size 3 with
    reflected borders. (b, channels, h, w), both even -> (b, channels, h/2, w/2).
    """

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        row = torch.tensor(_BINOMIAL) / sum(_BINOMIAL)
        kernel = torch.outer(row, row).expand(channels, 1, 3, 3).clone()
        # Not persistent: a constant of the architecture.
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller features."""
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel, stride=2, groups=self.channels)


class BilinearUp(nn.Module):
    """Twice the size, as ``F.interpolate(x, scale_factor=2, mode="bilinear")`` computes it.

    Each of the 2 x 2 output pixels of an input pixel is one fixed convolution; a pixel shuffle
    puts them in place. (b, channels, h, w) -> (b, channels, 2h, 2w).
    """

    kernels: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        rows = torch.tensor(_BILINEAR) / 4
        kernels = (rows[:, None, :, None] * rows[None, :, None, :]).reshape(4, 1, 3, 3)
        self.register_buffer("kernels", kernels.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger features."""
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, self.kernels, groups=self.channels), 2)
