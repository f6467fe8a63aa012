"""Which result belongs to which picture, and how names are shown."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparkir.data.images import SUFFIXES, find_images
from sparkir.errors import SparkirError


@dataclass(frozen=True)
class Job:
    """One picture to restore."""

    source: Path
    result: Path


def shown(text: object) -> str:
    """A path or a message with nothing in it that could steer a terminal or break a line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in str(text)
    )


def find_jobs(
    source: Path,
    target: Path,
    suffix: str | None,
    *,
    is_result: Callable[[Path], bool] = lambda _: False,
) -> list[Job]:
    """Pair the pictures that `source` means with files in or at `target`.

    `source` is a file, a folder (the pictures directly in it) or a pattern such as
    ``photos/**/*.jpg``, below whose fixed part folders are kept. Hidden files, and what lies in
    `target` already, are no sources of a folder or pattern; where `target` is that folder itself,
    what an earlier run made there is none. Results get the name of their source with `suffix`
    (None: .png).

    Raises:
        SparkirError: there are no pictures, two would get one name, a result would replace a
            source or lie outside `target`, or `target` cannot be used.
    """
    if source.is_dir():
        jobs = _in_folder(find_images(source), source, target, suffix, is_result)
    elif source.exists() or not glob.has_magic(str(source)):
        jobs = [_single(source, target, suffix)]
    else:
        jobs = _in_folder(_matching(source), _fixed_part(source), target, suffix, is_result)
    _require_distinct(jobs)
    _require_harmless(jobs, target)
    return jobs


def _single(source: Path, target: Path, suffix: str | None) -> Job:
    if not source.exists():
        raise SparkirError(f"no image or folder at {shown(source)}; check the path")
    if target.suffix and not target.is_dir():
        if suffix is not None:
            raise SparkirError(f"{shown(target)} names its format itself; leave out --format")
        return Job(source, target)
    if target.exists() and not target.is_dir():
        raise SparkirError(f"{shown(target)} is no folder; give a folder, or a name such as x.png")
    return Job(source, target / f"{source.stem}{suffix or '.png'}")


def _in_folder(
    images: list[Path],
    base: Path,
    target: Path,
    suffix: str | None,
    is_result: Callable[[Path], bool],
) -> list[Job]:
    if (target.exists() and not target.is_dir()) or target.suffix.lower() in SUFFIXES:
        raise SparkirError(f"{shown(target)} is a file; for a folder of images give a folder")
    inside = target.resolve()
    if inside == base.resolve():  # beside their sources
        fresh = [image for image in images if not is_result(image)]
    else:
        fresh = [image for image in images if not _lies_in(image.parent, inside)]
    if not fresh:
        raise SparkirError(f"all images are in {shown(target)} already; choose another OUT")
    return [
        Job(image, target / image.relative_to(base).parent / f"{image.stem}{suffix or '.png'}")
        for image in fresh
    ]


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard; one that exists as written is none."""
    parts = pattern.parts
    for count, part in enumerate(parts):
        if glob.has_magic(part) and not Path(*parts[: count + 1]).is_dir():
            return Path(*parts[:count])
    return pattern


def _matching(pattern: Path) -> list[Path]:
    base = _fixed_part(pattern)
    wild = pattern.parts[len(base.parts) :]
    if ".." in wild:
        raise SparkirError(f"{shown(pattern)} goes up again after a wildcard; write it without ..")
    try:
        found = sorted(base.glob(str(Path(*wild))))
    except (OSError, ValueError) as error:
        raise SparkirError(f"cannot use the pattern {shown(pattern)}: {error}") from error
    images = [
        path
        for path in found
        if path.suffix.lower() in SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(base).parts)
    ]
    if not images:
        raise SparkirError(f"no images match {shown(pattern)}; is the pattern in quotes?")
    return images


def _require_distinct(jobs: list[Job]) -> None:
    seen: dict[Path, Job] = {}
    for job in jobs:
        first = seen.setdefault(job.result, job)
        if first is not job:
            raise SparkirError(
                f"{shown(first.source)} and {shown(job.source.name)} are both named "
                f"{shown(job.source.stem)!r}; rename or remove one"
            )


def _require_harmless(jobs: list[Job], target: Path) -> None:
    sources = {identity for job in jobs if (identity := _identity(job.source))}
    inside = target.resolve()
    for job in jobs:
        result = job.result
        identity = _identity(result)
        if identity is not None and identity in sources:
            own = identity == _identity(job.source)
            replaced = "the image it is made from" if own else "another of the images"
            raise SparkirError(f"{shown(result)} would replace {replaced}; choose another OUT")
        if identity is not None and not result.is_file():
            raise SparkirError(f"{shown(result)} is no file to be replaced; choose another OUT")
        if result != target and not _lies_in(result.parent, inside):
            raise SparkirError(
                f"{shown(result.parent)} leads out of {shown(target)}; choose another OUT"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """What a path leads to; None if to nothing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder)
