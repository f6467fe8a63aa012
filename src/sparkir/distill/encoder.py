"""What a method looks at images with: a frozen encoder and, for it, a codebook."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.registry import find_function

_SEED = 0
_SLOPE = 0.2
_LARGEST_CODEBOOK, _LATENTS_PER_CODE = 256, 4
_ROUNDS = 10


class Encoded(NamedTuple):
    """An image as an encoder sees it."""

    levels: list[Tensor]
    """Features (b, c, h, w) from fine to coarse; DCKD wants five."""
    latents: Tensor
    """(b, d, h, w), what codes are assigned to."""


class Encoder(nn.Module):
    """Derive from this to bring an encoder of your own, such as a published VQGAN's.

    It is used in evaluation mode and never trained; gradients flow through it to the student.
    """

    name: str = "an encoder without a name"
    """What the event stream and the report call it."""
    codebook: Tensor | None = None
    """(codes, d), in the space of the latents; None to have one fitted to the data."""

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        """Encode RGB images in [0, 1]."""
        raise NotImplementedError


def encoder_of(name: str) -> Encoder:
    """The encoder that `package.module:function` makes; the default when empty.

    Raises:
        SparkirError: there is no such function, or it makes something else.
    """
    if not name:
        return RandomEncoder()
    function = find_function(name, "encoder")
    try:
        made = function()
    except TypeError as error:
        raise SparkirError(f"{name!r} cannot be called without arguments: {error}") from error
    if not isinstance(made, Encoder):
        raise SparkirError(
            f"{name!r} made {type(made).__name__}; it must return a sparkir.distill.encoder.Encoder"
        )
    return made


class RandomEncoder(Encoder):
    """Five levels of fixed random 3x3 convolutions, each half the size of the one before.

    Random convolutions keep what an image looks like at each scale, though not what is in it. They
    stand where the published method has a VQGAN trained on ImageNet, need no download, and are the
    same in every run and on every machine.
    """

    name = "fixed random convolutions of 5 levels (no VQGAN)"
    widths = (32, 32, 64, 64, 64)

    def __init__(self) -> None:
        """Draw the weights, He et al.'s normal distribution, from a seed of their own."""
        super().__init__()
        draw = torch.Generator().manual_seed(_SEED)
        inside = 3
        for level, outside in enumerate(self.widths):
            weight = torch.randn(outside, inside, 3, 3, generator=draw)
            weight *= math.sqrt(2 / (1 + _SLOPE**2) / (9 * inside))
            self.register_buffer(f"weight_{level}", weight, persistent=False)
            inside = outside

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        """Features of every level; the coarsest are the latents."""
        x = 2 * images - 1
        levels = []
        for level in range(len(self.widths)):
            if level > 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = F.leaky_relu(F.conv2d(padded, self.get_buffer(f"weight_{level}")), _SLOPE)
            levels.append(x)
        return Encoded(levels, x)


def encode(encoder: nn.Module, images: Float[Tensor, "b c h w"]) -> Encoded:
    """Encode images in [0, 1] of 1 or 3 channels."""
    encoded: Encoded = encoder(images.expand(-1, 3, -1, -1))
    return encoded


class Codebook(nn.Module):
    """Codes and how sharply a latent prefers the nearest."""

    codes: Tensor
    temperature: Tensor

    def __init__(self, codes: Float[Tensor, "k d"], temperature: Float[Tensor, ""]) -> None:
        """Take what was fitted or published."""
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("temperature", temperature)

    def forward(self, latents: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """log softmax(-|latent - code|^2 / temperature) at every location."""
        vectors = latents.movedim(1, -1)
        distances = (
            vectors.square().sum(-1, keepdim=True)
            - 2 * vectors @ self.codes.T
            + self.codes.square().sum(1)
        )
        return F.log_softmax(-distances / self.temperature, dim=-1).movedim(-1, 1)


@torch.no_grad()
def fit_codebook(latents: Float[Tensor, "b d h w"]) -> Codebook:
    """Cluster latents by k-means (Lloyd 1982), from a fixed draw.

    A quarter as many codes as latents, 2 to 256. The temperature is the mean squared distance of a
    latent from its code, so that neighbouring codes share a latent that lies between them.
    """
    vectors = latents.movedim(1, -1).flatten(0, 2)
    count = min(_LARGEST_CODEBOOK, max(2, len(vectors) // _LATENTS_PER_CODE), len(vectors))
    draw = torch.Generator().manual_seed(_SEED)
    codes = vectors[torch.randperm(len(vectors), generator=draw)[:count].to(vectors.device)]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(vectors, codes).argmin(1)
        members = F.one_hot(nearest, count).to(vectors.dtype)
        means = members.T @ vectors / members.sum(0).clamp_min(1)[:, None]
        codes = torch.where(members.sum(0)[:, None] > 0, means, codes)
    temperature = torch.cdist(vectors, codes).amin(1).square().mean()
    return Codebook(codes, temperature.clamp_min(torch.finfo(vectors.dtype).tiny ** 0.5))
