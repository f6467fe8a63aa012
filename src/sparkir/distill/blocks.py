"""Block-wise distillation from the student's own float self, for self-quantized students."""

from __future__ import annotations

from sparkir.distill.method import FeatureMethod, Seen, Setting, Term
from sparkir.errors import SparkirError
from sparkir.models.facts import facts_of
from sparkir.spark.distance import mse_map


class Blocks(FeatureMethod):
    """mean over taps of mean (F_S - F_T)^2 / mean F_T^2, at every tap of one architecture.

    Relative, so that blocks of small and of large features count alike, as in post-training
    reconstruction (BRECQ, Li et al., ICLR 2021; 2DQuant, Liu et al., NeurIPS 2024). The factor and
    the mean over taps are ours.
    """

    title = "block features"
    published_factor = 0.1

    def __init__(self, setting: Setting, *, factor: float | None = None) -> None:
        """Pair every tap with itself.

        Raises:
            SparkirError: the networks are not of one architecture.
        """
        super().__init__(setting, factor=factor)
        same = facts_of(setting.student).taps == facts_of(setting.teacher).taps
        if not same or any(student != teacher for student, teacher in setting.shapes):
            raise SparkirError(
                'distill.method = "blocks" compares a student with its float self, but student and '
                'teacher differ in their features; take "fitnet", or the same network for both'
            )

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """One term for each tap."""
        terms = []
        for student, teacher in zip(seen.student_features, seen.teacher_features, strict=True):
            size = teacher.square().mean().clamp_min(1e-12)
            distance = mse_map(student, teacher) / size
            terms.append(
                Term(name="blocks", distance=distance, factor=self.factor / len(self.student_taps))
            )
        return tuple(terms)
