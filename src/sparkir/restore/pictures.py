"""A picture file as its user sees it: pixels of 8 or 16 bits, upright, with what belongs to them.

Pillow reads and writes everything but 16-bit colour, which it would cut to 8 bits; libvips (the
package pyvips) reads that and writes it to PNG, and tifffile writes it to TIFF.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from sparkir.data.codec import GreyLevels, deep_planes, one_line, raw_mode
from sparkir.errors import SparkirError
from sparkir.restore.naming import shown

# Formats are named, so that nothing opens by its content what its user did not mean: Pillow would
# run Ghostscript on a PostScript file that is called .png.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
MAX_PIXELS = 2 * 89_478_485  # where Pillow, too, begins to suspect a decompression bomb

_ORIENTATION, _SOFTWARE = 0x0112, 0x0131
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_EXIF_IFD, _EXIF_SIZES = 0x8769, (0xA002, 0xA003)  # of the camera's picture, not of the result
# How the pixels are stored in a TIFF file, which is not what a picture is.
_STORAGE_TAGS = {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317}
_STORAGE_TAGS |= {318, 319, 320, 321, 322, 323, 324, 325, 330, 332, 338, 339, 347, 529, 530, 531}
_STORAGE_TAGS |= {532, 700, 34675, *range(512, 522)}
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Pixels and what must stay with them."""

    pixels: np.ndarray
    """(h, w, c) uint8 or uint16; c is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)."""
    icc: bytes = b""
    """The colour profile of the pixels."""
    exif: bytes = b""
    """Without the orientation, which the pixels have taken, and sizes that are no longer true."""
    dpi: tuple[float, float] | None = None

    def with_pixels(self, pixels: np.ndarray) -> Picture:
        """The same picture, restored."""
        return replace(self, pixels=pixels)


@dataclass(frozen=True)
class Header:
    """What a file says before it is decoded."""

    shape: tuple[int, int, int]
    """(h, w, c) as `read_picture` returns them, but for the turning."""
    itemsize: int
    """Bytes of a channel: 1 or 2."""


def read_header(path: Path, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Look at a picture file without decoding it; the same errors as `read_picture`."""
    with _opened(path, max_pixels) as image:
        deep = _is_deep(image)
        channels = len(_target_mode(image))
        return Header((image.height, image.width, channels), 2 if deep else 1)


def read_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a PNG, JPEG, WebP, TIFF or BMP file.

    The pixels are turned upright by the EXIF orientation. Grey stays grey, 16 bits stay 16 bits, a
    palette is looked up, a transparent colour becomes alpha. CMYK and Lab become RGB: by their
    profile to sRGB if they carry one. Of several pages or frames the first is read.

    Raises:
        SparkirError: the file is missing, damaged, of another format, of more than `max_pixels`,
            or holds numbers with no agreed white (floats, or integers outside 0..65535); or it is
            16-bit colour and the package that reads it is not installed.
    """
    with _opened(path, max_pixels) as image:
        dpi = _checked_dpi(image.info.get("dpi"))
        icc = image.info.get("icc_profile") or b""
        exif = _kept_exif(image)
        if dpi is not None and image.getexif().get(_ORIENTATION) in _SIDEWAYS:
            dpi = dpi[::-1]
        if _is_deep(image) and not image.mode.startswith("I"):
            turn = image.getexif().get(_ORIENTATION, 1)
            pixels = _read_deep_colour(path, image)
        else:
            levels = GreyLevels.of(image)
            image.load()
            turn = image.getexif().get(_ORIENTATION, 1)  # a TIFF is upright now, and says so
            if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
                image, icc = _to_srgb(image, icc)
            pixels = _pixels_of(image, path, levels)
        return Picture(pixels=_turned(pixels, turn), icc=icc, exif=exif, dpi=dpi)


def mark_of(path: Path) -> str:
    """The EXIF "software" of a picture file, which says what made it; empty if nothing does."""
    try:
        with _opened(path, None) as image:
            # Where it is not known from the head of the file, Pillow would decode all of it.
            known = image.format == "TIFF" or "exif" in image.info
            return str(image.getexif().get(_SOFTWARE, "")) if known else ""
    except SparkirError:
        return ""


def marked_exif(exif: bytes, mark: str) -> Image.Exif:
    """These EXIF data with `mark` as the software that wrote the file."""
    made = Image.Exif()
    if exif:
        made.load(exif)
    made[_SOFTWARE] = mark
    return made


@contextmanager
def _opened(path: Path, max_pixels: int | None) -> Iterator[Image.Image]:
    """The image as Pillow opens it; whatever Pillow raises inside becomes a SparkirError."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that cannot be parsed
            Image.MAX_IMAGE_PIXELS = None  # the limit is ours
            # A file, not a path: see `data.codec`.
            with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
                _require_pixels(image, path, max_pixels)
                yield image
    except MemoryError as error:
        raise SparkirError(
            f"no memory to read {shown(path)}; close other programs or cut the picture"
        ) from error
    except _DECODER_ERRORS as error:
        raise SparkirError(
            f"cannot read image {shown(path)}: {shown(one_line(error))}; replace or remove the file"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _require_pixels(image: Image.Image, path: Path, max_pixels: int | None) -> None:
    count = math.prod(image.size)
    if max_pixels is not None and count > max_pixels:
        raise SparkirError(
            f"{shown(path)} says it has {image.width} x {image.height} = {count:,} pixels, more "
            f"than {max_pixels:,}; if you trust it, raise the limit with --max-pixels"
        )


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits in a channel."""
    return image.mode.startswith("I") or ";16" in raw_mode(image) or deep_planes(image)


def _target_mode(image: Image.Image) -> str:
    """The mode in which this file's pixels are restored: L, LA, RGB or RGBA, of 8 or 16 bits."""
    mode = "LA" if raw_mode(image).startswith("LA;16") else image.mode
    transparent = "transparency" in image.info or mode in ("LA", "PA", "RGBA", "La", "RGBa")
    grey = mode in ("1", "L", "LA", "La") or mode.startswith("I")
    return ("L" if grey else "RGB") + "A" * transparent


def _pixels_of(image: Image.Image, path: Path, levels: GreyLevels) -> np.ndarray:
    """(h, w, c) of an image that Pillow reads without loss."""
    if image.mode == "F":
        raise SparkirError(f"{shown(path)} holds floating-point pixels; convert it to 16 bits")
    if image.mode.startswith("I"):
        return _deep_grey(np.asarray(image), image.info.get("transparency"), levels)
    mode = _target_mode(image)
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _deep_grey(grey: np.ndarray, key: object, levels: GreyLevels) -> np.ndarray:
    pixels = levels.read(grey).astype(np.uint16)
    if not isinstance(key, int):
        return pixels[:, :, np.newaxis]
    return np.dstack([pixels, np.where(grey == key, 0, 65535).astype(np.uint16)])


def _to_srgb(image: Image.Image, icc: bytes) -> tuple[Image.Image, bytes]:
    """CMYK and the like as RGB, and its profile."""
    if not icc and image.mode != "LAB":
        return image.convert("RGB"), b""
    srgb = ImageCms.createProfile("sRGB")
    try:
        source: Any = (
            ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc else ImageCms.createProfile("LAB")
        )
        converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise SyntaxError(f"its colour profile does not fit: {error}") from error
    assert converted is not None
    return converted, ImageCms.ImageCmsProfile(srgb).tobytes()


def _read_deep_colour(path: Path, image: Image.Image) -> np.ndarray:
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA", "La", "RGBa"):
        raise SyntaxError(f"it is {image.mode} of 16 bits, which is not read; convert it to RGB")
    pyvips = require("pyvips", f"{shown(path)} has 16-bit colour")
    loader = {"PNG": pyvips.Image.pngload, "TIFF": pyvips.Image.tiffload}[str(image.format)]
    try:
        pixels: np.ndarray = loader(str(path), access="sequential", fail_on="error").numpy()
    except pyvips.Error as error:
        raise SyntaxError(one_line(error)) from error
    if pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise SyntaxError(f"its pixels are {pixels.dtype}")
    return pixels[..., : len(_target_mode(image))]  # a band of no stated meaning is left out


def require(package: str, what: str) -> Any:  # noqa: ANN401 - a module
    """Import a package of the extra `deep`.

    Raises:
        SparkirError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:  # OSError: without its shared library
        raise SparkirError(
            f"{what}, which needs {package}: "
            'pip install "sparkir[deep]", or pip install "pyvips[binary]" tifffile alone'
        ) from error


def _kept_exif(image: Image.Image) -> bytes:
    """The EXIF data that are still true of the restored picture; none if they are damaged."""
    exif = Image.Exif()
    try:
        exif.load(image.getexif().tobytes())
        camera = exif.get_ifd(_EXIF_IFD)
        for tag in _EXIF_SIZES:
            camera.pop(tag, None)
        for tag in (_ORIENTATION, *_STORAGE_TAGS):
            if tag in exif:
                del exif[tag]
        return exif.tobytes() if len(exif) else b""
    except (*_DECODER_ERRORS, AssertionError):
        return b""


def _turned(pixels: np.ndarray, orientation: object) -> np.ndarray:
    """Upright, by the EXIF standard's eight orientations."""
    if orientation in _SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _checked_dpi(dpi: object) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in dpi)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ArithmeticError):
        return None
    return (across, down) if 0 < across < 65536 and 0 < down < 65536 else None
