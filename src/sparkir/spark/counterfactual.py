"""With the policy's weights, and without: ways to find out what the allocation was worth.

Both compare W with each image's mean of W, so that the reward speaks of where the weight lies and
not of how much there is. `steps_of_the_student` takes real steps and undoes them;
`steps_of_the_output` needs nothing but the images, and is biased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim

from sparkir.spark.distance import Distance
from sparkir.spark.reward import parameters_of, undone

_SHARE_OF_ERROR = 0.1


class Seen(NamedTuple):
    """What one weighted loss was made of; images in [0, 1], nothing carries a gradient."""

    student: Float[Tensor, "b c h w"]
    teacher: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    weights: Float[Tensor, "b 1 h w"]

    @property
    def mean_weights(self) -> Float[Tensor, "b 1 1 1"]:
        """As much weight, nowhere special."""
        return self.weights.mean(dim=(2, 3), keepdim=True)


class Outputs(NamedTuple):
    """The two outputs that a reward compares."""

    with_weights: Float[Tensor, "b c h w"]
    without: Float[Tensor, "b c h w"]


def steps_of_the_student(
    seen: Seen,
    distance: Distance,
    *,
    optimizer: optim.Optimizer,
    step: Callable[[], object],
    student: Callable[[], Tensor],
    module: nn.Module | None,
    factor: float | Tensor,
    unscaled_by: float,
) -> Outputs:
    """The student's output after the step that is due, and after the one without allocation.

    The gradients of the step that is due lie in the optimizer's parameters. The other step's are
    theirs plus the gradient of `factor * mean((mean W - W) * distance)`, for which the student is
    run once more. Parameters, gradients, optimizer state, buffers and random generators are put
    back.

    Args:
        seen: the images and W of the batch.
        distance: what W multiplies.
        optimizer: the student's.
        step: takes one step with it; may clip gradients first.
        student: restores the batch, in [0, 1], with gradient.
        module: whose buffers and further gradients are to be put back.
        factor: of the weighted distance in the loss that the gradients are of.
        unscaled_by: what the gradients were divided by since the backward pass.
    """

    def restored() -> Tensor:
        with _aside(seen.student.device), torch.no_grad(), _kept(module, optimizer):
            return student().detach().clone()

    with undone(optimizer):
        with _aside(seen.student.device), torch.enable_grad(), _kept(module, optimizer):
            shift = seen.mean_weights - seen.weights
            change = factor * weighted(shift, distance(student(), seen.teacher))
            _scale_gradients(optimizer, unscaled_by)  # small half-precision gradients vanish
            change.backward()  # not autograd.grad, which DDP would not average over its ranks
            _scale_gradients(optimizer, 1 / unscaled_by)
        step()
        without = restored()
    with undone(optimizer):
        step()
        with_weights = restored()
    return Outputs(with_weights, without)


def steps_of_the_output(seen: Seen, distance: Distance) -> Outputs:
    """Where the output itself would go, if every pixel were free to follow its own gradient.

    Both outputs are one step down the weighted distance; the mean-weighted one moves a tenth of
    the image's mean error. Deterministic, and free of charge. Its bias: a network shares its
    parameters between places, so what helps in one place may cost in another, and what a student
    cannot learn anywhere is rewarded all the same. The reward knows where the teacher is nearer to
    the truth, and nothing else.
    """
    with torch.enable_grad():
        student = seen.student.detach().requires_grad_()
        distances = distance(student, seen.teacher)
        pulls = [
            torch.autograd.grad(weighted(weights, distances), student, retain_graph=True)[0]
            for weights in (seen.weights, seen.mean_weights)
        ]
    error = (seen.target - seen.student).abs().mean(dim=(1, 2, 3), keepdim=True)
    size = pulls[1].abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
    rate = _SHARE_OF_ERROR * error / size
    return Outputs(*(seen.student - rate * pull for pull in pulls))


def weighted(
    weights: Float[Tensor, "b 1 #h #w"], distances: Float[Tensor, "b c2 h2 w2"]
) -> Float[Tensor, ""]:
    """mean(W * distance) (SPARK eq. 3); W is brought to the size of another map by averaging."""
    height, width = distances.shape[-2:]
    if weights.shape[-2:] not in ((height, width), (1, 1)):
        weights = nn.functional.adaptive_avg_pool2d(weights, (height, width))
    return (weights * distances).mean()


def _scale_gradients(optimizer: optim.Optimizer, factor: float) -> None:
    if factor == 1:
        return
    for parameter in parameters_of(optimizer):
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Leave the generators alone, and no half-precision copy of weights behind in autocast."""
    torch.clear_autocast_cache()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    torch.clear_autocast_cache()


@contextmanager
def _kept(module: nn.Module | None, optimizer: optim.Optimizer) -> Iterator[None]:
    """Put back buffers (observers, batch statistics) and gradients that `optimizer` has not."""
    if module is None:
        yield
        return
    own = {id(parameter) for parameter in parameters_of(optimizer)}
    others = [p for p in module.parameters() if id(p) not in own]
    gradients = [None if p.grad is None else p.grad.clone() for p in others]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for parameter, gradient in zip(others, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
