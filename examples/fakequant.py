"""Fake-quant modules such as many pipelines have: one's own, on top of torch's kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Grid(nn.Module):
    """A tensor on 256 levels between the smallest and the largest value seen in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def scale_and_zero_point(self) -> tuple[float, int]:
        scale = max(float(self.high - self.low), 1e-6) / 255
        return scale, round(-float(self.low) / scale)

    def train(self, mode: bool = True) -> nn.Module:
        """In evaluation the grid is a constant, so that it can be exported."""
        self.grid = self.scale_and_zero_point()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.low.copy_(torch.minimum(self.low, x.detach().min()))
            self.high.copy_(torch.maximum(self.high, x.detach().max()))
        grid = self.scale_and_zero_point() if self.training else self.grid
        return torch.fake_quantize_per_tensor_affine(x, *grid, 0, 255)


class QuantConv(nn.Conv2d):
    """A convolution whose weights lie on 256 levels per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().amax((1, 2, 3)) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(self.weight, scale, zero, 0, -128, 127)
        return F.conv2d(x, weight, self.bias, padding=self.padding)
