"""How strongly to imitate: as long as the teacher restores better than its student.

Measured on the images that both have just restored, in the units of the reward (SPARK eq. 1). Both
are compared with the same truth, so that its noise is in either, and a few batches tell. A look
ahead would not: in a network of few bits, what a small move of the weights does is mostly rounding;
and neither do exact gradients, of which a batch's say little more than their own noise.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.spark.batch import of_all

_NEWEST = 0.3
"""Share of the newest lead in the running mean."""
_CLEAR = 0.1
"""A lead that is no accident: 0.1 dB, or 0.01 of SSIM, with the rewards' own factors."""
_WEAKEST, _STRONGEST = 0.01, 10.0


class Strength(nn.Module):
    """A factor of W: it grows while the teacher leads, and falls to almost nothing when not."""

    value: Tensor
    """(), between 0.01 and 10."""
    lead: Tensor
    """(), a running mean."""
    count: Tensor

    def __init__(self, start: float, *, rate: float) -> None:
        """Begin at `start`; `rate` is the largest move of its logarithm."""
        super().__init__()
        self.rate = rate
        self.register_buffer("value", torch.tensor(start))
        self.register_buffer("lead", torch.tensor(0.0))
        self.register_buffer("count", torch.tensor(0.0))

    @torch.no_grad()
    def learn(self, lead: Float[Tensor, " b"]) -> dict[str, float]:
        """One move, the same in every process that shares the batch; returns what to log.

        Args:
            lead: the reward of the teacher's output over the student's, image by image.
        """
        self.count += 1
        self.lead.lerp_(of_all(lead).float().mean(), (1 / self.count).clamp_min(_NEWEST))
        self.value.mul_((self.rate * torch.tanh(self.lead / _CLEAR)).exp())
        self.value.clamp_(_WEAKEST, _STRONGEST)
        return {"strength": float(self.value), "lead": float(self.lead)}
