"""Feature-affinity distillation (He et al., ICIP 2020): how alike any two locations are.

Not the feature-augmented FAKD of Yuan et al. (WACV 2024), which is of segmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparkir.distill.features import at_one_size
from sparkir.distill.method import FeatureMethod, Seen, Term

_EPSILON = 1e-7
_PIECE = 2**20
"""Entries of the affinity matrices that exist at one time; 4 MiB each."""


class FAKD(FeatureMethod):
    """sum over pairs of mean |A(F_S) - A(F_T)|, A the cosines between all locations of an image.

    Published as 0.5 L1(S, G) + 0.5 L1(S, T) + 10 times this, with images in [0, 255]; that is
    1, 1 and 20 / 255 with images in [0, 1].

    A has (h w)^2 entries, so time grows with the square of the image, but memory does not: rows
    are made, compared and forgotten in pieces, and made again for the gradient.
    """

    title = "FAKD"
    published_factor = 10 / 0.5 / 255

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """One term for each pair of features.

        Its map (b, 1, h, w) has the mean distance of each location's row of A, so that W weights
        the relations of a location to all others.
        """
        terms = []
        for pair in zip(seen.student_features, seen.teacher_features, strict=True):
            distance = affinity_distance(*at_one_size(*pair))
            terms.append(Term(name="fakd", distance=distance, factor=self.factor))
        return tuple(terms)


def affinity_distance(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b d h w"]
) -> Float[Tensor, "b 1 h w"]:
    """mean_j |A(student)_ij - A(teacher)_ij| at every location i; no gradient to the teacher."""
    rows: Tensor = _RowDistance.apply(_directions(student), _directions(teacher.detach()))
    return rows.view(student.shape[0], 1, *student.shape[-2:])


def _directions(feature: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Each location's channels as a vector of length 1; 0 stays 0."""
    vectors = feature.flatten(2).transpose(1, 2)
    length: Tensor = vectors.norm(dim=2, keepdim=True)
    return vectors / (length + _EPSILON)


class _RowDistance(torch.autograd.Function):
    """r_i = mean_j |s_i . s_j - t_i . t_j| for n vectors s and t, in pieces of A.

    With D = sign(A_s - A_t), which is symmetric like A, and g the gradient of r:
    dr/ds_k = (g_k sum_j D_kj s_j + sum_j g_j D_kj s_j) / n.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(student, teacher)
        rows = student.new_empty(student.shape[:2])
        for image, piece in _pieces(student):
            rows[image, piece] = _difference(student[image], teacher[image], piece).abs_().mean(1)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        student, teacher = ctx.saved_tensors
        result = torch.empty_like(student)
        scaled = gradient[..., None] * student
        for image, piece in _pieces(student):
            sign = _difference(student[image], teacher[image], piece).sign_()
            own = gradient[image, piece, None] * (sign @ student[image])
            result[image, piece] = own + sign @ scaled[image]
        return result / student.shape[1], None


def _pieces(vectors: Tensor) -> Iterator[tuple[int, slice]]:
    """Every image, and in it rows of A by the piece."""
    images, count = vectors.shape[:2]
    step = max(1, _PIECE // count)
    for image in range(images):
        for first in range(0, count, step):
            yield image, slice(first, first + step)


def _difference(student: Tensor, teacher: Tensor, piece: slice) -> Tensor:
    """Rows of A_s - A_t of one image."""
    return (student[piece] @ student.T).addmm_(teacher[piece], teacher.T, alpha=-1)
