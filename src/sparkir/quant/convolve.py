"""Convolutions over whole numbers, in the processor's products of 8 bits where it has them.

An x86 with VNNI or AMX multiplies integers of 8 bits and adds them up in 32, twice as many at a
time as of bfloat16. The sums are the same: whole numbers, of which
float32 holds all below 2**24. Gradients are those of the convolution in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.cpu import get_capabilities

from sparkir.quant.arithmetic import Value, in_pieces
from sparkir.quant.fused import rounds_fused, to_bytes

_WORTH_IT = {torch.float32: 2**23, torch.bfloat16: 2**26}
"""Multiplications from which on the time is saved that bytes and their order take to make."""

_taken = ContextVar("taken", default=True)


@contextmanager
def byte_products(on: bool) -> Iterator[None]:
    """Whether they are taken where they are; for measuring what they are worth."""
    token = _taken.set(on)
    try:
        yield
    finally:
        _taken.reset(token)


class Geometry(NamedTuple):
    """How a convolution moves over an image, as torch takes it."""

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    border: tuple[int, int, int, int] | None = None
    """Zeros put around the input beforehand: left, right, above, below."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), as torch does it."""
        stride, padding, dilation, groups, _ = self
        return F.conv2d(self.bordered(x), weight, bias, stride, padding, dilation, groups)

    def bordered(self, x: Tensor) -> Tensor:
        """`x` with its border."""
        return x if self.border is None else F.pad(x, self.border)


def convolve_integers(
    ints: Tensor, zero: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The sums of a convolution, (B, C_out, H', W'), of the type of `ints`.

    Args:
        ints: (B, C_in, H, W), whole numbers; with `zero` added, bytes.
        zero: (), the byte that means 0.
        weight: (C_out, C_in / groups, h, w), whole numbers -128 .. 127 of the same type.
        bias: (C_out,), whole numbers.
        geometry: with zeros around.
    """
    if not _is_worth_it(ints, weight, geometry):
        return geometry.convolve(ints, weight, bias)
    result: Tensor = _Products.apply(geometry.bordered(ints), zero, weight, bias, geometry)
    return result


def _is_worth_it(ints: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    if not (_taken.get() and ints.is_cpu and ints.dim() == 4) or isinstance(geometry.padding, str):
        return False
    if torch.compiler.is_compiling() or ints.dtype not in _WORTH_IT or weight.dtype != ints.dtype:
        return False
    trains = torch.is_grad_enabled() and (ints.requires_grad or weight.requires_grad)
    if trains and not ints.is_contiguous(memory_format=torch.channels_last):
        return False  # sums come in channels_last, and the layers behind would turn to it
    places = ints.shape[0] * ints[0, 0].numel() // (geometry.stride[0] * geometry.stride[-1])
    return places * weight.numel() >= _WORTH_IT[ints.dtype] and has_byte_products()


@cache
def has_byte_products() -> bool:
    """Whether this processor has them, and torch reaches them; it documents that nowhere."""
    here = get_capabilities()
    if here.get("architecture") != "x86_64":
        return False
    if not (here.get("avx512_vnni") or here.get("avx_vnni") or here.get("amx_int8")):
        return False
    ints = (torch.arange(2 * 16 * 6 * 6).view(2, 16, 6, 6) % 256 - 3).float()
    weight = (torch.arange(16 * 16 * 9).view(16, 16, 3, 3) * 7 % 256 - 128).float()
    ints[0], weight[0] = 252, -128  # pairs of products that 16 bits do not hold
    bias, geometry = torch.arange(16.0) - 8, Geometry((1, 1), (1, 1), (1, 1), 1)
    with torch.autocast("cpu", enabled=False):  # whatever the training is that asks first
        try:
            sums = _sums(ints, torch.tensor(3.0), weight, bias, geometry)
        except (RuntimeError, AttributeError, TypeError):  # no such operator, or another signature
            return False
        return torch.equal(sums, geometry.convolve(ints, weight, bias))


class _Products(torch.autograd.Function):
    """Forward as integers, backward as torch's own convolution goes."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        ints: Tensor,
        zero: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(ints, weight)
        ctx.geometry, ctx.biases = geometry, None if bias is None else list(bias.shape)
        return _sums(ints, zero, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        ints, weight = ctx.saved_tensors
        stride, padding, dilation, groups, _ = ctx.geometry
        of_ints, _, of_weight, of_bias, _ = ctx.needs_input_grad
        to_ints, to_weight, to_bias = torch.ops.aten.convolution_backward(
            gradient,
            ints,
            weight,
            ctx.biases,
            list(stride),
            list(padding),
            list(dilation),
            False,  # not transposed
            [0, 0],
            groups,
            (of_ints, of_weight, of_bias),
        )
        return to_ints, None, to_weight, to_bias, None


def _sums(
    ints: Tensor, zero: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    where, level = [list(sizes) for sizes in geometry[:3]], int(zero)
    ones, zeros, no_bias = _constants(len(weight))
    stored, total = _bytes_of(ints, zero)
    weights = weight.to(torch.int8).contiguous()
    packed = torch.ops.onednn.qconv_prepack(weights, ones, 1.0, level, *where, geometry.groups)
    # NaN would be lost in a byte: it makes all sums NaN by the bias, as training has to notice it.
    nothing = (total + weight.float().sum()) * 0
    return torch.ops.onednn.qconv2d_pointwise(  # type: ignore[no-any-return]
        *(stored, 1.0, level),
        *(packed, ones, zeros),
        nothing + (no_bias if bias is None else bias.float()),
        *where,
        geometry.groups,
        *(1.0, 0, ints.dtype),  # sums as they are
        *("none", [], ""),  # and nothing behind them
    )


def _bytes_of(ints: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """What is stored, and the sum of `ints`."""
    if rounds_fused():
        return to_bytes(ints, zero)
    totals = []

    def stored(part: Value) -> Tensor:
        assert isinstance(part, Tensor)
        totals.append(part.float().sum())
        return part + zero

    return in_pieces(stored, ints, torch.uint8), torch.stack(totals).sum()


@cache
def _constants(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps and zero points of weights that are what they are, and a bias of nothing."""
    return torch.ones(channels), torch.zeros(channels, dtype=torch.int32), torch.zeros(channels)
