"""Folders of image files, and a store of them decoded once into one memory-mapped file.

A store is a folder of two files: ``pixels.u8``, all images end to end, and ``index.json``, their
names and shapes. It is named by a hash of what it was made from: the files' paths, sizes and times
of modification, whether they may be read, and what decodes them. It is only a cache, and may be
deleted whenever nothing runs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
from jaxtyping import UInt8

from sparkir.data.atomic import atomic_folder, synced_file
from sparkir.data.blocks import is_blocks, read_blocks
from sparkir.data.codec import decoded_bytes, one_line, read_image, write_png
from sparkir.errors import SparkirError

__all__ = [
    "SUFFIXES",
    "ImageStore",
    "Progress",
    "check_stems",
    "find_images",
    "read_image",
    "write_png",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
Progress = Callable[[int, int], None]  # images done, images in all

_PIXELS, _INDEX = "pixels.u8", "index.json"
_FORMAT = 2
"""Raise it when the layout of a store, what read_image returns, or a degradation changes."""
_HOW_TO_SKIP = "or set data.skip_broken = true to go on without it"


def find_images(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, sorted by name; hidden files are left out.

    Raises:
        SparkirError: ``folder`` is missing, is not a folder, or holds no image.
    """
    accepted = " ".join(suffix[1:] for suffix in SUFFIXES)
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise SparkirError(
            f"cannot list {folder}: {one_line(error)}; give a folder of images ({accepted})"
        ) from error
    # Not is_file(): a dangling link should be reported when it is read, not vanish here.
    images = [path for path in entries if _looks_like_image(path) and not path.is_dir()]
    if not images:
        raise SparkirError(
            f"no images in {folder}; put files of these types directly in it: {accepted}"
        )
    return images


def check_stems(paths: Sequence[Path]) -> None:
    """Raise SparkirError if two files of one folder differ only in suffix: names would clash.

    So does a name that is no text: it could be neither printed nor written into a report.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            raise SparkirError(
                f"{str(path)!a} has a name that is not UTF-8; rename the file"
            ) from error
        first = seen.setdefault(path.with_suffix(""), path)
        if first is not path:
            raise SparkirError(
                f"{first} and {path.name} are both named {path.stem!r}; rename or remove one"
            )


class ImageStore:
    """Read-only images of any sizes, memory-mapped: opening is instant and processes share them.

    Attributes:
        folder: where the store lies.
        names: the stem of each image's file, in the order of the images.
        skipped: one message for each file that could not be read and was left out.
    """

    def __init__(self, folder: Path) -> None:
        """Open a finished store; SparkirError if it is not one or is damaged."""
        self.folder = folder
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            pixels = np.asarray(np.memmap(folder / _PIXELS, dtype=np.uint8, mode="r"))
            self.names: tuple[str, ...] = tuple(index["names"])
            self.skipped: tuple[str, ...] = tuple(index["skipped"])
            self._images = _views(pixels, index["shapes"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SparkirError(
                f"image store {folder} is damaged: {one_line(error)}; delete it and run again"
            ) from error

    @classmethod
    def build(
        cls,
        paths: Sequence[Path],
        *,
        cache: Path,
        names: Sequence[str] | None = None,
        skip_broken: bool = False,
        progress: Progress | None = None,
    ) -> "ImageStore":
        """Open the store of these files in the folder ``cache``, decoding them if it is not there.

        The store is known by Pillow's version, by the files' absolute paths, sizes, modification
        times and whether they may be read, in order, and by ``names``, which take the place of the
        stems. A file of blocks (see `read_blocks`) gives an image for each, named
        ``NAME-SCENE-BLOCK``. ``progress`` is called after each decoded file, and not at all when
        the store exists.

        Raises:
            SparkirError: a file cannot be read (unless ``skip_broken``), none can, two in one
                folder share a stem, or the cache cannot be written (the bytes needed are named).
        """
        check_stems(paths)
        named = [] if names is None else [list(names)]
        folder = (
            cache / f"images-{_hash([_FORMAT, PIL.__version__, *map(_identity, paths), *named])}"
        )
        if not folder.is_dir():
            skipped: list[str] = []
            files = list(zip(names or [path.stem for path in paths], paths, strict=True))
            images = _decoded(files, skipped if skip_broken else None, progress)
            _write(folder, images, skipped, lambda: sum(map(decoded_bytes, paths)))
        store = cls(folder)
        if store.skipped and not skip_broken:  # it was built by a more lenient run
            raise SparkirError(
                f"{store.skipped[0]}, {_HOW_TO_SKIP} (this was found when {folder} was made; "
                "delete it to try again)"
            )
        return store

    def derive(
        self,
        transform: Callable[[str, UInt8[np.ndarray, "_h _w 3"]], UInt8[np.ndarray, "_p _q 3"]],
        *,
        key: str,
        bytes_needed: int,
        progress: Progress | None = None,
    ) -> "ImageStore":
        """Open the store of ``transform(name, image)`` of every image, making it if not there.

        It lies beside this one and is known by this store and ``key``, which must say everything
        that the outcome depends on. ``bytes_needed`` is only for the message on a full disk.
        """
        folder = self.folder.parent / f"derived-{_hash([self.folder.name, key])}"
        if not folder.is_dir():
            items = zip(self.names, self._images, strict=True)
            images = ((name, transform(name, image)) for name, image in items)
            counted = _counted(images, len(self), progress)
            _write(folder, counted, self.skipped, lambda: bytes_needed)
        return ImageStore(folder)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """A read-only view of one image, RGB, 0..255; nothing is copied."""
        return self._images[index]

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "_h _w 3"]]:
        return iter(self._images)


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _identity(path: Path) -> tuple[str, int, int, bool]:
    try:
        status = path.stat()
    except OSError:  # reading it will say what is wrong
        return str(path.absolute()), -1, -1, False
    readable = os.access(path, os.R_OK)
    return str(path.absolute()), status.st_size, status.st_mtime_ns, readable


def _decoded(
    files: Sequence[tuple[str, Path]], skipped: list[str] | None, progress: Progress | None
) -> Iterator[tuple[str, UInt8[np.ndarray, "_h _w 3"]]]:
    """Yield name and image of each readable file; broken ones go to ``skipped``, or raise."""
    for done, (name, path) in enumerate(files, start=1):
        try:
            images = _images_of(name, path)
        except SparkirError as error:
            if skipped is None:
                raise SparkirError(f"{error}, {_HOW_TO_SKIP}") from error
            skipped.append(str(error))
        else:
            yield from images
        if progress is not None:
            progress(done, len(files))


def _images_of(name: str, path: Path) -> list[tuple[str, UInt8[np.ndarray, "_h _w 3"]]]:
    if not is_blocks(path):
        return [(name, read_image(path))]
    return [
        (f"{name}-{scene:02d}-{block:02d}", image)
        for scene, blocks in enumerate(read_blocks(path), start=1)
        for block, image in enumerate(blocks, start=1)
    ]


def _counted(
    images: Iterable[tuple[str, UInt8[np.ndarray, "_h _w 3"]]],
    total: int,
    progress: Progress | None,
) -> Iterator[tuple[str, UInt8[np.ndarray, "_h _w 3"]]]:
    for done, item in enumerate(images, start=1):
        yield item
        if progress is not None:
            progress(done, total)


def _write(
    folder: Path,
    images: Iterable[tuple[str, UInt8[np.ndarray, "_h _w 3"]]],
    skipped: Sequence[str],
    bytes_needed: Callable[[], int],
) -> None:
    """Write a whole store or nothing; ``skipped`` is read after the last image."""
    names, shapes = [], []
    try:
        with atomic_folder(folder) as partial:
            with synced_file(partial / _PIXELS) as file:
                for name, image in images:
                    file.write(np.ascontiguousarray(image).data)
                    names.append(name)
                    shapes.append(image.shape)
            if not names:
                reason = f": {skipped[0]}" if skipped else "; give at least one"
                raise SparkirError(f"not one of {len(skipped)} images could be read{reason}")
            with synced_file(partial / _INDEX) as file:
                index = {"names": names, "shapes": shapes, "skipped": list(skipped)}
                file.write(json.dumps(index).encode())
    except OSError as error:
        raise SparkirError(
            f"cannot write the image cache in {folder.parent}: {one_line(error)}; "
            f"{bytes_needed():,} bytes are needed, free them or choose another cache folder"
        ) from error


def _views(
    pixels: UInt8[np.ndarray, " n"], shapes: Sequence[Sequence[int]]
) -> tuple[UInt8[np.ndarray, "_h _w 3"], ...]:
    """Cut the flat pixels into images; ValueError if the shapes do not add up to them."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(pixels, ends[:-1])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
