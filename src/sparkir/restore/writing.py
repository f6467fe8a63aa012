"""A restored picture to a file, in the format that the file's name says."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sparkir.data.atomic import atomic_file
from sparkir.data.codec import one_line
from sparkir.errors import SparkirError
from sparkir.restore.naming import shown
from sparkir.restore.pictures import Picture, marked_exif, require

# By suffix: Pillow's name, and how the format is told to lose as little as it can.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
_LONGEST_PX = {"JPEG": 65_500, "WEBP": 16_383}
_LONGEST_EXIF = {"JPEG": 65_533}
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_ASCII = 2  # TIFF's type of texts
_EXIF_PARTS = (0x8769, 0x8825)  # the camera's settings, the place
_KEPT_IN_TIFF = (270, 271, 272, 306, 315, 33432)  # description, camera, date, artist, copyright


class FullDiskError(SparkirError):
    """Nothing more can be written, whatever the picture."""


def format_of(path: Path) -> str:
    """Pillow's name of the format that the suffix stands for.

    Raises:
        SparkirError: it stands for none.
    """
    if path.suffix.lower() not in FORMATS:
        raise SparkirError(
            f"images are written as {' '.join(FORMATS)}, not {shown(path.suffix)}; "
            f"rename {shown(path)}"
        )
    return FORMATS[path.suffix.lower()][0]


def require_room(path: Path, shape: tuple[int, ...], itemsize: int) -> None:
    """See that the format can hold (h, w, c) pixels of 1 or 2 bytes a channel.

    Raises:
        SparkirError: it cannot; the message says which can.
    """
    kind = format_of(path)
    lacking = [
        what
        for what, missing in (
            ("transparency", kind == "JPEG" and shape[2] in (2, 4)),
            ("16 bits", kind in ("JPEG", "WEBP") and itemsize == 2),
            (f"{max(shape[:2])} px a side", max(shape[:2]) > _LONGEST_PX.get(kind, 2**31)),
        )
        if missing
    ]
    if lacking:
        raise SparkirError(
            f"{kind} cannot hold {' and '.join(lacking)}, and the result has; write .png or .tif"
        )
    if itemsize == 2 and shape[2] > 1:
        package = "pyvips" if kind == "PNG" else "tifffile"
        require(package, f"{shown(path)} would have 16-bit colour")


def require_exif(path: Path, exif: bytes, mark: str) -> None:
    """See that the format can hold EXIF data, together with what made the file.

    Raises:
        SparkirError: it cannot; the message says which can.
    """
    kind, length = format_of(path), len(marked_exif(exif, mark).tobytes())
    if length > _LONGEST_EXIF.get(kind, length):
        raise SparkirError(
            f"{kind} cannot hold {length} bytes of EXIF, and the result has; write .png or .tif"
        )


def write_picture(path: Path, picture: Picture, mark: str) -> None:
    """Write a picture, whole or not at all, with `mark` as the software that made it.

    Missing parent folders are made, and an existing file is replaced. A 16-bit colour TIFF keeps
    of the EXIF data only its main texts; a 16-bit TIFF with grey and alpha is written as colour,
    which more programs read.

    Raises:
        SparkirError: the file cannot be written; a `FullDiskError` if no other could be either.
    """
    kind = format_of(path)
    deep = picture.pixels.dtype == np.uint16 and picture.pixels.shape[2] > 1
    writers: dict[str, Callable[[BinaryIO, Picture, str], None]] = {
        "PNG": _write_deep_png,
        "TIFF": _write_deep_tiff,
    }
    try:
        with atomic_file(path) as file:
            if deep:
                writers[kind](file, picture, mark)
            else:
                _write_by_pillow(file, picture, mark, *FORMATS[path.suffix.lower()])
    except OSError as error:
        message = f"cannot write {shown(path)}: {shown(one_line(error))}"
        hopeless = error.errno in _HOPELESS
        kinds = FullDiskError if hopeless else SparkirError
        raise kinds(f"{message}; free space or choose another folder") from error
    except (ValueError, struct.error) as error:
        raise SparkirError(
            f"cannot write {shown(path)}: {shown(one_line(error))}; write .png"
        ) from error


def _write_by_pillow(
    file: BinaryIO, picture: Picture, mark: str, kind: str, options: dict[str, Any]
) -> None:
    pixels = np.ascontiguousarray(picture.pixels)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    said: dict[str, Any] = {"exif": marked_exif(picture.exif, mark)}
    as_colour = kind == "WEBP" and pixels.shape[2] < 3
    if icc := _fitting_profile(picture.icc, as_colour=as_colour):
        said["icc_profile"] = icc
    if picture.dpi and kind != "WEBP":
        said["dpi"] = picture.dpi
    if as_colour:
        image = image.convert("RGBA" if pixels.shape[2] == 2 else "RGB")
    if kind == "TIFF" and any(part in said["exif"] for part in _EXIF_PARTS):
        options = {}  # together with compression Pillow loses these parts
    image.save(file, format=kind, **said, **options)


def _fitting_profile(icc: bytes, *, as_colour: bool) -> bytes:
    """The profile, unless it is one of grey and the pixels are written as colour."""
    return b"" if as_colour and icc[16:20] == b"GRAY" else icc


def _write_deep_png(file: BinaryIO, picture: Picture, mark: str) -> None:
    pyvips = require("pyvips", "this picture has 16-bit colour")
    pixels = np.ascontiguousarray(picture.pixels)
    kind = "grey16" if pixels.shape[2] == 2 else "rgb16"
    image = pyvips.Image.new_from_array(pixels, interpretation=kind).copy()
    image.set_type(pyvips.GValue.blob_type, "exif-data", marked_exif(picture.exif, mark).tobytes())
    if picture.icc:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", picture.icc)
    if picture.dpi:
        across, down = (value / 25.4 for value in picture.dpi)
        image = image.copy(xres=across, yres=down)
    try:
        file.write(image.pngsave_buffer())
    except pyvips.Error as error:
        raise ValueError(one_line(error)) from error


def _write_deep_tiff(file: BinaryIO, picture: Picture, mark: str) -> None:
    tifffile = require("tifffile", "this picture has 16-bit colour")
    pixels = picture.pixels
    if pixels.shape[2] == 2:
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    exif = marked_exif(picture.exif, mark)
    texts = [
        (tag, _ASCII, 0, str(exif[tag]), True)
        for tag in _KEPT_IN_TIFF
        if tag in exif and str(exif[tag]).isascii()
    ]
    tifffile.imwrite(
        file,
        np.ascontiguousarray(pixels),
        photometric="rgb",
        extrasamples=["unassalpha"] if pixels.shape[2] == 4 else None,
        compression="zlib",
        software=mark,
        metadata=None,
        iccprofile=_fitting_profile(picture.icc, as_colour=picture.pixels.shape[2] == 2) or None,
        resolution=picture.dpi,
        resolutionunit="INCH" if picture.dpi else None,
        extratags=texts,
    )
