"""A run of a few milliseconds per step, and a way to compare two of them bit for bit.

Run as a script it trains in another process, to be killed there.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from sparkir.data.degrade import bicubic_resize
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.distill.method import Setting
from sparkir.distill.methods import method
from sparkir.distill.task import DistillationTask
from sparkir.models.edsr import EDSR
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.spec import QuantSpec
from sparkir.spark.distance import Norm
from sparkir.spark.weighting import weighting
from sparkir.train.distribute import Devices
from sparkir.train.loop import LoopSettings, train
from sparkir.train.optimize import build_average, build_optimizer
from sparkir.train.state import TrainState


def pairs(seed: int = 0) -> PairStore:
    """Three photographs of waves and noise, x2."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :56]
    gt = []
    for _ in range(3):
        waves = [np.sin(rng.uniform(0.05, 0.6) * x + rng.uniform(0.05, 0.6) * y) for _ in "rgb"]
        image = 128 + 80 * np.stack(waves, axis=2) + rng.normal(0, 6, (48, 56, 3))
        gt.append(np.clip(image, 0, 255).astype(np.uint8))
    lq = [bicubic_resize(image, scale=Fraction(1, 2)) for image in gt]
    return PairStore(names=list("abc"), gt=gt, lq=lq, scale=2)


@dataclass
class Run:
    """Everything `train` takes."""

    task: DistillationTask
    state: TrainState
    settings: LoopSettings
    checkpoint: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluate: Callable[[nn.Module], float] = lambda network: 1.0
    devices: Devices = field(default_factory=Devices)

    def train(self, stop_requested: Callable[[], bool] = lambda: False) -> "Run":
        train(
            self.task,
            self.state,
            self.settings,
            checkpoint=self.checkpoint,
            evaluate=self.evaluate,
            report=self.events.append,
            stop_requested=stop_requested,
            devices=self.devices,
        )
        return self

    def resume(self) -> "Run":
        if self.devices.first:
            self.state.load(self.checkpoint)
        self.devices.agree(self.state)
        return self

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def values(self) -> dict[str, Any]:
        """All of the state, and what each generator would draw next."""
        state = self.state.state_dict()
        state["next"] = {
            "torch": torch.rand(3).tolist(),
            "numpy": np.random.rand(),
            "python": random.random(),
        }
        return state


def small_run(
    folder: Path,
    *,
    source: str = "uniform",
    bits: int | None = None,
    ema: float = 0.0,
    steps: int = 12,
    seed: int = 0,
    distill: bool = True,
    options: dict[str, Any] | None = None,
    learning_rate: float = 1e-3,
    optimizer: str = "adam",
    name: str = "kd",
    norm: Norm = "mse",
    target: Literal["teacher", "truth", "both"] = "teacher",
    batch: int = 2,
    devices: Devices | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Run:
    """Put a run together; `seed` is of the student and all that is drawn, not of the teacher."""
    devices = devices or Devices()
    torch.manual_seed(1000)
    teacher = EDSR(scale=2, width=8, blocks=1)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    student: nn.Module = EDSR(scale=2, width=4, blocks=1)
    data = pairs()
    crops = PatchSampler(data, patch_px=12, batch=4, seed=seed + 1).next()[0].float()
    if bits is not None:
        student = prepare(student, QuantSpec(weight_bits=bits, activation_bits=bits))
        calibrate(student, [crops])
    student, teacher, crops = student.to(device), teacher.to(device), crops.to(device)
    weights = weighting(source, **(options or {})).to(device)
    setting = Setting(student=student, teacher=teacher, examples=[crops / 255], steps=steps)
    task = DistillationTask(
        student,
        teacher if distill else None,
        weighting=weights,
        method=method(name, setting),
        norm=norm,
        target=target,
    )
    state = TrainState(
        student=student,
        weighting=weights,
        method=task.method,
        optimizer=build_optimizer(
            student,
            name=optimizer,
            learning_rate=learning_rate,
            grid_learning_rate=2e-3,
            weight_decay=1e-4,
            beside=task.method.parameters(),
        ),
        sampler=PatchSampler(
            data, patch_px=8, batch=batch, seed=seed, rank=devices.rank, ranks=devices.ranks
        ),
        average=build_average(student, ema),
    )
    checkpoint = folder / "last.pt"
    return Run(task, state, LoopSettings(steps=steps, **settings), checkpoint, devices=devices)


def assert_same(a: Any, b: Any, place: str = "state") -> None:
    """Two nested values, bit for bit."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}.{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), place
    else:
        assert a == b, place


KILLED = {
    "source": "spark-paper",
    "bits": 4,
    "ema": 0.9,
    "steps": 40,
    "checkpoint_every": 1,
    "options": {"reward_every": 2},
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    small_run(Path(sys.argv[1]), **KILLED).train()
