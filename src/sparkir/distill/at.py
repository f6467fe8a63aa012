"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928), as used for SR."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sparkir.distill.features import at_one_size
from sparkir.distill.method import FeatureMethod, Seen, Term
from sparkir.spark.distance import l1_map

_EPSILON = 1e-6


def attention(feature: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """A = sum_c F^2 / (||sum_c F^2|| + 1e-6), the norm taken over the locations of an image."""
    energy = feature.square().sum(1, keepdim=True)
    size: Tensor = energy.norm(dim=(2, 3), keepdim=True)
    return energy / (size + _EPSILON)


class AT(FeatureMethod):
    """sum over pairs of mean |A(F_S) - A(F_T)|, with `attention` as in FAKD's code.

    Needs no projection: A has one channel whatever the width. No factor is published for
    restoration; here it is 1.
    """

    title = "AT"

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """One term for each pair of features; its map has one channel."""
        terms = []
        for pair in zip(seen.student_features, seen.teacher_features, strict=True):
            student, teacher = at_one_size(*pair)
            distance = l1_map(attention(student), attention(teacher))
            terms.append(Term(name="at", distance=distance, factor=self.factor))
        return tuple(terms)
