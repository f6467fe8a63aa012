"""One policy in several processes, each with batches of its own: for the user's loop.

Rightly apart from `batch`, which shares out one batch so that every figure is that of a process
alone, and can do so because sparkir's loop made the batch. Here batches may differ in size, each
process draws for itself, and what is kept alike is the policy, as DistributedDataParallel keeps the
student: equal at the start, and moved by the mean gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from sparkir.spark.batch import mean_over_processes
from sparkir.spark.reward import parameters_of


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 if it is alone."""
    return dist.get_rank() if several() else 0


def share(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if several():
        for tensor in _tensors(module):
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def everywhere(flag: Tensor) -> bool:
    """Whether something holds in every process: what only some of them skip would part them."""
    if several():
        flag = flag.to(torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


@contextmanager
def averaged(module: nn.Module) -> Iterator[None]:
    """Steps of the module's own optimizers use gradients averaged over the processes.

    Running statistics, which each process gathers from its own images, are averaged at the end.
    """
    if not several():
        yield
        return
    own = [value for value in vars(module).values() if isinstance(value, optim.Optimizer)]
    with ExitStack() as stack:
        for optimizer in own:
            handle = optimizer.register_step_pre_hook(_average_gradients)
            stack.callback(handle.remove)
        yield
    _average([buffer for buffer in module.buffers() if buffer.is_floating_point()])


def _average_gradients(optimizer: optim.Optimizer, *_: object) -> None:
    parameters = parameters_of(optimizer)
    _average([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def _average(tensors: Sequence[Tensor]) -> None:
    for tensor, mean in zip(tensors, mean_over_processes(tensors), strict=True):
        tensor.copy_(mean)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    with torch.no_grad():
        yield from (p.detach() for p in module.parameters())
        yield from module.buffers()
