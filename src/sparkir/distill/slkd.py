"""SLKD-style distillation from degraded and clean images at once, after Zhang & Yan (ICASSP 2025).

arXiv 2501.09268 publishes the idea: the student's encoder learns from teacher A, which sees the
degraded image, by natural-scene statistics as in BRISQUE; its decoder learns from teacher B, which
sees the clean image, by edges and textures as in PIQE; L1 and KL divergence on top. Its formulas
and factors could not be read. Those here are ours, and so are their shortcomings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparkir.distill.features import at_one_size, observe
from sparkir.distill.method import FeatureMethod, Seen, Setting, Term
from sparkir.distill.projection import projections
from sparkir.models.facts import facts_of
from sparkir.spark.distance import l1_map

_WINDOW_PX, _SIGMA_PX = 7, 7 / 6
"""Of the local statistics, as in BRISQUE and PIQE."""
_SATURATION = 0.01
"""Keeps flat parts from being amplified. BRISQUE's is 1 level, of images that deviate by tens."""
_EPSILON = 1e-8
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
_KL_SHARE = 0.1
"""Of the divergence, relative to the other two terms."""


class SLKD(FeatureMethod):
    """L1 of natural-scene statistics in the first half, of edges and textures in the second, KL.

    Pairs of features are split in the middle; a middle one counts in both halves. The student's
    are projected to the teacher's width, averaged to the smaller size, and both are divided by the
    teacher's root mean square. The divergence is that of softmax over channels at every location
    of the last pair.

    Teacher B is the same frozen network on the clean image, where the network can take one: if it
    keeps the image's size. For super-resolution, A is B. Factors 0.1, 0.1 and 0.01, untuned.
    """

    title = "SLKD-style"
    published_factor = 0.1

    def __init__(self, setting: Setting, *, factor: float | None = None) -> None:
        """Pair the taps and make the projections, which are the scale conversion."""
        super().__init__(setting, factor=factor)
        self.projections = projections(setting)
        self._teacher = [setting.teacher]
        self.sees_clean = facts_of(setting.teacher).scale == 1

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """A term for each pair and half, and the divergence."""
        count = len(self.student_taps)
        goals = list(seen.teacher_features)
        clean = self._clean_features(seen)
        terms = []
        for i in range((count + 1) // 2):
            own, goal = self._comparable(i, seen, goals[i])
            distance = l1_map(natural_statistics(own), natural_statistics(goal))
            terms.append(Term(name="natural", distance=distance, factor=self.factor))
        for i in range(count // 2, count):
            own, goal = self._comparable(i, seen, clean[i])
            distance = l1_map(edges_and_textures(own), edges_and_textures(goal))
            terms.append(Term(name="edges", distance=distance, factor=self.factor))
        return (*terms, self._divergence(own, goal))

    def _clean_features(self, seen: Seen) -> tuple[Tensor, ...]:
        if not self.sees_clean:
            return seen.teacher_features
        with torch.no_grad():
            return observe(self._teacher[0], self.teacher_taps, seen.gt)[1]

    def _comparable(self, index: int, seen: Seen, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The student's feature and its goal at one width, size and scale."""
        projected = self.projections[index](seen.student_features[index])
        own, goal = at_one_size(projected, goal)
        size = goal.square().mean().sqrt().clamp_min(_EPSILON)
        return own / size, goal / size

    def _divergence(self, own: Tensor, goal: Tensor) -> Term:
        distance = F.kl_div(
            F.log_softmax(own, dim=1), F.log_softmax(goal, dim=1), reduction="none", log_target=True
        )
        return Term(
            name="divergence",
            distance=distance.sum(1, keepdim=True),
            factor=self.factor * _KL_SHARE,
        )

    def describe(self) -> str:
        """Which teacher sees what."""
        sees = "the clean image" if self.sees_clean else "what teacher A sees (the scale is not 1)"
        return f"SLKD-style, formulas of this project; teacher B sees {sees}"


def blurred(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Means under a 7 x 7 Gaussian window, borders repeated."""
    offsets = torch.arange(_WINDOW_PX, device=x.device, dtype=x.dtype) - (_WINDOW_PX - 1) / 2
    window = torch.exp(-0.5 * (offsets / _SIGMA_PX).square())
    window = (window / window.sum()).expand(x.shape[1], 1, 1, -1)
    reach = _WINDOW_PX // 2
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, window, groups=x.shape[1])
    return F.conv2d(across, window.transpose(2, 3), groups=x.shape[1])


def deviation(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The local standard deviation, under `blurred`'s window."""
    variance = blurred(x.square()) - blurred(x).square()
    return (variance.clamp_min(0) + _EPSILON).sqrt()  # rounding makes it negative on flat parts


def natural_statistics(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
    """What BRISQUE fits its distributions to, kept local: moments of MSCN coefficients.

    m = (x - mean) / (deviation + 0.01), mean and deviation local. Local means of |m|, of m^2, and
    of m times its neighbour to the right, below, and on both diagonals: k = 6 c channels.
    """
    m = (x - blurred(x)) / (deviation(x) + _SATURATION)
    padded = F.pad(m, (1, 1, 1, 1), mode="replicate")
    height, width = m.shape[-2:]
    products = [
        m * padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        for down, right in _NEIGHBOURS
    ]
    return blurred(torch.cat([m.abs(), m.square(), *products], dim=1))


def edges_and_textures(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
    """The size of the gradient (central differences) and the local deviation: k = 2 c channels."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    edges = (across.square() + down.square() + _EPSILON).sqrt()
    return torch.cat([edges, deviation(x)], dim=1)
