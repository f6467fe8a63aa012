"""One image file to and from an RGB uint8 array."""

import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageOps

from sparkir.data.atomic import atomic_file
from sparkir.errors import SparkirError

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
    under it stays), and 16-bit grey becomes ``round(v / 257)``. 16-bit *colour* is what Pillow
    makes of it, the high byte ``v // 256``. Of several pages or frames the first is read. Embedded
    colour profiles are not applied: the numbers are those in the file.

    Raises:
        SparkirError: the file is missing, truncated, broken, not an image, of more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` pixels, or holds numbers with no agreed white (floats, or
            integers outside 0..65535).
    """
    with _opened(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image), path)


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
            with Image.open(path) as image:
                yield image
    except _DECODER_ERRORS as error:
        raise SparkirError(
            f"cannot read image {path}: {one_line(error)}; replace or remove the file"
        ) from error


def _to_rgb(image: Image.Image, path: Path) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I"):  # I, I;16, I;16B, ...: integers of more than 8 bits, grey
        grey = _grey16_to_8(np.asarray(image), path)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if image.mode == "F":
        raise SparkirError(f"{path} holds floating-point pixels; convert it to 8 or 16 bits")
    return np.array(image.convert("RGB"))  # a copy: asarray would be read-only


def _grey16_to_8(grey: Integer[np.ndarray, "h w"], path: Path) -> UInt8[np.ndarray, "h w"]:
    if grey.min() < 0 or grey.max() > 65535:
        raise SparkirError(f"{path} holds integers outside 0..65535; convert it to 8 or 16 bits")
    # 257 is odd, so v / 257 never ends in .5 and integer arithmetic rounds exactly.
    return ((grey.astype(np.int64) + 128) // 257).astype(np.uint8)
