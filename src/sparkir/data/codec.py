"""One image file to and from an RGB uint8 array."""

import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sparkir.data.atomic import atomic_file
from sparkir.errors import SparkirError

_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF
_WHITE, _BYTE = 65535, 255

# What Pillow's decoders are known to raise on damaged files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image file to RGB, 0..255, turned upright by its EXIF orientation.

    Grey is repeated to three channels, a palette is looked up, transparency is dropped (the colour
    under it stays), and 16-bit grey becomes ``round(v / 257)``. 16-bit *colour*, and grey with
    transparency, is what Pillow makes of it, the high byte ``v // 256``. Of several pages or frames
    the first is read. Embedded colour profiles are not applied: the numbers are those in the file.

    Raises:
        SparkirError: the file is missing, truncated, broken, not an image, of more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` pixels, or holds numbers with no agreed white (floats,
            integers outside 0..65535, or 0..255 in 32 bits).
    """
    with _opened(path) as image:
        if deep_planes(image):
            raise ValueError("its 16-bit channels lie apart; save it with interleaved ones")
        levels = GreyLevels.of(image)
        return _to_rgb(ImageOps.exif_transpose(image), path, levels)


def decoded_bytes(path: Path) -> int:
    """How many bytes `read_image` would return, from the header alone; 0 for an unreadable file."""
    try:
        return 3 * math.prod(image_size(path))
    except SparkirError:
        return 0


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as stored, from the header alone; SparkirError as `read_image`."""
    with _opened(path) as image:
        return image.size


def write_png(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write an RGB image, 0..255, as PNG; ``path`` appears whole or not at all.

    Missing parent folders are made, and an existing file is replaced.

    Raises:
        SparkirError: the file cannot be written (no space, no permission, a folder in its place).
    """
    try:
        with atomic_file(path) as file:
            Image.fromarray(np.ascontiguousarray(image)).save(file, format="PNG")
    except OSError as error:
        raise SparkirError(
            f"cannot write {path}: {one_line(error)}; free space or choose another folder"
        ) from error


def one_line(error: BaseException) -> str:
    """An exception's reason on one line: no line breaks, no error number, no path."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, UnidentifiedImageError):  # its text shows a Python object
        text = "it is no image of a kind that is known"
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image as Pillow opens it; whatever Pillow raises inside becomes a SparkirError."""
    try:
        with warnings.catch_warnings():
            # Pillow warns (UserWarning) about metadata it cannot parse, which we do not use, and
            # about images of 89 megapixels, which cameras make; twice that is an error anyway.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Of a path, Pillow would map uncompressed TIFFs, and by the size that they have turned
            # upright: the pixels come out scrambled.
            with path.open("rb") as file, Image.open(file) as image:
                yield image
    except _DECODER_ERRORS as error:
        raise SparkirError(
            f"cannot read image {path}: {one_line(error)}; replace or remove the file"
        ) from error


def raw_mode(image: Image.Image) -> str:
    """How an image that is not decoded yet stores a pixel, such as `LA;16B`."""
    tiles = getattr(image, "tile", None)
    found = tiles[0].args if tiles else ""
    return str(found if isinstance(found, str) or not found else found[0])


def deep_planes(image: Image.Image) -> bool:
    """Whether a TIFF keeps 16-bit channels apart, which Pillow would take for 8-bit ones."""
    tags = getattr(image, "tag_v2", {})
    apart = tags.get(_PLANAR) == 2 and not image.mode.startswith("I")
    return apart and max(tags.get(_BITS, (8,))) > 8


@dataclass(frozen=True)
class GreyLevels:
    """How a file of grey with more than 8 bits means its numbers; known before it is decoded."""

    bits: int
    """Those that are stored: of 32, white is that of 16."""
    black_is_zero: bool

    @classmethod
    def of(cls, image: Image.Image) -> "GreyLevels":
        """As the file says."""
        inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        stored = raw_mode(image)
        bits = next((n for n in (12, 32) if stored.startswith(f"I;{n}")), 16)
        return cls(bits, not inverted)

    def read(self, grey: Integer[np.ndarray, "h w"]) -> Integer[np.ndarray, "h w"]:
        """The numbers that Pillow decodes -> 0 for black to 65535 for white.

        Raises:
            ValueError: some lie outside 0..65535, and nobody knows their white.
        """
        if grey.min() < 0 or grey.max() > _WHITE:
            raise ValueError("it holds integers outside 0..65535; convert it to 8 or 16 bits")
        if self.bits > 16 and 0 < grey.max() <= _BYTE:
            raise ValueError("it holds 0..255 in 32 bits, and would be black; convert it to 8 bits")
        levels = grey.astype(np.int64)
        if self.bits < 16:
            white = 2**self.bits - 1
            levels = (levels * _WHITE + white // 2) // white
        return levels if self.black_is_zero else _WHITE - levels


def _to_rgb(image: Image.Image, path: Path, levels: GreyLevels) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I"):  # I, I;16, I;16B, ...: integers of more than 8 bits, grey
        # 257 is odd, so v / 257 never ends in .5 and integer arithmetic rounds exactly.
        grey = ((levels.read(np.asarray(image)) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if image.mode == "F":
        raise SparkirError(f"{path} holds floating-point pixels; convert it to 8 or 16 bits")
    return np.array(image.convert("RGB"))  # a copy: asarray would be read-only
