"""FitNets (Romero et al., ICLR 2015, arXiv 1412.6550), as used for super-resolution."""

from __future__ import annotations

from sparkir.distill.features import at_one_size
from sparkir.distill.method import FeatureMethod, Seen, Setting, Term
from sparkir.distill.projection import projections
from sparkir.spark.distance import l1_map


class FitNet(FeatureMethod):
    """sum over pairs of mean |project(F_S) - F_T|.

    L1 as in the comparisons of FAKD (He et al., ICIP 2020). The projection is a 1x1 convolution
    where the widths differ, else nothing. No factor is published for restoration; here it is 1, as
    that of the two losses of the outputs.
    """

    title = "FitNet"

    def __init__(self, setting: Setting, *, factor: float | None = None) -> None:
        """Pair the taps and make the projections."""
        super().__init__(setting, factor=factor)
        self.projections = projections(setting)

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """One term for each pair of features."""
        terms = []
        features = (seen.student_features, seen.teacher_features)
        for project, *pair in zip(self.projections, *features, strict=True):
            student, teacher = at_one_size(*pair)
            distance = l1_map(project(student), teacher)
            terms.append(Term(name="fitnet", distance=distance, factor=self.factor))
        return tuple(terms)
