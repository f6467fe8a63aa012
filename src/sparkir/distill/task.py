"""One training step's losses: student, teacher, distillation and weighting put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.distill.output import MAPS, Norm, l1_map
from sparkir.models.facts import restore
from sparkir.spark.weighting import Constant, Weighting


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """What one forward gives; all losses are means over the batch, images in [0, 1]."""

    output: Float[Tensor, "b c h w"]
    teacher: Float[Tensor, "b c h w"] | None
    reconstruction: Float[Tensor, ""]
    """|student - gt| (SPARK eq. 2)."""
    distance: Float[Tensor, "b c h w"] | None
    """Distillation distance at every location, unweighted."""
    weights: Float[Tensor, "b 1 h w"] | None
    strength: float

    def distillation(self, weights: Float[Tensor, "b 1 h w"] | None = None) -> Float[Tensor, ""]:
        """strength * mean(W * distance) (SPARK eq. 3), by default with this step's W."""
        if self.distance is None or self.weights is None:
            return torch.zeros_like(self.reconstruction)
        chosen = self.weights if weights is None else weights
        return self.strength * (chosen * self.distance).mean()

    def total(self) -> Float[Tensor, ""]:
        """What the student minimises (SPARK eq. 4)."""
        if self.distance is None:
            return self.reconstruction
        return self.reconstruction + self.distillation()

    def total_without_allocation(self) -> Float[Tensor, ""]:
        """The same with each image's W replaced by its mean: as much weight, nowhere special."""
        assert self.weights is not None
        mean = self.weights.mean(dim=(2, 3), keepdim=True)
        return self.reconstruction + self.distillation(mean)


class DistillationTask(nn.Module):
    """Student under a frozen teacher. Without a teacher, plain (quantization-aware) training.

    The teacher is held, but is no submodule: it is never trained, wrapped or saved.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        weighting: Weighting | None = None,
        norm: Norm = "mse",
        strength: float = 1.0,
        target: Literal["teacher", "truth"] = "teacher",
    ) -> None:
        """Put the parts together.

        Args:
            student: a network with facts, prepared for QAT or not.
            teacher: a network with facts; None for training without distillation.
            weighting: where the distillation counts; everywhere alike when None.
            norm: of the distillation distance.
            strength: factor of the distillation loss.
            target: what the student is pulled to. `truth` is the control that has the same loss
                and no teacher's knowledge in it.
        """
        super().__init__()
        self.student = student
        self.weighting = weighting or Constant(1.0)
        self.norm: Norm = norm
        self.strength, self.target = strength, target
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, if there is one."""
        return self._teacher[0] if self._teacher else None

    def forward(self, lq: Float[Tensor, "b c h w"], gt: Float[Tensor, "b c H W"]) -> StepLosses:
        """Run student and teacher on `lq`; both images in [0, 1]."""
        output = self.run_student(lq)
        teacher = distance = weights = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = restore(self.teacher, lq).float()
            goal = teacher if self.target == "teacher" else gt
            distance = MAPS[self.norm](output, goal)
            with torch.autocast(lq.device.type, enabled=False):  # a draw needs its probability
                weights = self.weighting(output.detach(), teacher, gt)
        return StepLosses(
            output=output,
            teacher=teacher,
            reconstruction=l1_map(output, gt).mean(),
            distance=distance,
            weights=weights,
            strength=self.strength,
        )

    def run_student(self, lq: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """The student's output, [0, 1], float32 whatever the precision inside."""
        return restore(self.student, lq).float()
