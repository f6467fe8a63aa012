"""Everything a run is made of at one moment, in one object: saved whole, restored bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel

from sparkir.data.ahead import SampledAhead
from sparkir.data.atomic import atomic_file
from sparkir.data.pairs import PatchSampler
from sparkir.distill.method import Method
from sparkir.errors import SparkirError

FORMAT = 1


@dataclass(kw_only=True)
class TrainState:
    """A run at the end of `step` steps."""

    student: nn.Module
    weighting: nn.Module
    method: Method
    """What the distillation method trains or remembers besides the student."""
    optimizer: optim.Optimizer
    sampler: PatchSampler | SampledAhead
    average: AveragedModel | None = None
    """The exponential moving average of the student, if one is kept."""
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Step and PSNR of the best evaluation so far."""
    began_with: dict[str, str] = field(default_factory=dict)
    """Student or teacher -> a hash of the weights that the run was given."""

    def state_dict(self) -> dict[str, Any]:
        """All of it, random generators included, as tensors and plain values."""
        return {
            "format": FORMAT,
            "student": self.student.state_dict(),
            "weighting": self.weighting.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "step": self.step,
            "best": dict(self.best),
            "began_with": dict(self.began_with),
            "random": _random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved run.

        Raises:
            SparkirError: the state is of other images, or of another version of this format.
        """
        if state.get("format") != FORMAT:
            raise SparkirError(
                f"the checkpoint has format {state.get('format')}, this version reads {FORMAT}; "
                "start a new run"
            )
        for role, known in state.get("began_with", {}).items():
            if self.began_with.get(role, known) != known:
                raise SparkirError(
                    f"the weights of the {role} are not those that this run began with; put the "
                    "old ones back, or start a new run with another --out"
                )
        self.student.load_state_dict(state["student"])
        self.weighting.load_state_dict(state["weighting"])
        self.method.load_state_dict(state.get("method", {}))  # older files: plain distillation
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        if (self.average is None) != (state["average"] is None):
            raise ValueError("only one of the two keeps a moving average")
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.best = state["step"], dict(state["best"])
        _restore_random_state(state["random"])

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all; an older checkpoint stays until then.

        Raises:
            SparkirError: the file cannot be written, as when the disk is full.
        """
        try:
            with atomic_file(path) as file:
                torch.save(self.state_dict(), file)
        except (OSError, RuntimeError) as error:
            raise SparkirError(
                f"cannot write the checkpoint {path}: {error}; free some space and go on with "
                "--resume"
            ) from error

    def load(self, path: Path) -> None:
        """Become what `save` wrote.

        Raises:
            SparkirError: the file is damaged or belongs to another run.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch names no common class for damaged files
            raise SparkirError(
                f"cannot read the checkpoint {path} ({type(error).__name__}); "
                "delete it to start over"
            ) from error
        try:
            self.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise SparkirError(f"the checkpoint {path} is of another run: {error}") from error


def _random_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's global generators, as plain values and tensors."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        # Of the GPU that this process trains on; those of other processes are in the same state.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
