"""A folder of pictures restored one after another: what is done, what is left, what failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparkir.errors import SparkirError
from sparkir.restore.engine import Engine
from sparkir.restore.naming import Job, find_jobs, shown
from sparkir.restore.network import Restorer
from sparkir.restore.pictures import MAX_PIXELS, mark_of, read_header, read_picture
from sparkir.restore.writing import (
    FullDiskError,
    format_of,
    require_exif,
    require_room,
    write_picture,
)

Report = Callable[[dict[str, Any]], None]
_MAKER = "sparkir restore"


@dataclass(frozen=True)
class Restored:
    """What a run over pictures came to."""

    made: list[Path] = field(default_factory=list)
    finished: list[Path] = field(default_factory=list)
    """Results of an earlier run that still hold."""
    failed: list[str] = field(default_factory=list)
    """One message for each picture that was left out."""


def restore_files(
    restorer: Restorer,
    source: Path,
    target: Path,
    report: Report,
    *,
    memory_bytes: int | None = None,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    suffix: str | None = None,
) -> Restored:
    """Restore a picture, a folder or a pattern of them; see `naming.find_jobs` for which and where.

    A result counts as finished, and is not made again, if the same model made it (its EXIF
    "software" says so) and it is newer than its source. Results of other models are replaced; any
    other file that is in the way is left alone unless `overwrite`. A picture that cannot be
    restored is left out and the others go on.

    Args:
        restorer: see `network.open_exported`.
        source: a file, a folder, or a pattern.
        target: a file for one picture, else a folder.
        report: told ``{"kind": "tile", "name", "part", "parts", "done", "total"}`` after each
            tile and ``{"kind": "restored", "name", "done", "total"}`` after each picture, where
            done and total count pictures; also ``{"kind": "warning", "message"}``.
        memory_bytes: see `Engine`.
        max_pixels: pictures of more are refused unread.
        overwrite: make everything again and replace whatever is there.
        suffix: the format of results in a folder; None for .png.

    Raises:
        SparkirError: nothing can be restored: see `find_jobs`, and the messages for a picture if
            it is the only one; or the disk is full.
    """
    jobs = find_jobs(
        source, target, suffix, is_result=lambda path: mark_of(path).startswith(_MAKER)
    )
    format_of(jobs[0].result)
    engine = Engine(restorer, memory_bytes)
    outcome = Restored()
    for done, job in enumerate(jobs):
        counted = {"name": shown(job.source.name), "total": len(jobs)}
        tell = partial(_tell, report, {"kind": "tile", "done": done, **counted}, restorer)
        try:
            if not overwrite and _is_finished(job, restorer):
                outcome.finished.append(job.result)
            else:
                _restore(engine, job, max_pixels, tell)
                outcome.made.append(job.result)
        except FullDiskError as error:
            made = f"{len(outcome.made)} of {len(jobs)} are restored"
            raise SparkirError(f"{error}; {made}, and the same command goes on") from error
        except SparkirError as error:
            if len(jobs) == 1:
                raise
            outcome.failed.append(f"{counted['name']}: {error}")
        report({"kind": "restored", "done": done + 1, **counted})
    return outcome


def _tell(report: Report, event: dict[str, Any], restorer: Restorer, part: int, parts: int) -> None:
    if part == 1 and parts > 1 and not restorer.facts.exact_tiles:
        message = (
            f"{event['name']} is restored in {parts} tiles, and {restorer.facts.name} looks at the "
            "whole picture: the result differs a little from that of one piece; more memory "
            "(--memory) makes fewer tiles"
        )
        report({"kind": "warning", "message": message})
    report({**event, "part": part, "parts": parts})


def _restore(engine: Engine, job: Job, max_pixels: int, tell: Callable[[int, int], None]) -> None:
    """One picture from file to file; what can be refused from its header is refused first."""
    header = read_header(job.source, max_pixels=max_pixels)
    height, width, channels = header.shape
    scale = engine.restorer.facts.scale
    require_room(job.result, (scale * height, scale * width, channels), header.itemsize)
    engine.left_for_tiles(header.shape, header.itemsize)
    picture = read_picture(job.source, max_pixels=max_pixels)
    mark = mark_for(engine.restorer)
    require_exif(job.result, picture.exif, mark)
    restored = picture.with_pixels(engine(picture.pixels, tell))
    del picture
    write_picture(job.result, restored, mark)


def mark_for(restorer: Restorer) -> str:
    """What a result says of the software that made it."""
    return f"{_MAKER} {restorer.identity}"


def _is_finished(job: Job, restorer: Restorer) -> bool:
    """Whether the result is there, by this model, and newer than its source.

    Raises:
        SparkirError: there is a file that sparkir did not make.
    """
    if not job.result.exists():
        return False
    mark = mark_of(job.result)
    if not mark.startswith(_MAKER):
        raise SparkirError(
            f"{shown(job.result)} is there already and was not made by sparkir; "
            "choose another OUT, or replace it with --overwrite"
        )
    if mark != mark_for(restorer):
        return False
    try:
        return job.result.stat().st_mtime_ns > job.source.stat().st_mtime_ns
    except OSError:  # reading the source will say what is wrong
        return False
