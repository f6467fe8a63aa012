"""Several cells of a comparison at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from sparkir.assemble import Report
from sparkir.compare.cell import Cell
from sparkir.compare.methods import find
from sparkir.compare.workspace import Workspace
from sparkir.memory import keep_freed_memory
from sparkir.recipe import Recipe
from sparkir.train.loop import Interrupted

_LOOK_EVERY_S = 0.5
_Task = tuple[str, Recipe]
"""A method's name and the recipe with the seed: methods are functions, which do not travel."""


@dataclass(kw_only=True, eq=False)
class _Worker:
    """A process, the line to it, and what it is at."""

    process: SpawnProcess
    line: Connection
    cell: Cell | None = None


def run_parallel(
    cells: Sequence[Cell],
    workspace: Workspace,
    *,
    jobs: int,
    ready: Callable[[Cell, Sequence[Cell]], bool],
    done: Callable[[Cell, str], None],
    report: Report,
    stop_requested: Callable[[], bool],
) -> None:
    """Carry out cells in `jobs` processes, which share the cores.

    Args:
        cells: what to do, in the order of preference.
        workspace: its folder and test sets are those of every process.
        jobs: processes.
        ready: whether a cell can begin, given those that are not finished.
        done: called with each finished cell, and why it failed or "".
        report: receives the events of all cells.
        stop_requested: when true, every process saves and stops.

    Raises:
        Interrupted: `stop_requested` said so.
    """
    context = multiprocessing.get_context("spawn")
    stopping = context.Event()
    threads = max(1, torch.get_num_threads() // jobs)

    def hire() -> _Worker:
        ours, theirs = context.Pipe()
        arguments = (theirs, workspace.comparison, dict(workspace.sets), threads, stopping)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process=process, line=ours)

    left = list(cells)
    workers: list[_Worker] = []
    try:
        while left:
            if stop_requested():
                stopping.set()
            running = [worker.cell for worker in workers if worker.cell is not None]
            for cell in [c for c in left if c not in running and ready(c, left)]:
                if stopping.is_set() or len(running) == jobs:
                    break
                idle = next((w for w in workers if w.cell is None), None)
                if idle is None:
                    workers.append(idle := hire())
                idle.cell = cell
                idle.line.send((cell.method.name, cell.base))
                running.append(cell)
            if not running:
                break
            lines = {worker.line: worker for worker in workers if worker.cell is not None}
            for line in wait(list(lines), timeout=_LOOK_EVERY_S):
                worker = lines[line]  # type: ignore[index]
                assert worker.cell is not None
                message = _heard(worker)
                if message["kind"] != "finished":
                    report(message)
                    continue
                cell, worker.cell = worker.cell, None
                left.remove(cell)
                if not message["stopped"]:
                    done(cell, message["reason"])
                if message.get("lost"):
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.process.terminate() if worker.cell else worker.line.close()
        for worker in workers:
            worker.process.join()
    if stopping.is_set():
        raise Interrupted


def _heard(worker: _Worker) -> dict[str, Any]:
    """The next message of a worker; one that is gone has finished without a result."""
    try:
        message: dict[str, Any] = worker.line.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        why = f"its process ended with exit code {code}"
        if code == -signal.SIGKILL:
            why += ", as when memory runs out; try fewer --jobs"
        return {"kind": "finished", "stopped": False, "reason": why, "lost": True}
    return message


def _work(
    line: Connection, comparison: Path, sets: dict[str, str], threads: int, stopping: Event
) -> None:
    """What a worker does until nobody is at the other end of the line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    torch.set_num_threads(threads)
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def stop_requested() -> bool:
        return stopping.is_set() or not parent.is_alive()

    workspace = Workspace(comparison=comparison, sets=sets)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            name, base = line.recv()
            cell = Cell(method=find(name, base), seed=base.seed, base=base, comparison=comparison)
            reason, stopped = "", False
            try:
                reason = workspace.attempt(cell, line.send, stop_requested)
            except Interrupted:
                stopped = True
            line.send({"kind": "finished", "stopped": stopped, "reason": reason})
