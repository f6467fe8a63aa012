"""Where imitation helps: the credit of every cell, to first order, from images that are not in it.

The reward of a whole image says little about which of its 64 cells earned it. But what a little
more weight on a cell does to the reward is known to first order, for all cells at once: the weight
moves the student along the gradient of that cell's distance to the teacher, so its worth is the
product of that gradient with the reward's. Read the other way round, it is how much *that cell's
distance falls when the student moves to improve the reward*: one backward pass and one forward.

The reward is that of one half of the batch, the cells are those of the other half. A cell is
credited for what it teaches about other images, not for a teacher that happens to lie on the side
of this image's own noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from sparkir.spark.batch import averaged, of_all, rank, ranks
from sparkir.spark.difficulty import to_cells
from sparkir.spark.reward import psnr_db, ssim


def cell_credit(
    student: Callable[[Tensor], Tensor],
    parameters: Iterable[Tensor],
    lq: Float[Tensor, "b k h w"],
    *,
    output: Float[Tensor, "b c H W"],
    teacher: Float[Tensor, "b c H W"],
    target: Float[Tensor, "b c H W"],
    alpha: float,
    beta: float,
    grid: int,
    reach: float,
) -> Float[Tensor, "half 1 g g"]:
    """How much each cell of the batch's second half gains from a step for the first half's reward.

    Args:
        student: restores a batch; called without gradient, on the second half.
        parameters: of the student; moved while it is called, and put back.
        lq: what the student restores, two images at least; of a batch that several processes
            share, this one's images.
        output: what it made of `lq`, with its graph, which is kept.
        teacher: what the teacher made of it.
        target: the ground truth; all images in [0, 1].
        alpha: reward per dB of PSNR.
        beta: reward per unit of SSIM.
        grid: cells per side.
        reach: size of the move, relative to each tensor of weights. Large enough that weights of
            few bits change, small enough to be a step.

    Returns:
        Mean fall of (student - teacher)**2 in each cell. Positive where imitating the teacher and
        improving the reward are the same thing.
    """
    half = ranks() * len(lq) // 2  # of all processes' images
    assert half > 0, "credit needs two images"
    own = min(max(half - rank() * len(lq), 0), len(lq))  # how many of it are here
    weights = [p for p in parameters if p.dim() > 1]
    gain = alpha * psnr_db(output[:own], target[:own]) + beta * ssim(output[:own], target[:own])
    uphill = torch.autograd.grad(gain.sum(), weights, retain_graph=True, allow_unused=True)
    credit = output.new_zeros(len(lq), 1, grid, grid)
    with _moved(weights, averaged(uphill), reach):
        if own < len(lq):
            after = student(lq[own:])
            fall = (output[own:] - teacher[own:]).square() - (after - teacher[own:]).square()
            credit[own:] = to_cells(fall.detach().mean(1, keepdim=True), grid).mean(-1)
    return of_all(credit)[half:]


@contextmanager
def _moved(
    weights: Iterable[Tensor], direction: Iterable[Tensor | None], reach: float
) -> Iterator[None]:
    """Each tensor moved along its direction by `reach` of its own size, inside only."""
    # Through .data, which autograd does not watch: it would refuse the backward pass that is still
    # to come, though by then every value is back in its place.
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, towards in zip(weights, direction, strict=True):
                if towards is not None:
                    size = towards.norm().clamp_min(torch.finfo(towards.dtype).tiny)
                    weight.data.add_(towards * (reach * weight.norm() / size))
            yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)
