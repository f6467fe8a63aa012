"""From a clean image to a degraded one: MATLAB's bicubic, Gaussian noise, JPEG."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int, UInt, UInt8
from PIL import Image

from sparkir.errors import SparkirError

Number = TypeVar("Number", int, float)
Border = Literal["symmetric", "replicate"]
SCALES = (2, 3, 4, 8)


@runtime_checkable
class Degradation(Protocol):
    """Turns a clean image into what the network will be given.

    ``repr`` must say everything that the output depends on: it names cached results. Frozen
    dataclasses do so by themselves. ``str`` says to people what the network is given.
    """

    @property
    def scale(self) -> int:
        """How many times smaller the degraded image is, in each direction."""

    @property
    def fixed(self) -> bool:
        """Whether an image always degrades to the same pixels, whatever the ``rng``."""

    def __call__(
        self, hr: UInt8[np.ndarray, "H W c"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w c"]:
        """Degrade an image, 0..255, whose sides are multiples of ``scale``."""


def _words(value: Number | tuple[Number, Number]) -> str:
    low, high = _range(value)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


@dataclass(frozen=True)
class BicubicDownscale:
    """The degradation of classical super-resolution: MATLAB's ``imresize(hr, 1 / scale)``.

    Args:
        scale: 2, 3, 4 or 8.
        border: see `bicubic_resize`.
    """

    scale: int
    border: Border = "symmetric"
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise SparkirError(f"bicubic scale is {self.scale}; choose one of {SCALES}")
        if self.border not in _BORDERS:
            raise SparkirError(f"bicubic border is {self.border!r}; choose from {list(_BORDERS)}")

    def __str__(self) -> str:
        return f"bicubic / {self.scale}"

    def __call__(
        self, hr: UInt8[np.ndarray, "H W c"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w c"]:
        """See `Degradation`; ``rng`` is not used."""
        assert hr.shape[0] % self.scale == hr.shape[1] % self.scale == 0, "mod_crop it first"
        return bicubic_resize(hr, scale=Fraction(1, self.scale), border=self.border)


@dataclass(frozen=True)
class GaussianNoise:
    """White Gaussian noise, independent in each pixel and channel, rounded and clipped to uint8.

    Args:
        sigma: standard deviation in 8-bit levels, above 0. Of a pair (low, high) one value is
            drawn uniformly for each image or crop.
    """

    sigma: float | int | tuple[float | int, float | int]
    scale: ClassVar[int] = 1
    fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        low, high = _range(self.sigma)
        if not 0 < low <= high < math.inf:
            raise SparkirError(
                f"noise sigma is {self.sigma}; give 8-bit levels above 0, or (low, high)"
            )

    def __str__(self) -> str:
        return f"noise of sigma {_words(self.sigma)}"

    def __call__(
        self, hr: UInt8[np.ndarray, "h w c"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w c"]:
        """See `Degradation`."""
        sigma = rng.uniform(*_range(self.sigma))
        noisy = hr + sigma * rng.standard_normal(hr.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class JpegCompression:
    """JPEG at a quality of libjpeg's scale, with chroma subsampled 4:2:0 as cameras do.

    With one quality it is `fixed`: whole images are compressed once and training crops cut from
    them, so a crop meets the 8 x 8 grid at any phase. With a range each crop is compressed by
    itself, and the grid starts at the crop's corner, as it does in a whole image.

    Args:
        quality: 1 to 100. Of a pair (low, high) one value is drawn uniformly, both included.
    """

    quality: int | tuple[int, int]
    scale: ClassVar[int] = 1

    def __post_init__(self) -> None:
        low, high = _range(self.quality)
        if not 1 <= low <= high <= 100:
            raise SparkirError(f"JPEG quality is {self.quality}; give 1 to 100, or (low, high)")

    @property
    def fixed(self) -> bool:
        """True for a single quality."""
        low, high = _range(self.quality)
        return low == high

    def __str__(self) -> str:
        return f"JPEG of quality {_words(self.quality)}"

    def __call__(
        self, hr: UInt8[np.ndarray, "h w c"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w c"]:
        """See `Degradation`; one channel becomes a grey JPEG."""
        low, high = _range(self.quality)
        quality = int(rng.integers(low, high, endpoint=True))
        file = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(hr[:, :, 0] if hr.shape[2] == 1 else hr))
        image.save(file, format="JPEG", quality=quality, subsampling="4:2:0")
        return np.array(Image.open(file)).reshape(hr.shape)


def mod_crop(image: UInt8[np.ndarray, "H W c"], multiple: int) -> UInt8[np.ndarray, "h w c"]:
    """Crop the bottom and right (a view) until both sides are multiples of ``multiple``."""
    height, width = image.shape[:2]
    return image[: height - height % multiple, : width - width % multiple]


def bicubic_resize(
    image: UInt[np.ndarray, "H W c"],
    *,
    scale: Fraction | float | int,
    border: Border = "symmetric",
) -> UInt[np.ndarray, "h w c"]:
    """Resize as MATLAB's ``imresize(image, scale, 'bicubic')`` does, bit for bit.

    Cubic convolution (Keys 1981, a = -0.5), stretched by 1 / scale when shrinking (antialiasing),
    in double precision, rows first, and rounded to the image's own whole numbers (uint8 or uint16)
    between the two passes as well. The output sides are ``ceil(size * scale)``.

    Args:
        image: 0..255, or 0..65535.
        scale: output size / input size; give `Fraction(1, 3)` rather than 0.333.
        border: what lies outside the image. "symmetric" mirrors it (MATLAB today, and the
            published LR files of Set5); "replicate" repeats the last pixel (older MATLAB, and
            those of Set14, B100 and Urban100).
    """
    assert scale > 0
    resized = _resize_rows(image, scale, border)
    return _resize_rows(resized.transpose(1, 0, 2), scale, border).transpose(1, 0, 2)


def _resize_rows(
    image: UInt[np.ndarray, "H w c"], scale: Fraction | float | int, border: Border
) -> UInt[np.ndarray, "h w c"]:
    """One pass: a weighted sum over the taps of each output row, one tap at a time."""
    rows, weights = _taps(image.shape[0], scale, border)
    total = np.zeros((len(rows), *image.shape[1:]))
    for tap in range(rows.shape[1]):
        total += weights[:, tap, np.newaxis, np.newaxis] * image[rows[:, tap]]
    # Halves go up, as in MATLAB; np.rint would take them to the even neighbour.
    return np.clip(np.floor(total + 0.5), 0, np.iinfo(image.dtype).max).astype(image.dtype)


@lru_cache(maxsize=256)
def _taps(
    size: int, scale: Fraction | float | int, border: Border
) -> tuple[Int[np.ndarray, "out taps"], Float64[np.ndarray, "out taps"]]:
    """For each output pixel: the input pixels that it sums, and their weights (rows sum to 1).

    After `contributions` in MATLAB's imresize.m, with indices from 0.
    """
    shrink = min(float(scale), 1.0)
    centre = (np.arange(math.ceil(size * scale)) + 0.5) / float(scale) - 0.5
    first = np.floor(centre - 2 / shrink).astype(np.int64)
    positions = first[:, np.newaxis] + np.arange(math.ceil(4 / shrink) + 2)
    weights = _cubic(shrink * (centre[:, np.newaxis] - positions))
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights.any(axis=0)
    indices, weights = _BORDERS[border](positions[:, used], size), weights[:, used]
    for cached in (indices, weights):
        cached.setflags(write=False)
    return indices, weights


def _cubic(x: Float64[np.ndarray, "out taps"]) -> Float64[np.ndarray, "out taps"]:
    """Keys's cubic convolution kernel with a = -0.5 (IEEE TASSP 29, 1981, eq. 15)."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _symmetric(positions: Int[np.ndarray, "*s"], size: int) -> Int[np.ndarray, "*s"]:
    folded = positions % (2 * size)
    return np.where(folded < size, folded, 2 * size - 1 - folded)


def _replicate(positions: Int[np.ndarray, "*s"], size: int) -> Int[np.ndarray, "*s"]:
    return positions.clip(0, size - 1)


_BORDERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "symmetric": _symmetric,
    "replicate": _replicate,
}


def _range(value: Number | tuple[Number, Number]) -> tuple[Number, Number]:
    """The lowest and highest of a setting that is either one number or a pair."""
    return value if isinstance(value, tuple) else (value, value)
