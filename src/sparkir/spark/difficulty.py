"""Where an image is hard to restore: the four signals that SPARK's policy sees.

Each is a map on a coarse G x G grid over the image, so that the policy acts on regions, not
pixels, and is as cheap for a large crop as for a small one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.spark.batch import of_all

FEATURES = ("laplacian_variance", "pixel_variance", "student_error", "teacher_gap")
_LUMA = (0.299, 0.587, 0.114)
_EPSILON = 1e-6


@torch.no_grad()
def difficulty_maps(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    *,
    grid: int = 8,
) -> Float[Tensor, "b 4 g g"]:
    """The four difficulty signals of SPARK section 3.3, in the order of `FEATURES`.

    Args:
        student: the student's output, [0, 1]. No gradient flows to it.
        teacher: the teacher's output, [0, 1].
        target: the ground truth, [0, 1].
        grid: cells per side.

    Returns:
        Per cell: variance of the Laplacian and variance of the pixels of the ground truth's luma,
        mean |student - target| and mean |teacher - student|. All at least 0.
    """
    # unspecified in the paper: the image of the two variances; luma of the ground truth.
    luma = _luma(target)
    return torch.cat(
        [
            to_cells(_laplacian(luma), grid).var(-1, unbiased=False),
            to_cells(luma, grid).var(-1, unbiased=False),
            to_cells((student - target).abs().mean(1, keepdim=True), grid).mean(-1),
            to_cells((teacher - student).abs().mean(1, keepdim=True), grid).mean(-1),
        ],
        dim=1,
    )


@torch.no_grad()
def rightness(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    *,
    grid: int = 8,
) -> Float[Tensor, "b 1 g g"]:
    """How far on the way from the student to the teacher the truth lies, cell by cell.

    The r in [0, 1] for which student + r (teacher - student) has the least squared error: 1 where
    the teacher is right, 0 where imitating it leads away from the truth. What it says does not
    depend on how hard a cell is. Where both agree there is no way, and r is 1/2.
    """

    def squared(a: Tensor, b: Tensor) -> Float[Tensor, "b 1 g g"]:
        return to_cells((a - b).square().mean(1, keepdim=True), grid).mean(-1)

    way = squared(teacher, student)
    lead = squared(student, target) - squared(teacher, target)
    return 0.5 + 0.5 * (lead / way.clamp_min(torch.finfo(way.dtype).tiny)).clamp(-1, 1)


def _luma(image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Full-range luma; of other than three channels, such as a packed raw image's, their mean."""
    if image.shape[1] != len(_LUMA):
        return image.float().mean(1, keepdim=True)
    weights = torch.tensor(_LUMA, device=image.device).view(1, 3, 1, 1)
    return (image.float() * weights).sum(1, keepdim=True)


def _laplacian(image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """The four-neighbour Laplacian; borders are repeated, so a flat image gives zero."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    down = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
    return across + down - 4 * image


def to_cells(image: Float[Tensor, "b 1 h w"], grid: int) -> Float[Tensor, "b 1 g g n"]:
    """The pixels of each cell. Sides that G does not divide are completed by their border."""
    height, width = image.shape[-2:]
    padded = F.pad(image.float(), (0, -width % grid, 0, -height % grid), mode="replicate")
    high, wide = padded.shape[-2] // grid, padded.shape[-1] // grid
    split = padded.view(-1, 1, grid, high, grid, wide)
    return split.permute(0, 1, 2, 4, 3, 5).flatten(-2)


class Standardize(nn.Module):
    """log(eps + v), shifted and scaled by running statistics per channel.

    unspecified in the paper: how the four signals, whose sizes differ by orders of magnitude,
    are brought to one scale.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, channels: int = len(FEATURES), *, momentum: float = 0.01) -> None:
        """Start without statistics; the first batch provides them."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def forward(self, maps: Float[Tensor, "b k g g"]) -> Float[Tensor, "b k g g"]:
        """Standardized maps; in training, also follow the statistics of the whole batch."""
        logs = (maps + _EPSILON).log()
        if self.training:
            share = torch.where(self.count == 0, 1.0, self.momentum)
            variance, mean = torch.var_mean(of_all(logs), dim=(0, 2, 3), unbiased=False)
            fine = variance.isfinite().all()  # an overflow of half precision must not stay
            for known, new in ((self.mean, mean), (self.variance, variance)):
                known.copy_(torch.where(fine, known.lerp(new, share), known))
            self.count.add_(fine)
        shape = (1, -1, 1, 1)
        return (logs - self.mean.view(shape)) / (self.variance.view(shape) + 1e-4).sqrt()
