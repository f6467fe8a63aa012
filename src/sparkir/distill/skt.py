"""Structured knowledge transfer of PAMS (Li et al., ECCV 2020, arXiv 2011.04212)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparkir.distill.features import at_one_size
from sparkir.distill.method import FeatureMethod, Seen, Setting, Term
from sparkir.spark.distance import mse_map


def structure(feature: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """mean_c F^2, divided by its norm over the locations of an image."""
    energy = feature.square().mean(1, keepdim=True)
    return F.normalize(energy.flatten(1)).view_as(energy)


class SKT(FeatureMethod):
    """mean (at(F_S) - at(F_T))^2 on the last feature, with at = `structure`, and nothing else.

    PAMS takes the feature in front of the enlarging tail, here the last tap. It adds no distance
    between the outputs, and trains on images in [0, 255] with the factor 1000.
    """

    title = "SKT"
    strength = 0.0
    published_factor = 1000 / 255

    def __init__(self, setting: Setting, *, factor: float | None = None) -> None:
        """Look at the last pair of taps alone."""
        super().__init__(setting, factor=factor)
        self.student_taps, self.teacher_taps = self.student_taps[-1:], self.teacher_taps[-1:]

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """One term; its map has one channel."""
        (feature,), (goal,) = seen.student_features, seen.teacher_features
        student, teacher = at_one_size(feature, goal)
        distance = mse_map(structure(student), structure(teacher))
        return (Term(name="skt", distance=distance, factor=self.factor),)
