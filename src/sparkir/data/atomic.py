"""Files and folders that appear whole or not at all.

Everything is first written under a temporary name beside its final place, flushed to the disk and
then renamed, which the operating system does in one step. A reader therefore never sees half a
file, and a killed process leaves only a hidden ``*.partial`` behind.
"""

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")
_ABANDONED_AFTER_S = 3600.0  # a process that still writes touches its folder far more often


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new binary file that takes the place of ``path`` only when the block succeeds.

    Missing parent folders are made. When the block raises, an older ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    partial = _partial_beside(path)
    try:
        with synced_file(partial) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to be filled, which is renamed to ``folder`` when the block succeeds.

    If another process finishes the same folder first, its result stays and ours is dropped: for
    folders named by their content either one is right. Files inside should be written with
    `synced_file`, so that the rename cannot reach the disk before they do.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    partial = _partial_beside(folder)
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir() or not any(folder.iterdir()):  # a link, a mount point
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # already gone after the rename


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing, whose bytes are on the disk when the block ends."""
    with path.open("x+b") as file:  # read, too: writers of TIFF go back
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def held(path: Path, *, wait: bool) -> Iterator[BinaryIO]:
    """Hold a file, made if there is none, against other processes for the length of a block.

    The operating system lets go of it when the process ends, however it does. Where it knows no
    such locks, nobody is kept out.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    with path.open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


def remove_partials(folder: Path) -> None:
    """Delete what killed processes left anywhere in a folder, which nobody else may work in."""
    for partial in [path for path in folder.rglob(".*.partial") if is_partial(path)]:
        _remove(partial)


def is_partial(path: Path) -> bool:
    """Whether something is called as what is not finished here; other programs have such, too."""
    return _PARTIAL.fullmatch(path.name) is not None


def _partial_beside(path: Path) -> Path:
    # Not tempfile: that makes private files (0600), and the result should obey the user's umask.
    return path.with_name(f".{uuid.uuid4().hex}.partial")


def _remove_abandoned(parent: Path) -> None:
    """Delete the leftovers of killed processes, and only those: a live one may be at work."""
    for partial in parent.glob(".*.partial"):
        if not is_partial(partial):
            continue
        with suppress(OSError):  # its owner finished meanwhile, or is somebody else
            touched = max(path.stat().st_mtime for path in (partial, *partial.glob("*")))
            if time.time() - touched > _ABANDONED_AFTER_S:
                _remove(partial)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
