"""A network's outputs on whole images, computed once and kept as 16-bit whole numbers.

A store is a folder of two files of known size: ``values.u16``, all images end to end, and
``done.u8``, one byte for each image that is whole. It is filled image by image; killed in between,
it goes on where it stopped. It is named by a hash of what it was made from, so it is never stale;
it is only a cache, and may be deleted whenever nothing runs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32, UInt16

from sparkir.data.atomic import atomic_folder, synced_file
from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

LEVELS_PER_UNIT = 2**15
LOWEST = -0.5
"""Stored numbers stand for -0.5 .. 1.5 in steps of 2**-15: at most 2**-16 from the value, a 250th
of an 8-bit level. float16, of the same size, is up to 16 times as far from values above a half."""
_VALUES, _DONE = "values.u16", "done.u8"
_STORED = np.dtype("<u2")


class OutputStore:
    """Images (H, W, 3) of sizes that are known beforehand, memory-mapped and filled one by one.

    Attributes:
        folder: where it lies.
        bytes: what it takes on the disk when it is full.
    """

    def __init__(self, folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
        """Open the store of images of these heights and widths, making an empty one if there is
        none; SparkirError if it is damaged or the disk is full.
        """
        self.folder = folder
        self._shapes = [(height, width, 3) for height, width in sizes]
        ends = np.cumsum([0, *(bytes_of(height, width) for height, width in sizes)]).tolist()
        self._starts, self.bytes = ends[:-1], ends[-1]
        try:
            if not folder.is_dir():
                self._create()
            self._values = np.asarray(np.memmap(folder / _VALUES, dtype=_STORED, mode="r"))
            self._done = np.asarray(np.memmap(folder / _DONE, dtype=np.uint8, mode="r"))
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error
        if (self._values.nbytes, len(self._done)) != (self.bytes, len(self._shapes)):
            raise SparkirError(f"{folder} is damaged: wrong size; delete it and run again")

    def __len__(self) -> int:
        return len(self._shapes)

    def missing(self) -> list[int]:
        """The images that are not there yet."""
        return np.flatnonzero(self._done == 0).tolist()

    def missing_bytes(self) -> int:
        """What those will take."""
        return sum(bytes_of(*self._shapes[index][:2]) for index in self.missing())

    def __getitem__(self, index: int) -> UInt16[np.ndarray, "h w 3"]:
        """A read-only view of one image's stored numbers; nothing is copied."""
        shape, start = self._shapes[index], self._starts[index] // _STORED.itemsize
        return self._values[start : start + int(np.prod(shape))].reshape(shape)

    def write(self, index: int, numbers: UInt16[np.ndarray, "h w 3"]) -> None:
        """Store one image; it counts once it is on the disk.

        Written through a file, not the map: there a full disk is an error that can be told.
        """
        assert numbers.shape == self._shapes[index]
        content = np.ascontiguousarray(numbers, dtype=_STORED).data
        try:
            with (self.folder / _VALUES).open("r+b") as file:
                _put(file, self._starts[index], content)
            with (self.folder / _DONE).open("r+b") as file:
                _put(file, index, b"\1")
        except OSError as error:
            raise self._unwritable(error) from error

    def _create(self) -> None:
        with atomic_folder(self.folder) as partial:
            for name, size in ((_VALUES, self.bytes), (_DONE, len(self._shapes))):
                with synced_file(partial / name) as file:
                    file.truncate(size)

    def _unwritable(self, error: Exception) -> SparkirError:
        return SparkirError(
            f"cannot keep the teacher's outputs in {self.folder}: {one_line(error)}; "
            f"{self.bytes:,} bytes are needed: free them, set SPARKIR_CACHE to another folder, or "
            "set train.teacher_cache = false"
        )


def _put(file: BinaryIO, offset: int, content: bytes | memoryview) -> None:
    file.seek(offset)
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def bytes_of(height: int, width: int) -> int:
    """What one image takes."""
    return height * width * 3 * _STORED.itemsize


def to_levels(values: Float32[np.ndarray, "*s"]) -> Float32[np.ndarray, "*s"]:
    """What values around [0, 1] are stored as, before it is rounded and clipped."""
    return (values - np.float32(LOWEST)) * np.float32(LEVELS_PER_UNIT)


def loaded(numbers: UInt16[np.ndarray, "*s"]) -> Float32[np.ndarray, "*s"]:
    """What stored numbers stand for, exactly."""
    return numbers.astype(np.float32) / np.float32(LEVELS_PER_UNIT) + np.float32(LOWEST)


def output_store(
    cache: Path,
    key: Sequence[str],
    sizes: Sequence[tuple[int, int]],
) -> OutputStore:
    """The store in ``cache`` that belongs to ``key``, which must say all that outputs depend on."""
    digest = hashlib.sha256(json.dumps([1, *key, sizes]).encode()).hexdigest()[:24]
    return OutputStore(cache / f"outputs-{digest}", sizes)


def fill(
    store: OutputStore,
    compute: Callable[[int], UInt16[np.ndarray, "_h _w 3"]],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compute what is missing, image by image; an interrupted call loses one image at most.

    Raises:
        SparkirError: the disk has no room; nothing is computed then.
    """
    needed, free = store.missing_bytes(), shutil.disk_usage(store.folder).free
    if needed > free:
        raise store._unwritable(OSError(f"only {free:,} bytes are free"))
    for index in store.missing():
        store.write(index, compute(index))
        progress(len(store) - len(store.missing()), len(store))
