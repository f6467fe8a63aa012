"""Convolutions in forms for which there are integer kernels, as networks do not write them.

Blurring, interpolating and averaging are convolutions with constant weights; a transposed
convolution is a convolution with several outputs for each channel, interleaved by a pixel shuffle;
a factor for each channel behind a convolution belongs to its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOLERANCE = 1e-4  # of a step: float32 holds weights of 7 bits a hundred times better


class ConstantConv2d(nn.Conv2d):
    """A convolution whose weights never change and are small whole numbers times a step."""

    step: Tensor
    """(C_out,)"""

    def __init__(
        self,
        weight: Tensor,
        step: Tensor,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        """`weight` (C_out, C_in / groups, h, w) is held exactly by `step`; see `exact_step`."""
        super().__init__(
            weight.shape[1] * groups,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
            device="meta",  # nothing is drawn
        )
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.register_buffer("step", step, persistent=False)


def exact_step(weight: Tensor, *, bits: int = 8) -> Tensor | None:
    """(C_out,), the smallest steps of which all of `weight` (C_out, ...) is a multiple.

    None if so few bits do not hold a row so.
    """
    rows = weight.detach().double().flatten(1)
    largest = rows.abs().amax(1)
    if not bool((largest > 0).all()):
        return None
    step = torch.zeros_like(largest)
    for level in range(1, 2 ** (bits - 1)):
        ints = rows * (level / largest)[:, None]
        exact = ((ints - ints.round()).abs() < _TOLERANCE).all(1)
        step = torch.where(exact, largest / level, step)
    return step.float() if bool((step > 0).all()) else None


class ScaledConv2d(nn.Conv2d):
    """A convolution and a factor for each of its outputs, which stays a parameter of its own."""

    factor: Tensor
    """(C_out,) or ()."""

    def __init__(self, layer: nn.Conv2d, factor: Tensor | float) -> None:
        """Take over the parameters of `layer`; `factor` broadcasts against its output."""
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            groups=layer.groups,
            bias=layer.bias is not None,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        take_factor(self, factor)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        return super().forward(x) * self.factor.reshape(-1, 1, 1)


def take_factor(layer: nn.Module, factor: Tensor | float | None) -> None:
    """Give `layer` its `factor`: a parameter if it is learned, else a constant; or None."""
    if isinstance(factor, nn.Parameter):
        layer.register_parameter("factor", factor)
    else:
        known = factor is None or isinstance(factor, Tensor)
        constant = factor if known else torch.tensor(float(factor))  # type: ignore[arg-type]
        layer.register_buffer("factor", constant, persistent=isinstance(factor, Tensor))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Phases:
    """How a transposed convolution falls apart into stride x stride convolutions of its input."""

    kernel: int
    stride: int
    padding: int

    @property
    def border(self) -> tuple[int, int, int, int]:
        """Zeros that the convolutions need left, right, above and below."""
        before, after = self._reach()
        return (before, after, before, after)

    def expanded(self, weight: Tensor) -> Tensor:
        """(C_in, C_out, k, k) -> (C_out * stride**2, C_in, n, n), n the inputs that are seen."""
        before, after = self._reach()
        inputs = torch.arange(-before, after + 1)
        taps = torch.arange(self.stride)[:, None] + self.padding - self.stride * inputs
        taps = torch.where((taps >= 0) & (taps < self.kernel), taps, self.kernel).to(weight.device)
        with_nothing = F.pad(weight, (0, 1, 0, 1))  # where no tap leads from an input to an output
        phases = with_nothing[:, :, taps[:, None, :, None], taps[None, :, None, :]]
        return phases.permute(1, 2, 3, 0, 4, 5).flatten(0, 2)

    def repeated(self, bias: Tensor | None) -> Tensor | None:
        """(C_out,) -> (C_out * stride**2,)"""
        return None if bias is None else bias.repeat_interleave(self.stride**2)

    def _reach(self) -> tuple[int, int]:
        """How many inputs before and after its own an output sees."""
        before = (self.kernel - 1 - self.padding) // self.stride
        return before, (self.stride - 1 + self.padding) // self.stride


class InterleavedConv2d(nn.Module):
    """A transposed convolution before its outputs are put in place.

    (B, C_in, H, W) -> (B, C_out * stride**2, H, W), of which `F.pixel_shuffle` makes what the
    transposed convolution gives, (B, C_out, stride * H, stride * W). The parameters are its own.
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        """Take over the parameters of `layer`; see `interleaves`."""
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        # Of the convolution; those of the layer are in `phases`.
        self.stride, self.padding, self.dilation, self.groups = (1, 1), (0, 0), (1, 1), 1
        self.phases = Phases(layer.kernel_size[0], layer.stride[0], int(layer.padding[0]))

    def forward(self, x: Tensor) -> Tensor:
        """The interleaved outputs."""
        weight, bias = self.phases.expanded(self.weight), self.phases.repeated(self.bias)
        return F.conv2d(F.pad(x, self.phases.border), weight, bias)


def interleaves(layer: nn.Module) -> bool:
    """Whether `layer` is a transposed convolution of which `InterleavedConv2d` can be made."""
    if not isinstance(layer, nn.ConvTranspose2d) or layer.groups != 1:
        return False
    square = all(len(set(sizes)) == 1 for sizes in (layer.kernel_size, layer.stride, layer.padding))
    if not square or set(layer.dilation) != {1} or len(set(layer.output_padding)) != 1:
        return False
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    return kernel + layer.output_padding[0] - 2 * int(layer.padding[0]) == stride


def in_rows(channels: Tensor, factor: int) -> Tensor:
    """(C * factor**2, ...), as a pixel shuffle reads them -> (factor**2 * C, ...)."""
    apart = channels.reshape(-1, factor**2, *channels.shape[1:])
    return apart.transpose(0, 1).flatten(0, 1)


def shuffle_rows(x: Tensor, factor: int) -> Tensor:
    """The pixel shuffle of channels that are `in_rows`, in channels_last.

    (B, factor**2 * C, H, W) -> (B, C, factor * H, factor * W)
    """
    batch, _, height, width = x.shape
    blocks = x.permute(0, 2, 3, 1).reshape(batch, height, width, factor, factor, -1)
    pixels = blocks.transpose(2, 3).reshape(batch, height * factor, width * factor, -1)
    return pixels.permute(0, 3, 1, 2)
