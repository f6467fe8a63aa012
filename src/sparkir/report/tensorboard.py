"""TensorBoard's files from a run's event stream, afterwards or while it grows."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkir.errors import SparkirError
from sparkir.report.events import EventTail, training_folder
from sparkir.report.scalars import Figures, Restart, Trainings

if TYPE_CHECKING:
    from torch.utils.tensorboard import FileWriter

FOLDER = "tensorboard"
"""In the run's folder, so that `tensorboard --logdir runs` finds every run's."""
_GROUPS = {"step": "train", "policy": "policy", "evaluation": "evaluation"}


def require_tensorboard() -> None:
    """Raise SparkirError if it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise SparkirError(
            "TensorBoard's files need its package; pip install 'sparkir[tensorboard]'"
        )


class TensorBoardLog:
    """Writes figures below a folder, each training into one of its own, so that curves overlap."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before the first figure.

        Raises:
            SparkirError: TensorBoard is not installed.
        """
        require_tensorboard()
        self.folder = folder
        self.written = 0
        """How many events have had figures."""
        self.done = False
        """Whether the run has said so."""
        self._trainings = Trainings()
        self._writers: dict[str, FileWriter] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write what an event of the stream says, at its own time."""
        self.done = event["kind"] == "done"  # a resume goes on after it
        for item in self._trainings.read(event):
            writer = self._writer(item.training)
            if isinstance(item, Restart):
                self._forget_after(item, writer)
            else:
                self._write(item, writer)

    def _write(self, item: Figures, writer: FileWriter) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in item.values.items():
            summary = scalar(f"{_GROUPS[item.kind]}/{name}", value)
            writer.add_summary(summary, item.step, item.time_s)
        self.written += 1

    def _forget_after(self, item: Restart, writer: FileWriter) -> None:
        """Readers drop what they have of the steps that come again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        started = Event(session_log=SessionLog(status=SessionLog.START))
        writer.add_event(started, item.step + 1, item.time_s)

    def _writer(self, training: str) -> FileWriter:
        if training not in self._writers:
            from torch.utils.tensorboard import FileWriter

            self._writers[training] = FileWriter(str(self.folder / training_folder(training)))
        return self._writers[training]

    def flush(self) -> None:
        """Let readers see what was written."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Write what is left."""
        for writer in self._writers.values():
            writer.close()


def write_tensorboard(
    runs: Sequence[Path],
    *,
    follow: bool = False,
    seen: Callable[[int], object] = lambda written: None,
    poll_s: float = 1.0,
) -> None:
    """Make the folder `FOLDER` of each run again, from all that it has logged.

    Args:
        runs: folders with an event stream, which may be growing.
        follow: go on until every run is done, instead of once.
        seen: told after each look how many events have had figures.
        poll_s: seconds between two looks.

    Raises:
        SparkirError: TensorBoard is not installed, or the files cannot be written.
    """
    require_tensorboard()
    try:
        for run in runs:  # kept, the same figures would be there twice
            if (run / FOLDER).exists():
                shutil.rmtree(run / FOLDER)
        with ExitStack() as held:
            logs = [held.enter_context(closing(TensorBoardLog(run / FOLDER))) for run in runs]
            tails = [EventTail(run / "events.jsonl") for run in runs]
            while True:
                for tail, log in zip(tails, logs, strict=True):
                    _catch_up(tail, log)
                seen(sum(log.written for log in logs))
                if not follow or all(log.done for log in logs):
                    break
                time.sleep(poll_s)
    except OSError as error:
        raise SparkirError(f"cannot write TensorBoard's files: {error}") from error


def _catch_up(tail: EventTail, log: TensorBoardLog) -> None:
    """Write what was logged since the last look, and let readers see it."""
    for event in tail.read():
        log(event)
    log.flush()
