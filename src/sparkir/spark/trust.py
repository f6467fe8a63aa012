"""How far to believe the teacher, and how far the truth.

What a student should learn is the best guess from its input. The truth is that guess plus what no
input tells (noise, lost detail), which averages out over many steps. The teacher's output has no
such noise, but errors of its own, which no number of steps averages out. Of two such estimates the
best mixture weighs each by the inverse of its squared error: the teacher's bias, and the truth's
noise over the steps that average it.

Bias and noise are told apart by what the student and the teacher know. Neither knows the noise, so
that it has nothing to do with the difference of their outputs. What of the teacher's difference to
the truth goes along with its difference to the student is therefore bias. Where the teacher is
right, the two are uncorrelated; as the student comes near what the teacher can teach, or under a
teacher that leads away, they are not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.spark.batch import of_all

_NEWEST = 0.02
"""Share of the newest batch in the running means."""
_AVERAGED = 300.0
"""Steps over which the truth's noise averages out."""


class Trust(nn.Module):
    """The share of the teacher in what is imitated, from running means."""

    means: Tensor
    """(3,) per pixel: (teacher - student) (teacher - truth), (teacher - student)**2 and
    (teacher - truth)**2."""
    count: Tensor

    def __init__(self) -> None:
        """Nothing seen yet: the teacher is believed."""
        super().__init__()
        self.register_buffer("means", torch.zeros(3))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def follow(
        self,
        student: Float[Tensor, "b c h w"],
        teacher: Float[Tensor, "b c h w"],
        target: Float[Tensor, "b c h w"],
    ) -> None:
        """See one batch more, of all processes that share it."""
        way, error = teacher - student, teacher - target
        products = (way * error, way.square(), error.square())
        found = torch.stack([product.mean(dim=(1, 2, 3)) for product in products], 1)
        newest = of_all(found).mean(0)
        fine = newest.isfinite().all()  # an overflow of half precision must not stay
        self.count.add_(fine)
        moved = self.means.lerp(newest, (1 / self.count).clamp_min(_NEWEST))
        self.means.copy_(torch.where(fine, moved, self.means))

    @property
    def correlation(self) -> Float[Tensor, ""]:
        """Of the teacher's difference to the student with its difference to the truth.

        Above 0 the truth lies before the teacher, seen from the student; below 0, beyond it.
        """
        product, way, error = self.means
        size = (way * error).sqrt()
        return torch.where(size > 0, product / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)

    @property
    def value(self) -> Float[Tensor, ""]:
        """In [0, 1]: 1 where the teacher alone is worth imitating, 0 where the truth alone is.

        The bias found is the teacher's error times the correlation, the noise is taken to be that
        error, so that bias**2 / (noise**2 / n) = n * correlation**2.
        """
        return 1 / (1 + _AVERAGED * self.correlation.square())
