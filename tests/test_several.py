"""The command under torchrun, with two processes on the CPU."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from helpers import call, write_recipe
from sparkir.report.events import read_events

pytest_plugins = ["helpers"]
pytestmark = pytest.mark.skipif(
    find_spec("lightning_fabric") is None, reason="needs lightning-fabric, of sparkir[distributed]"
)

IN_FLOAT = ("quant", "baselines")
LONG = {"train.steps": 150, "train.evaluate_every": 2, "train.checkpoint_every": 1000}


def start(*arguments: str) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch.append("--shutdown-timeout=600")  # the machine may be busy
    return subprocess.Popen(
        [*launch, "-m", "sparkir", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_step(process: subprocess.Popen[str], events: Path, step: int) -> None:
    deadline = time.monotonic() + 1800
    while time.monotonic() < deadline and process.poll() is None:
        if events.is_file():
            steps = [event["step"] for event in read_events(events) if event["kind"] == "step"]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no step {step}: {process.communicate()}")


def test_two_processes_stop_together_and_one_goes_on(project):
    write_recipe(project / "tiny.toml", LONG, without=IN_FLOAT)
    process = start("distill", "tiny.toml", "--out", "run")
    events = project / "run/events.jsonl"
    wait_for_step(process, events, 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=1800)
    assert out.count("run folder run;") == 1, out
    assert err.count("stopped and saved; go on with --resume --out run\n") == 1, err
    assert "find_unused_parameters" not in err
    assert not (project / "run/student.safetensors").exists()

    seen = read_events(events)
    assert seen[0]["processes"] == 2
    stopped = seen[-1]["step"]
    assert seen[-1] == {"time_s": seen[-1]["time_s"], "kind": "checkpoint"} | {
        "step": stopped,
        "path": "last.pt",
    }
    assert [e["step"] for e in seen if e["kind"] == "step"] == list(range(1, stopped + 1))
    assert [e["step"] for e in seen if e["kind"] == "evaluation"] == [*range(2, stopped + 1, 2)]
    (checkpoint,) = project.rglob("last.pt")
    saved = torch.load(checkpoint, weights_only=True)
    assert 5 <= saved["step"] == stopped < 150

    said = call("distill", "tiny.toml", "--out", "run", "--resume")
    assert said.code == 0, said
    (resumed,) = [e for e in read_events(events) if e["kind"] == "resumed"]
    assert resumed["step"] == stopped
    assert (project / "run/student.safetensors").is_file()


def test_a_mistake_is_said_once_and_leaves_nothing(project):
    process = start("distill", "tiny.toml", "--out", "run", "--set", "data.batch=3")
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 1
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert said == [
        "error: data.batch = 3 cannot be shared equally by 2 processes; set it to 2 or 4, or start "
        "another number of processes"
    ]
    assert "Traceback (most recent call last)" not in err.partition("torch/distributed")[0]
    assert not (project / "run").exists()
