"""One policy in several processes: equal at the start, and moved by the mean gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim


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
    for buffer in module.buffers():
        if buffer.is_floating_point():
            _average(buffer)


def _average_gradients(optimizer: optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                _average(parameter.grad)


def _average(tensor: Tensor) -> None:
    dist.all_reduce(tensor)
    tensor.div_(dist.get_world_size())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    with torch.no_grad():
        yield from (p.detach() for p in module.parameters())
        yield from module.buffers()
