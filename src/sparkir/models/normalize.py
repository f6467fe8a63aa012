"""Normalisation of each pixel's features."""

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel: (b, channels, h, w) -> the same shape.

    "Layer Normalization" (Ba et al., 2016), as NAFNet uses it: biased variance, eps 1e-6.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features, scaled and shifted per channel."""
        pixels = x.permute(0, 2, 3, 1)
        normal = F.layer_norm(pixels, self.normalized_shape, self.weight, self.bias, self.eps)
        return normal.permute(0, 3, 1, 2)
