"""How many operations a training step's passes are: what they cost a GPU that waits for each.

    python benchmarks/count_operations.py > records/training-speed/operations.md

A kernel of `quant.fused` counts as one; what only looks at memory in another way does not count. Of
EDSR-baseline x4 in bfloat16, float and W8A8, without losses and optimizer.
"""

# ruff: noqa: ANN401 - what torch passes on may be anything

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from train_step import BY_NAME, Training

from sparkir.quant import fused
from sparkir.quant.fused import fused_rounding

CONTENDERS = (
    "float, bfloat16, channels_last",
    "QAT, bfloat16, channels_last",
    "QAT, bfloat16, channels_last, compile",
)
VIEWS = ("view", "detach", "expand", "reshape", "alias", "permute", "split", "slice", "select", "t")


class Counting(TorchDispatchMode):
    """Counts what is done inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__.partition(".")[0]
        if name.strip("_") not in VIEWS and not name.endswith(("squeeze", "as_strided")):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def kernels_as_one(counting: Counting) -> Iterator[None]:
    def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            counting.found[kernel.__name__] += 1
            with _disable_current_modes():
                return kernel(*arguments)

        return run

    compiled, few = fused._compiled, fused._run_few
    fused._compiled = counted  # type: ignore[assignment]
    fused._run_few = fused._run  # as on a GPU
    try:
        yield
    finally:
        fused._compiled, fused._run_few = compiled, few


def counts(name: str, folder: Path) -> tuple[int, int]:
    """Of the forward and the backward pass."""
    training = Training(BY_NAME[name], folder)
    lq = torch.rand(1, 3, 48, 48)
    task, settings = training.task.train(), training.settings
    totals = []
    for _ in range(2):  # what is made once and kept is made the first time
        forward, backward = Counting(), Counting()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16),
            fused_rounding(settings.compiled),
            kernels_as_one(forward),
            forward,
        ):
            output = task.run_student(lq)
        with kernels_as_one(backward), backward:
            output.backward(torch.ones_like(output))
        totals.append((forward.found.total(), backward.found.total()))
    return totals[-1]


def main() -> None:
    print(
        "# Operations of a pass\n\nEDSR-baseline x4.\n\n| | forward | backward |\n|---|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in CONTENDERS:
            forward, backward = counts(name, Path(folder))
            print(f"| {name} | {forward} | {backward} |")


if __name__ == "__main__":
    main()
