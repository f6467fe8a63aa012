"""The memory that a contender needs, measured in a fresh interpreter.

A child process imports the engine, notes what it holds, opens the file, runs one input and reports
by how much it grew at its peak. On Linux that peak is VmHWM: `ru_maxrss` starts at the parent's own
peak there, and would hide a small child behind a large parent. Elsewhere it is `ru_maxrss`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparkir.deploy.contenders import Contender, open_contender, reason_of

_MIB = 2**20
_IMPORTS = {"executorch": ("sparkir.deploy.executorch", "executorch.exir", "executorch.runtime")}
"""Where importing the engine takes more than its name."""
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Peak:
    """What a child process found."""

    mib: float | None
    """Memory of opening the file and running it once, beyond the imported engine; None where the
    system does not say."""
    failure: str = ""
    """Why it did not run."""


def example(shape: tuple[int, ...], white: float) -> np.ndarray:
    """Noise of `shape` in [0, white], always the same."""
    return np.random.default_rng(0).random(shape, dtype=np.float32) * np.float32(white)


def peak_of(
    contender: Contender, shape: tuple[int, ...], *, white: float = 1.0, threads: int
) -> Peak:
    """Open `contender` in a child process and run an input of `shape` (1, C, H, W) once."""
    task = {
        "contender": dataclasses.asdict(contender),
        "shape": shape,
        "white": white,
        "threads": threads,
    }
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if child.returncode < 0:
        return Peak(None, f"killed by signal {-child.returncode}, as for want of memory")
    lines = child.stdout.splitlines() if child.returncode == 0 else []
    if not lines:
        said = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Peak(None, f"its process stopped: {said}")
    return Peak(**json.loads(lines[-1]))


def _measured(task: dict[str, Any]) -> Peak:
    """The child's part."""
    contender = Contender(**task["contender"])
    image = example(tuple(task["shape"]), task["white"])
    try:
        for name in _IMPORTS.get(contender.engine, (contender.engine,)):
            importlib.import_module(name)
        before = _start()
        open_contender(contender, threads=task["threads"])(image)
    except Exception as error:  # noqa: BLE001 - each engine raises its own
        return Peak(None, reason_of(error))
    after = _highest()
    if before is None or after is None:
        return Peak(None)
    return Peak(max(0, after - before) / _MIB)


def _start() -> int | None:
    """Bytes held now; where the system can forget its old peak, it does."""
    if not _STATUS.is_file():
        return _highest()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _highest()
    return _status("VmRSS")


def _highest() -> int | None:
    """Bytes held at the peak."""
    if _STATUS.is_file():
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _status(field: str) -> int | None:
    for line in _STATUS.read_text("ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(_measured(json.load(sys.stdin)))) + "\n")
