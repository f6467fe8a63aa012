"""What a network is, as data: the facts it carries, and how to run it by them.

Losing a network's value range or size multiple costs decibels or crashes, so every network
has an attribute ``facts`` and everything else in sparkir reads that instead of guessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float

from sparkir.errors import SparkirError

if TYPE_CHECKING:  # the facts of an exported file are read where there is no torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The facts of one network; ``network.facts`` holds them, on traced copies as well."""

    name: str
    """The name under which messages and reports speak of it, such as ``rfdn``."""

    scale: int
    """Output pixels per input pixel along one side: 4 for x4 super-resolution, 1 for denoising."""

    channels: int
    """3 for RGB, 1 for a network that restores brightness alone."""

    value_range: float
    """The white level that the network works in: 1.0 or 255.0. Black is 0."""

    size_multiple: int = 1
    """Height and width of the input must be multiples of this."""

    min_size_px: int = 1
    """The smallest height and width of the input that the network can compute."""

    taps: tuple[str, ...]
    """Submodules whose outputs a feature distillation may use, from input to output."""

    halo_px: int
    """Input pixels around a tile that its output pixels need to come out as in the whole image;
    where no number is enough (see `exact_tiles`), how many are worth computing."""

    tile_phase_px: int = 1
    """The corners of tiles must be multiples of this, for networks that compute on a coarse grid:
    tiles whose grids coincide with the whole image's come out as the whole image does."""

    exact_tiles: bool = True
    """Whether tiles with that halo and phase come out as the whole image does. False where
    something looks at the whole image (global pooling), or on a grid that follows its size: a tile
    is then restored as a picture of its own, a little differently."""

    luma_range: Literal["full", "studio"] = "full"
    """What the channel of a 1-channel network is: BT.601 luma over 0..255, or over 16..235."""

    def __post_init__(self) -> None:
        """Refuse facts that no network can have, before they turn into wrong pictures."""
        for field in ("scale", "size_multiple", "min_size_px", "tile_phase_px"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise SparkirError(f"facts of {self.name!r}: {field} must be a whole number >= 1")
        if self.channels not in (1, 3):
            raise SparkirError(f"facts of {self.name!r}: channels must be 1 (luma) or 3 (RGB)")
        if self.value_range not in (1.0, 255.0):
            raise SparkirError(f"facts of {self.name!r}: value_range must be 1.0 or 255.0")
        if self.luma_range not in ("full", "studio"):
            raise SparkirError(f"facts of {self.name!r}: luma_range must be full or studio")
        if type(self.halo_px) is not int or self.halo_px < 0:
            raise SparkirError(f"facts of {self.name!r}: halo_px must be a whole number >= 0")
        taps: object = self.taps  # a recipe's, perhaps
        if isinstance(taps, str) or not all(isinstance(tap, str) for tap in self.taps):
            raise SparkirError(f"facts of {self.name!r}: taps must be a list of submodules' names")


def thirds(names: Sequence[str]) -> tuple[str, ...]:
    """Return those of a network's blocks that end each third of them, in order.

    As taps: whatever two networks' depths are, theirs then pair up.
    """
    ends = sorted({max(1, round(len(names) * third / 3)) for third in (1, 2, 3)})
    return tuple(names[end - 1] for end in ends)


def require_counts(network: str, **options: object) -> None:
    """Refuse an option that is no list of whole numbers from 1 on.

    Raises:
        SparkirError: naming the option.
    """
    for option, value in options.items():
        counts = list(value) if isinstance(value, Sequence) else []
        if not counts or not all(type(count) is int and count >= 1 for count in counts):
            raise SparkirError(
                f"option {option!r} of network {network!r} must be a list of whole numbers >= 1, "
                f"got {value!r}"
            )


def facts_of(network: nn.Module) -> ModelFacts:
    """Return the facts that a network carries.

    Raises:
        SparkirError: it carries none.
    """
    facts = getattr(network, "facts", None)
    if not isinstance(facts, ModelFacts):
        raise SparkirError(
            f"the network {type(network).__name__} carries no facts; "
            "set network.facts = sparkir.models.facts.ModelFacts(...)"
        )
    return facts


_STUDIO_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # BT.601, to 16 .. 235
_FULL_LUMA = (0.299, 0.587, 0.114)


def as_seen(image: Float[Tensor, "b c h w"], facts: ModelFacts) -> Float[Tensor, "b k h w"]:
    """RGB in [0, 1] as the network with these facts restores it: as it is, or its luma.

    The luma is the one that whole images are evaluated by (`evaluate.infer`), of the range that
    the facts name. An image of one channel is that luma already, and grey to a network of three.
    """
    if image.shape[1] == facts.channels or image.shape[1] not in (1, 3):
        return image  # whoever runs the network complains of other numbers
    if facts.channels == 3:
        return image.expand(-1, 3, -1, -1)
    studio = facts.luma_range == "studio"
    weights = image.new_tensor(_STUDIO_LUMA if studio else _FULL_LUMA).view(1, 3, 1, 1)
    luma: Tensor = (image * weights).sum(1, keepdim=True)
    return luma + 16 / 255 if studio else luma


def restore(network: nn.Module, lq: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c sh sw"]:
    """Run a network on images in [0, 1], whatever value range and sizes it wants itself.

    The input is brought to the network's value range and reflect-padded at the bottom and right
    to its size multiple; the output is cropped and brought back. Nothing is clipped.

    Args:
        network: any module with ``facts``; gradients flow through.
        lq: (b, c, h, w) in [0, 1], with the network's number of channels.

    Returns:
        (b, c, s*h, s*w) around [0, 1].

    Raises:
        SparkirError: the images have the wrong number of channels or are too small.
    """
    facts = facts_of(network)
    height, width = lq.shape[-2:]
    padded = pad_to_multiple(lq * facts.value_range, facts)
    restored: Tensor = network(padded)
    cropped = restored[..., : facts.scale * height, : facts.scale * width]
    return cropped / facts.value_range


def smallest_px(facts: ModelFacts, side_px: int) -> int:
    """What one side of an image must have at least to be restored.

    Reflection repeats no edge pixel, so it can add at most one pixel less than there are.
    """
    return max(facts.min_size_px, -side_px % facts.size_multiple + 1)


def require_size(facts: ModelFacts, height: int, width: int) -> None:
    """Stop now if an image is too small to be restored.

    Raises:
        SparkirError: it is; the message says what to do.
    """
    for what, side_px in (("height", height), ("width", width)):
        least = smallest_px(facts, side_px)
        if side_px < least:
            raise SparkirError(
                f"{facts.name} needs images with a {what} of at least {least} px, but got "
                f"{height} x {width}; enlarge or pad the image first"
            )


def pad_to_multiple(lq: Tensor, facts: ModelFacts) -> Tensor:
    """Reflect (b, c, h, w) at the bottom and right up to the network's size multiple.

    Raises:
        SparkirError: as `restore`.
    """
    channels, height, width = lq.shape[-3:]
    if channels != facts.channels:
        raise SparkirError(
            f"{facts.name} restores {facts.channels}-channel images, but got {channels} channels"
        )
    bottom, right = -height % facts.size_multiple, -width % facts.size_multiple
    require_size(facts, height, width)
    if not (bottom or right):
        return lq
    import torch.nn.functional as F

    return F.pad(lq, (0, right, 0, bottom), mode="reflect")
