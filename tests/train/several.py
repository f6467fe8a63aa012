"""What each of several processes does in `test_distribute.py`: torchrun starts it, in a folder.

Trains every kind of run from the start, up to where it is stopped, and on from where a process
alone was stopped, and writes what it saw.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from small_run import Run, small_run
from torch import nn

from sparkir.errors import SparkirError
from sparkir.spark.batch import normal, of_all
from sparkir.train.distribute import Devices, start
from sparkir.train.loop import Interrupted

STEPS, STOPPED = 8, 4
COMMON = {"steps": STEPS, "batch": 4, "log_every": 1, "checkpoint_every": 1000}
KINDS: dict[str, dict[str, Any]] = {
    "QAT": {"distill": False, "bits": 8},
    "KD": {"bits": 4, "ema": 0.5},
    "spark-paper": {
        "source": "spark-paper",
        "bits": 8,
        "options": {"reward_every": 2, "learning_rate": 1e-2},
        "clip_norm": 0.05,
    },
    "spark": {
        "source": "spark",
        "bits": 8,
        "options": {"reward_every": 2, "learning_rate": 1e-2},
    },
    "spark, the preset": {
        "source": "spark",
        "norm": "matched",
        "target": "both",
        "options": {"reward_every": 2, "learning_rate": 1e-2},
    },
    "random": {"source": "random"},
    "fixed": {"source": "fixed:student_error", "optimizer": "adamw"},
}


def made(folder: Path, kind: str, devices: Devices | None = None, seed: int = 0) -> Run:
    run = small_run(folder, **COMMON, **KINDS[kind], devices=devices, seed=seed)
    if kind == "random":  # a network of the user's own may have weights that it never uses
        spare = nn.Parameter(torch.ones(3))
        run.task.student.register_parameter("spare", spare)
        run.state.optimizer.param_groups[0]["params"].append(spare)
    return run


def stopped(run: Run, *, asks: bool) -> Run:
    """Train until one process, if it `asks`, has taken half of the steps."""
    calls = iter(range(1, STEPS))
    try:
        run.train(lambda: next(calls) == STOPPED and asks)
    except Interrupted:
        return run
    raise AssertionError("it was asked to stop")


def same_in_all(run: Run, devices: Devices) -> bool:
    """Whether the processes hold the same weights, statistics and generators, bit for bit."""
    values = {k: v for k, v in run.values().items() if k != "sampler"}
    text = repr(values) + repr([p.double().sum().item() for p in run.task.parameters()])
    first = devices.gather(text + run.state.sampler.state_dict()["rng"])
    return len(set(first)) == 1


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_printoptions(precision=10, threshold=100_000)
    devices = start("auto")
    assert devices.ranks == 2
    found: dict[str, Any] = {}
    for kind in KINDS:
        whole = made(folder / kind / "two", kind, devices).train()
        half = stopped(made(folder / kind / "two-half", kind, devices), asks=devices.rank == 1)
        resumed = made(folder / kind / "one-half", kind, devices, seed=devices.rank + 5).resume()
        resumed.train()
        found[kind] = {
            "events": whole.events,
            "stopped": half.state.step,
            "resumed": resumed.events,
            "alike": [same_in_all(run, devices) for run in (whole, half, resumed)],
        }
    torch.manual_seed(3)
    found["normal"] = of_all(normal((2, 3), device=torch.device("cpu"))).tolist()
    found["errors"] = devices.gather([error_of(devices, only) for only in (None, 0, 1)])
    if devices.first:
        (folder / "found.json").write_text(json.dumps(found))


def error_of(devices: Devices, only: int | None) -> str:
    """What a process raises when all, or only one of them, made a mistake."""
    try:
        with devices.in_turn():
            if only in (None, devices.rank):
                raise SparkirError(f"mistake {devices.rank}")
    except (SparkirError, SystemExit) as error:
        return repr(error)
    return "went on"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
