"""The event stream: one JSON object a line, in `events.jsonl`, written as things happen."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparkir.data.codec import one_line
from sparkir.errors import SparkirError


def _not_writable(path: Path, error: OSError) -> SparkirError:
    return SparkirError(
        f"cannot write the event stream {path}: {one_line(error)}; free some space, and go on with "
        "the run"
    )


class EventLog:
    """Appends events to a file; a line is either whole or, after a kill, the last one."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, after its last whole line.

        Raises:
            SparkirError: it cannot be opened.
        """
        try:
            _drop_cut_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _not_writable(path, error) from error
        self._path = path

    def __call__(self, event: dict[str, Any]) -> None:
        """Append one event with the time of day in seconds.

        Raises:
            SparkirError: the disk is full.
        """
        line = to_json({"time_s": round(time.time(), 3)} | event)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise _not_writable(self._path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk was told when the event was written
            self._file.close()


def _drop_cut_line(path: Path) -> None:
    """Remove what follows the last line break, or the next event would be joined to it."""
    if path.is_file():
        with path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def to_json(values: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON for every program: it has no infinity, which is null (the PSNR of equal images)."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file; a last line that a kill cut off is left out.

    Raises:
        SparkirError: the file cannot be read, or a line of it is no event.
    """
    return EventTail(path).read()


def _event(line: bytes, path: Path) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise SparkirError(f"{path} is damaged: {error}") from error
    if not isinstance(event, dict) or "kind" not in event:
        raise SparkirError(f"{path} is no event stream of sparkir's: a line has no kind")
    return event


def training_folder(name: str) -> str:
    """The name of a training, such as `SPARK (paper)`, as that of a folder: `spark-paper`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class EventTail:
    """Reads a stream that may be growing, from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0

    def read(self) -> list[dict[str, Any]]:
        """The events written since the last call, whole lines only.

        Raises:
            SparkirError: the stream is gone, or a line of it is no event.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except OSError as error:
            raise SparkirError(f"cannot read the event stream {self.path}: {error}") from error
        new = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(new)
        return [_event(line, self.path) for line in new.splitlines()]
