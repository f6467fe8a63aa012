"""The event stream as progress bars: in a terminal, and under the cell of a notebook."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_STOP = (signal.SIGINT, signal.SIGTERM)  # the latter from torchrun and from job schedulers
_PER_SECOND = 4


class Display:
    """Shows events as progress bars and lines: the `report` of whatever takes long."""

    def __init__(self, progress: Progress, warnings: Console) -> None:
        """Draw bars in `progress`, and print warnings to `warnings`."""
        self.progress, self.warnings = progress, warnings
        self.task: TaskID | None = None
        self.psnr = ""
        self.training = self.stop = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event, if it is of a kind that is shown."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def _on_decoding(self, event: dict[str, Any]) -> None:
        self._show("reading images", event["done"], event["total"])

    def _on_teacher(self, event: dict[str, Any]) -> None:
        self._show(None, event["done"], event["total"])

    def _on_stage(self, event: dict[str, Any]) -> None:
        self.finish()
        self.psnr = ""
        self.training = event["name"].startswith("train")
        name = escape(event["name"])
        self.task = self.progress.add_task(name, total=event["steps"] or None, note="")

    def _on_resumed(self, event: dict[str, Any]) -> None:
        self._show(None, event["step"], None)

    def _on_step(self, event: dict[str, Any]) -> None:
        self._show(None, event["step"], None, f"loss {event['loss']:.5f} {self.psnr}")

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self.psnr = f"PSNR {event['psnr_db']:.2f} dB"

    def _on_row(self, event: dict[str, Any]) -> None:
        self._show(None, event["done"], event["total"], event["name"])

    def _on_restored(self, event: dict[str, Any]) -> None:
        self._show("restoring", event["done"], event["total"], event["name"])

    def _on_tile(self, event: dict[str, Any]) -> None:
        note = f"{event['name']}: tile {event['part']} of {event['parts']}"
        self._show("restoring", event["done"], event["total"], note)

    def _on_warning(self, event: dict[str, Any]) -> None:
        text = f"[yellow]warning:[/] {escape(event['message'])}"
        self.warnings.print(text, highlight=False, soft_wrap=True)

    def _show(self, name: str | None, done: int, total: int | None, note: str = "") -> None:
        if self.task is None:
            self.task = self.progress.add_task(name or "", total=total, note="")
        options: dict[str, Any] = {"completed": done, "note": escape(note)}
        if total is not None:
            options["total"] = total
        self.progress.update(self.task, **options)
        if name is not None and done == total:
            self.finish()

    def finish(self) -> None:
        """Stop the running bar."""
        if self.task is not None:
            if self.progress.tasks[self.progress.task_ids.index(self.task)].total is None:
                self.progress.update(self.task, total=1, completed=1)  # or it would look busy
            self.progress.stop_task(self.task)
            self.task = None

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """While training, a first Ctrl-C or SIGTERM asks for a stop after the step.

        A second one insists.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stop or not self.training:
                raise KeyboardInterrupt
            self.stop = True

        before = {number: signal.signal(number, handle) for number in _STOP}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class CellDisplay(Display):
    """The same for many trainings, perhaps several at once: a bar for each, and one for all."""

    def __init__(self, progress: Progress, warnings: Console) -> None:
        """See `Display`."""
        super().__init__(progress, warnings)
        self.cells: dict[str, TaskID] = {}
        self.overall: TaskID | None = None
        self.warned: set[str] = set()

    def _on_cells(self, event: dict[str, Any]) -> None:
        self.finish()
        self.training = True
        self.overall = self.progress.add_task(
            "comparison", completed=event["done"], total=event["total"], note=""
        )

    def _on_cell(self, event: dict[str, Any]) -> None:
        name = escape(event["cell"])
        self.cells[event["cell"]] = self.progress.add_task(name, total=event["steps"], note="")

    def _on_stage(self, event: dict[str, Any]) -> None:
        if not event["name"].startswith("train"):  # which is what the bar is of
            self._note(event, event["name"])

    def _on_teacher(self, event: dict[str, Any]) -> None:
        self._note(event, f"teacher on image {event['done']} of {event['total']}")

    def _on_resumed(self, event: dict[str, Any]) -> None:
        self._note(event, "", completed=event["step"])

    def _on_step(self, event: dict[str, Any]) -> None:
        self._note(event, f"loss {event['loss']:.5f}", completed=event["step"])

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self._note(event, f"PSNR {event['psnr_db']:.2f} dB")

    def _on_scoring(self, event: dict[str, Any]) -> None:
        self._note(event, f"scoring {event['set']}")

    def _on_warning(self, event: dict[str, Any]) -> None:
        if event["message"] not in self.warned:  # by the same thing in another cell
            self.warned.add(event["message"])
            super()._on_warning(event)

    def _note(self, event: dict[str, Any], note: str, completed: int | None = None) -> None:
        task = self.cells.get(event.get("cell", ""))
        if task is not None:
            self.progress.update(task, note=escape(note), completed=completed)

    def _on_cell_done(self, event: dict[str, Any]) -> None:
        task = self.cells.pop(event["cell"], None)  # none if its process ended before it began
        if task is not None:
            self.progress.remove_task(task)
        if self.overall is not None:
            self.progress.advance(self.overall)
        if event["failed"]:
            self._on_warning({"message": f"{event['cell']} failed: {event['failed']}"})


@contextmanager
def follow(
    kind: Callable[[Progress, Console], Display] = Display,
    *,
    out: Console | None = None,
    err: Console | None = None,
) -> Iterator[Display]:
    """Show what a long call tells, in a terminal or a notebook. ::

        with follow() as shown:
            run.distill(recipe, folder, report=shown)

    Args:
        kind: of display.
        out: where bars go; standard output unless given.
        err: where warnings go; `out` unless given.
    """
    out = out or Console(emoji=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bars = _UnderCell if out.is_jupyter else Progress
    with bars(*columns, console=out, refresh_per_second=_PER_SECOND) as progress:
        shown = kind(progress, err or out)
        yield shown
        shown.finish()


class _UnderCell(Progress):
    """One output under a notebook's cell, which is replaced: what is saved is its last state.

    rich's own way needs ipywidgets, whose output is not in the saved notebook.
    """

    _handle: Any = None
    _next_s = 0.0

    def start(self) -> None:
        """Make the output."""
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]

        self._handle = display(self, display_id=True)

    def stop(self) -> None:
        """Show how it ended."""
        self._handle.update(self)

    def refresh(self) -> None:
        """Replace the output, unless that was just done."""
        if self._handle is not None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 1 / _PER_SECOND
            self._handle.update(self)

    def update(self, task_id: TaskID, **changes: Any) -> None:  # noqa: ANN401
        """No thread redraws this one, so every change may."""
        super().update(task_id, **changes)
        self.refresh()
