"""One training step's losses: student, teacher, distillation and weighting put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.distill.features import observe
from sparkir.distill.kd import KD
from sparkir.distill.method import Method, Seen, Term
from sparkir.models.facts import as_seen, facts_of, restore
from sparkir.spark.distance import MAPS, Norm, l1_map, shared_maps
from sparkir.spark.weighting import Constant, Weighting


class Restores(Protocol):
    """Takes what a network sees, in [0, 1], and returns what it restores, float32."""

    replays: bool
    """Whether it repeats a recording: of the tensors that the network had when it was made."""

    def __call__(self, lq: Tensor, /) -> Tensor:
        """(b, c, h, w) -> (b, c, sh, sw)"""


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """What one forward gives; all losses are means over the batch, images in [0, 1]."""

    output: Float[Tensor, "b c h w"]
    gt: Float[Tensor, "b c h w"]
    """The ground truth as the student restores it: luma for a student of one channel."""
    teacher: Float[Tensor, "b c h w"] | None
    reconstruction: Float[Tensor, ""]
    """|student - gt| (SPARK eq. 2)."""
    terms: tuple[Term, ...]
    """What pulls the student to the teacher: its output first, then what the method adds."""
    weights: Float[Tensor, "b 1 h w"] | None
    """W on the image; None without a teacher."""

    def distillation(self, weights: Float[Tensor, "b 1 h w"] | None = None) -> Float[Tensor, ""]:
        """The sum of factor * mean(W * distance) (SPARK eq. 3), by default with this step's W."""
        return self._sum(self.parts(weights))

    def parts(
        self, weights: Float[Tensor, "b 1 h w"] | None = None, *, allocated: bool = True
    ) -> dict[str, Float[Tensor, ""]]:
        """The summands of `distillation` by name; unless `allocated`, with each image's mean W."""
        chosen = self.weights if weights is None else weights
        parts: dict[str, Tensor] = {}
        if chosen is None:
            return parts
        for term in self.terms:
            at = term.weights_at(chosen)
            loss = term.loss(at if allocated else at.mean(dim=(2, 3), keepdim=True))
            parts[term.name] = parts[term.name] + loss if term.name in parts else loss
        return parts

    def total(self) -> Float[Tensor, ""]:
        """What the student minimises (SPARK eq. 4)."""
        if self.weights is None:
            return self.reconstruction
        return self.reconstruction + self.distillation()

    def total_without_allocation(self) -> Float[Tensor, ""]:
        """The same with each image's W replaced by its mean: as much weight, nowhere special.

        Each term has the mean of W on its own map's grid.
        """
        assert self.weights is not None
        return self.reconstruction + self._sum(self.parts(allocated=False))

    def _sum(self, parts: dict[str, Tensor]) -> Tensor:
        losses = list(parts.values())
        return sum(losses[1:], start=losses[0]) if losses else torch.zeros_like(self.reconstruction)


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
        method: Method | None = None,
        norm: Norm = "mse",
        strength: float = 1.0,
        target: Literal["teacher", "truth", "both"] = "teacher",
    ) -> None:
        """Put the parts together.

        Args:
            student: a network with facts, prepared for QAT or not.
            teacher: a network with facts; None for training without distillation.
            weighting: where the distillation counts; everywhere alike when None.
            method: what is imitated besides the teacher's output; nothing when None.
            norm: distance between the outputs.
            strength: factor of that distance; at 0 it is left out.
            target: what the output is pulled to. `both`: to the teacher by W, and to the truth by
                what W leaves of 1. `truth` is the control that has the same loss and no teacher's
                knowledge in it.
        """
        super().__init__()
        self.student = student
        self.weighting = weighting or Constant(1.0)
        self.method = method or KD()
        self.norm: Norm = norm
        self.strength, self.target = strength, target
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self._student_runs: Restores | None = None
        self._teacher_runs: Restores | None = None

    @property
    def recorded(self) -> bool:
        """Whether `record` was called."""
        return self._student_runs is not None or self._teacher_runs is not None

    @property
    def replays_student(self) -> bool:
        """Whether `run_student` repeats a recording."""
        return self._student_runs is not None and self._student_runs.replays

    def record(self, recorded: Callable[[nn.Module], Restores]) -> None:
        """From here on, run student and teacher, as they are now, by what `recorded` makes of them.

        Not where the method looks at features on the way.
        """
        if not self.method.student_taps:
            self._student_runs = recorded(self.student)
        if self.teacher is not None and not self.method.teacher_taps:
            self._teacher_runs = recorded(self.teacher)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, if there is one."""
        return self._teacher[0] if self._teacher else None

    def forward(
        self,
        lq: Float[Tensor, "b c h w"],
        gt: Float[Tensor, "b c H W"],
        teacher: Float[Tensor, "b c H W"] | None = None,
    ) -> StepLosses:
        """Run student and teacher on `lq`; all images RGB in [0, 1].

        The teacher does not run if what it makes of `lq` is given and the method needs no features
        of it. A student of one channel is trained on the images' luma, and its teacher's output
        counts by its luma as well.
        """
        facts = facts_of(self.student)
        output, student_features = self._shown(lq)
        gt = as_seen(gt, facts)
        weights = None
        terms: tuple[Term, ...] = ()
        if self.teacher is None:
            teacher = None
        else:
            teacher, teacher_features = self._taught(lq, teacher)
            teacher = as_seen(teacher, facts)
            seen = Seen(
                lq=lq,
                gt=gt,
                output=output,
                teacher_output=teacher,
                student_features=student_features,
                teacher_features=teacher_features,
            )
            with torch.autocast(lq.device.type, enabled=False):  # a draw needs its probability
                weights = self.weighting(output.detach(), teacher, gt)
                terms = (*self._output_terms(seen), *self.method(seen))
        return StepLosses(
            output=output,
            gt=gt,
            teacher=teacher,
            reconstruction=l1_map(output, gt).mean(),
            terms=terms,
            weights=weights,
        )

    @torch.no_grad()
    def _taught(self, lq: Tensor, known: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The teacher's output, and the features that the method looks at."""
        assert self.teacher is not None
        if known is not None and not self.method.teacher_taps:
            return known, ()
        if self._teacher_runs is not None:
            return self._teacher_runs(as_seen(lq, facts_of(self.teacher))), ()
        return observe(self.teacher, self.method.teacher_taps, lq)

    def _shown(self, lq: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The student's output, and the features that the method looks at."""
        if self.method.student_taps:
            return observe(self.student, self.method.student_taps, lq)
        return self.run_student(lq), ()

    def _output_terms(self, seen: Seen) -> tuple[Term, ...]:
        if self.strength == 0:
            return ()
        if self.target == "both":
            maps = shared_maps(MAPS[self.norm], seen.output, seen.teacher_output, seen.gt)
            return (
                Term(name="output", distance=maps[0], factor=self.strength),
                Term(name="truth", distance=maps[1], factor=self.strength, of_the_rest=True),
            )
        goal = seen.teacher_output if self.target == "teacher" else seen.gt
        distance = MAPS[self.norm](seen.output, goal)
        return (Term(name="output", distance=distance, factor=self.strength),)

    def run_student(self, lq: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k H W"]:
        """The student's output, [0, 1], float32 whatever the precision inside."""
        seen = as_seen(lq, facts_of(self.student))
        if self._student_runs is not None:
            return self._student_runs(seen)
        return restore(self.student, seen).float()
