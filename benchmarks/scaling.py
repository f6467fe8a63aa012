"""What a step costs when several processes share its batch, against the model in docs/scaling.md.

    python benchmarks/scaling.py                       # two processes on this machine's CPU
    python benchmarks/scaling.py --processes 8 --device cuda --json result.json

The processes train on their own with their share of the batch, all of them at once, and together,
in turn, round after round. The difference is what sharing costs. The model predicts it from the
time that a mean over the processes takes, measured by itself for several sizes. Times are the
fastest of many, the least disturbed by other work on the machine. EDSR-baseline x4, one thread to a
process on the CPU.
"""

import argparse
import contextvars
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import numpy as np
import torch

from sparkir.data.degrade import bicubic_resize
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.distill.task import DistillationTask
from sparkir.models.registry import build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.spec import QuantSpec
from sparkir.spark.weighting import weighting
from sparkir.train.distribute import Devices, start
from sparkir.train.loop import LoopSettings, train
from sparkir.train.optimize import build_average, build_optimizer
from sparkir.train.state import TrainState

METHODS = {"QAT": "", "KD": "uniform", "SPARK (paper)": "spark-paper"}
SIZES_BYTES = (4, 65_536, 1_048_576, 8_388_608)
PERIOD = 8  # steps between two rewards of `spark-paper`


def pairs() -> PairStore:
    rng = np.random.default_rng(0)
    lq = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(4)]
    gt = [bicubic_resize(image, scale=4) for image in lq]
    return PairStore(names=list("abcd"), gt=gt, lq=lq, scale=4)


def step_times(name: str, devices: Devices, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fastest step of each kind: one that rewards the policy, and any other."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    share = arguments.batch // arguments.processes
    student = build("edsr", scale=4).to(device)
    student = prepare(student, QuantSpec())
    crops = torch.rand(4, 3, arguments.patch, arguments.patch, device=device) * 255
    calibrate(student, [crops])
    learning = METHODS[name] == "spark-paper"
    options = {"reward_every": PERIOD} if learning else {}
    source = weighting(METHODS[name] or "uniform", **options).to(device)
    teacher = build("edsr", scale=4, width=32).to(device) if METHODS[name] else None
    task = DistillationTask(student, teacher, weighting=source)
    optimizer = build_optimizer(
        student, name="adam", learning_rate=1e-5, grid_learning_rate=1e-5, weight_decay=0.0
    )
    sampler = PatchSampler(
        pairs(),
        patch_px=arguments.patch,
        batch=share * devices.ranks,
        seed=0,
        rank=devices.rank,
        ranks=devices.ranks,
    )
    state = TrainState(
        student=student,
        weighting=source,
        method=task.method,
        optimizer=optimizer,
        sampler=sampler,
        average=build_average(student, 0.0),
    )
    events: list[dict[str, Any]] = []
    settings = LoopSettings(steps=arguments.steps, log_every=1, checkpoint_every=10**9)
    with tempfile.TemporaryDirectory() as folder:
        train(
            task,
            state,
            settings,
            checkpoint=Path(folder) / "last.pt",
            evaluate=lambda network: 0.0,
            report=events.append,
            devices=devices,
        )
    took = {e["step"] - 1: e["step_s"] for e in events if e["kind"] == "step" and e["step"] > 2}
    found = {"plain": min(s for step, s in took.items() if step % PERIOD or not learning)}
    if learning:
        found["rewarding"] = min(s for step, s in took.items() if step % PERIOD == 0)
    return found


def exchange_times(devices: Devices, device: str) -> dict[int, float]:
    """Seconds of the fastest mean over the processes, by bytes."""
    found = {}
    for size in SIZES_BYTES:
        values = torch.ones(size // 4, device=device)
        times = []
        for _ in range(40):
            devices.wait()
            began = time.perf_counter()
            float(devices.mean(values)[0])
            times.append(time.perf_counter() - began)
        found[size] = min(times)
    return found


def work(arguments: argparse.Namespace) -> None:
    """What a started process does."""
    torch.set_num_threads(1)
    devices = start(arguments.device)
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {"alone": {}, "together": {}}
    for _ in range(arguments.rounds):
        for name in METHODS:
            devices.wait()
            apart = contextvars.Context()  # in which no batch is shared
            times = apart.run(step_times, name, Devices(), arguments)
            rounds["alone"].setdefault(name, []).append(times)
            devices.wait()
            together = step_times(name, devices, arguments)
            rounds["together"].setdefault(name, []).append(together)
    found: dict[str, Any] = {
        how: {
            name: {kind: min(one[kind] for one in all_times) for kind in all_times[0]}
            for name, all_times in methods.items()
        }
        for how, methods in rounds.items()
    }
    found["exchange"] = exchange_times(devices, arguments.device)
    network = build("edsr", scale=4)
    found["gradient_bytes"] = 4 * sum(p.numel() for p in network.parameters())
    if os.environ["RANK"] == "0":
        arguments.json.write_text(json.dumps(found))


def launched(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    count, result = str(arguments.processes), folder / "found.json"
    own = [str(Path(__file__).resolve()), "--work", "--json", str(result)]
    for name in ("processes", "batch", "patch", "steps", "rounds", "device"):
        own += [f"--{name}", str(getattr(arguments, name))]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    subprocess.run([sys.executable, *launch, *own], check=True)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def table(found: dict[str, Any]) -> str:
    alone, together = found["alone"], found["together"]
    exchange = {int(size): s for size, s in found["exchange"].items()}
    latency, largest = exchange[SIZES_BYTES[0]], SIZES_BYTES[-1]
    rate = largest / (exchange[largest] - latency)
    whole = latency + found["gradient_bytes"] / rate
    lines = [
        f"latency {1e3 * latency:.2f} ms, {rate / 1e9:.2f} GB/s; "
        f"gradients {found['gradient_bytes'] / 1e6:.1f} MB, {1e3 * whole:.1f} ms",
        "",
        "| step | alone, its share ms | model ms | measured ms | measured / model |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in METHODS:
        for kind, compute in alone[name].items():
            # Loss, stop and what was used; the log's two means, and W; difficulty maps; rewards.
            small = 5 + bool(METHODS[name]) + (METHODS[name] == "spark-paper")
            small += 4 * (kind == "rewarding")
            model = compute + (1 + (kind == "rewarding")) * whole + small * latency
            measured = together[name][kind]
            lines.append(
                f"| {name}, {kind} | {1e3 * compute:.1f} | {1e3 * model:.1f} | "
                f"{1e3 * measured:.1f} | {measured / model:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="of all processes together")
    parser.add_argument("--patch", type=int, default=16, help="LR pixels")
    parser.add_argument("--steps", type=int, default=10, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = launched(arguments, Path(folder))
    print(table(found))
    if arguments.json is not None:
        about = {"torch": torch.__version__, "python": platform.python_version(), "load": load}
        settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("json", "work")}
        result = {"settings": settings, "about": about} | found
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
