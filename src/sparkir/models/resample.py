"""Changes of size inside a network, from plain operations with constant whole-number weights.

Eight bits hold these weights exactly, so that quantization turns them into integer convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BINOMIAL = (1.0, 2.0, 1.0)


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
    """Several times the size, as ``F.interpolate(x, scale_factor, mode="bilinear")`` has it.

    Each of the factor x factor output pixels of an input pixel is one fixed convolution; a pixel
    shuffle puts them in place. (b, channels, h, w) -> (b, channels, factor*h, factor*w).
    """

    kernels: Tensor

    def __init__(self, channels: int, factor: int = 2) -> None:
        super().__init__()
        self.channels, self.factor = channels, factor
        rows = torch.tensor(_bilinear(factor)) / (2 * factor)
        kernels = (rows[:, None, :, None] * rows[None, :, None, :]).reshape(-1, 1, 3, 3)
        self.register_buffer("kernels", kernels.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger features."""
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, self.kernels, groups=self.channels), self.factor)


def _bilinear(factor: int) -> list[list[float]]:
    """How much of the pixel before, of its own and of the next each output pixel is, in parts."""
    rows = []
    for pixel in range(factor):
        right = 2 * pixel + 1 - factor  # of the input pixel's centre, in parts of 2 * factor
        rows.append([float(max(-right, 0)), float(2 * factor - abs(right)), float(max(right, 0))])
    return rows
