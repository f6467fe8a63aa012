"""One run on several devices: what its processes must agree on.

Each process has one device, the whole student, and an equal share of every batch. `Devices` is a
process alone, which agrees with itself; `FabricDevices` is one of several that torchrun started,
brought together by Lightning Fabric. The loop uses either without knowing which.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparkir.distill.task import DistillationTask, StepLosses
from sparkir.errors import SparkirError
from sparkir.quant.quantizer import activation_quantizers
from sparkir.spark.batch import share_batches
from sparkir.train.state import TrainState

Value = TypeVar("Value")
Step = Callable[..., StepLosses]
_PATIENCE = timedelta(hours=6)
"""While the first process decodes images or evaluates, the others wait."""


class Devices:
    """One process with one device: all that is to be agreed is agreed already."""

    rank, ranks = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def require_shares(self, batch: int) -> None:
        """Make sure that `batch` can be shared equally.

        Raises:
            SparkirError: it cannot; the nearest that can are named.
        """
        below = batch - batch % self.ranks
        if below == batch:
            return
        near = f"{below} or {below + self.ranks}" if below else str(self.ranks)
        raise SparkirError(
            f"data.batch = {batch} cannot be shared equally by {self.ranks} processes; set it to "
            f"{near}, or start another number of processes"
        )

    def wrap(self, task: DistillationTask, trained: Sequence[nn.Parameter]) -> Step:
        """The task's forward, whose backward leaves the whole batch's gradients in `trained`."""
        return task

    def agree(self, state: TrainState) -> None:
        """Make the first process's state that of all: weights, grids, generators, everything."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over the processes, detached."""
        return value.detach()

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag

    def gather(self, value: Value) -> list[Value]:
        """Every process's `value`, in their order."""
        return [value]

    def broadcast(self, value: Value) -> Value:
        """The first process's `value`."""
        return value

    def wait(self) -> None:
        """Wait until every process is here."""

    def alike(self, error: SparkirError) -> BaseException:
        """What to raise for an error that all processes meet: the first one alone speaks of it."""
        return error

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A block after which all go on, or none does; it must exchange nothing.

        On each machine one process runs it before the others, which then find what it left in the
        cache. An error anywhere is raised in the first process.
        """
        yield


class FabricDevices(Devices):
    """One of several processes, each with a device of its own."""

    def __init__(self, fabric: Any, *, local_rank: int) -> None:  # noqa: ANN401 - optional package
        """Take over a launched Fabric; `local_rank` counts the processes of this machine."""
        self._fabric, self._local_rank = fabric, local_rank
        self.rank, self.ranks = fabric.global_rank, fabric.world_size

    def wrap(self, task: DistillationTask, trained: Sequence[nn.Parameter]) -> Step:
        """DistributedDataParallel over exactly what is trained: student, and nothing frozen."""
        for quantizer in activation_quantizers(task.student).values():
            quantizer.ranks = self.ranks
        step: Step = self._fabric.strategy.setup_module(_Trained(task, trained))
        return step

    def agree(self, state: TrainState) -> None:
        """Send the first process's state, as a checkpoint, to the others."""
        file = io.BytesIO()
        if self.first:
            torch.save(state.state_dict(), file)
        content = self.broadcast(file.getvalue())
        if not self.first:
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            state.load_state_dict(loaded)

    def mean(self, value: Tensor) -> Tensor:
        """All-reduce a copy."""
        result: Tensor = self._fabric.all_reduce(value.detach().clone(), reduce_op="mean")
        return result

    def any(self, flag: bool) -> bool:
        """All-reduce one number."""
        return bool(self.mean(torch.tensor(float(flag), device=self._fabric.device)) > 0)

    def gather(self, value: Value) -> list[Value]:
        """Pickled, so that it may be anything."""
        values: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Pickled, so that it may be anything."""
        result: Value = self._fabric.broadcast(value)
        return result

    def wait(self) -> None:
        """A barrier."""
        self._fabric.barrier()

    def alike(self, error: SparkirError) -> BaseException:
        """The others end without a word."""
        return error if self.first else SystemExit(1)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """See `Devices`."""
        error: SparkirError | None = None
        if self._local_rank != 0:
            self.wait()
        try:
            yield
        except SparkirError as caught:
            error = caught
        if self._local_rank == 0:
            self.wait()
        said = self.gather(None if error is None else str(error))
        if error is not None:
            raise self.alike(error)
        for rank, text in enumerate(said):
            if text is not None:
                raise self.alike(SparkirError(f"process {rank} of {self.ranks}: {text}"))


class _Trained(nn.Module):
    """The task as DistributedDataParallel may see it: the parameters of the optimizer alone.

    Teacher and weighting stay outside. Wherever a trained parameter lives, it is averaged.
    """

    def __init__(self, task: DistillationTask, trained: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        # It is told to look for parameters that are not used, and warns unless it finds one.
        self.unused = nn.Parameter(torch.zeros(1, device=trained[0].device))
        self._task = (task,)  # in a tuple, so that it does not become a submodule

    def forward(self, *args: Any, **kwargs: Any) -> StepLosses:  # noqa: ANN401
        losses: StepLosses = self._task[0](*args, **kwargs)
        return losses


def start(device: str) -> Devices:
    """Join the other processes that torchrun started, if it did.

    Args:
        device: the recipe's `train.device`.

    Raises:
        SparkirError: there are others, and Lightning Fabric is not installed, or a GPU is missing;
            all processes meet the same one.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not torch.distributed.is_torchelastic_launched():
        return Devices()
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ModuleNotFoundError as error:
        raise SparkirError(
            f"torchrun started {count} processes, which lightning-fabric brings together, and "
            f"{error.name} is not installed; pip install 'sparkir[distributed]', or start sparkir "
            "without torchrun"
        ) from error
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.is_available() and device != "cpu"
    found = torch.cuda.device_count()
    if on_gpu and found < here:
        raise SparkirError(
            f"torchrun started {here} processes on a machine with {found} GPUs; start it with "
            f"--nproc_per_node {found}"
        )
    if count % here:
        raise SparkirError(
            f"torchrun started {here} of {count} processes on this machine; start as many on each"
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its greeting
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=here,
        num_nodes=count // here,
        # A network of the user's own may have parameters that no output depends on.
        strategy=DDPStrategy(timeout=_PATIENCE, find_unused_parameters=True),
    )
    fabric.launch()
    share_batches()
    return FabricDevices(fabric, local_rank=fabric.local_rank)
