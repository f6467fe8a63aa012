"""One batch in several processes: what a weighting must know of all of it.

In sparkir's own training, each process has an equal share of every batch, and everything is as if
one process had it all; `share_batches` says so. Elsewhere, as in a training loop of the user's own,
a batch is the process's own, and these functions give back what they are given; `replicas` keeps
one policy there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, distributed

_shared = ContextVar("shared", default=False)


def share_batches() -> None:
    """From here on, a batch is spread over the processes of torch.distributed's default group."""
    _shared.set(True)


def ranks() -> int:
    """How many processes share a batch."""
    return distributed.get_world_size() if _shared.get() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if _shared.get() else 0


@torch.no_grad()
def of_all(values: Tensor) -> Tensor:
    """(b, ...) of this process -> (ranks * b, ...) of all of them, in their order, detached."""
    if ranks() == 1:
        return values.detach()
    own = values.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks())]
    distributed.all_gather(parts, own)
    return torch.cat(parts)


@torch.no_grad()
def averaged(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The mean of each gradient over the processes; one that is missing is so in all."""
    if ranks() == 1:
        return gradients
    means = iter(mean_over_processes([g for g in gradients if g is not None]))
    return [None if gradient is None else next(means) for gradient in gradients]


@torch.no_grad()
def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over the processes of the default group, in one exchange."""
    if not tensors:
        return []
    together = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(together)
    parts = (together / distributed.get_world_size()).split([t.numel() for t in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def normal(shape: tuple[int, ...], *, device: torch.device) -> Float[Tensor, "b ..."]:
    """Standard normal numbers of `shape` (b, ...) for this process's images.

    Drawn for the images of all processes, of which each keeps its own. Generators that start alike
    so stay alike, and an image's numbers do not depend on how many processes there are.
    """
    drawn = torch.randn((ranks() * shape[0], *shape[1:]), device=device)
    return drawn if ranks() == 1 else drawn.chunk(ranks())[rank()]
