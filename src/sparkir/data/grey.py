"""Grey images, as three equal channels, so that everything that reads RGB reads them too."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8

from sparkir.data.degrade import Degradation

_WEIGHTS = np.array([0.299, 0.587, 0.114])  # BT.601, as MATLAB's rgb2gray and libjpeg


def full_luma(image: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "h w"]:
    """BT.601 luma of full range, 0 (black) to 255 (white)."""
    luma: np.ndarray = image.astype(np.float64) @ _WEIGHTS
    return luma


def to_grey(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Full-range luma, rounded, three times; an image that is grey already stays."""
    luma = np.floor(full_luma(image) + 0.5).astype(np.uint8)
    return np.repeat(luma[..., np.newaxis], 3, axis=2)


@dataclass(frozen=True)
class OfGrey:
    """Another degradation on the one channel of a grey image.

    Noise would otherwise be drawn for each of the three, and be coloured.
    """

    inner: Degradation

    @property
    def scale(self) -> int:
        """See `Degradation`."""
        return self.inner.scale

    @property
    def fixed(self) -> bool:
        """See `Degradation`."""
        return self.inner.fixed

    def __str__(self) -> str:
        return f"{self.inner}, grey"

    def __call__(
        self, hr: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w 3"]:
        """See `Degradation`; the three channels of ``hr`` are equal."""
        return np.repeat(self.inner(hr[:, :, :1], rng), 3, axis=2)
