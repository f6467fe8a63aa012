"""What a distillation method is: a module that turns one step's images and features into terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.distill.features import observe, paired_taps
from sparkir.errors import SparkirError
from sparkir.models.facts import facts_of
from sparkir.models.modes import device_of, evaluating
from sparkir.spark.distance import Norm


@dataclass(frozen=True, kw_only=True)
class Term:
    """One distillation loss, factor * mean(W * distance)."""

    name: str
    """What the log calls it; terms of one name are added up there."""
    distance: Float[Tensor, "b c h w"]
    """The distance at every location, unweighted; its plain mean is the published loss."""
    factor: float = 1.0
    of_the_rest: bool = False
    """Whether it is weighted by what W leaves of 1, and not by W."""

    def weights_at(self, weights: Float[Tensor, "b 1 H W"]) -> Float[Tensor, "b 1 h w"]:
        """The weights on this map's grid: averaged where the map is coarser than the image."""
        if self.of_the_rest:
            weights = (1 - weights).clamp_min(0)
        if weights.shape[-2:] in (self.distance.shape[-2:], (1, 1)):
            return weights
        return F.adaptive_avg_pool2d(weights, (self.distance.shape[-2], self.distance.shape[-1]))

    def loss(self, weights: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
        """factor * mean(W * distance), W on this map's grid."""
        return self.factor * (weights * self.distance).mean()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one step shows a method. Images in [0, 1]; features as in `features.observe`."""

    lq: Float[Tensor, "b k h w"]
    """RGB; the others have the student's channels."""
    gt: Float[Tensor, "b c H W"]
    output: Float[Tensor, "b c H W"]
    teacher_output: Float[Tensor, "b c H W"]
    student_features: tuple[Tensor, ...]
    teacher_features: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method may look at when it is made."""

    student: nn.Module
    teacher: nn.Module
    examples: Sequence[Float[Tensor, "b c h w"]]
    """Input crops of the training images, in [0, 1]."""
    steps: int
    """How long the student will be trained."""

    @cached_property
    def taps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The student's and the teacher's taps, as many of either, from input to output.

        Raises:
            SparkirError: a network names none.
        """
        found = []
        for role, network in (("student", self.student), ("teacher", self.teacher)):
            facts = facts_of(network)
            if not facts.taps:
                raise SparkirError(
                    f"the {role} {facts.name} names no features to compare; set taps in its "
                    'facts, or take distill.method = "kd"'
                )
            found.append(facts.taps)
        return paired_taps(*found)

    @cached_property
    def shapes(self) -> list[tuple[torch.Size, torch.Size]]:
        """The shapes of each pair of features, for one image."""
        networks = (self.student, self.teacher)
        found = [
            _shapes(network, taps, self.examples[0][:1])
            for network, taps in zip(networks, self.taps, strict=True)
        ]
        return list(zip(*found, strict=True))


@torch.no_grad()
def _shapes(network: nn.Module, taps: tuple[str, ...], image: Tensor) -> list[torch.Size]:
    with evaluating(network):
        _, features = observe(network, taps, image.to(device_of(network)))
    return [feature.shape for feature in features]


class Method(nn.Module):
    """What the student imitates besides the teacher's output, which the task compares itself.

    What is trained with the student (a projection) is a parameter; what must survive a resume is a
    parameter or a buffer. Neither becomes part of the student.
    """

    title: ClassVar[str]
    """What tables call it."""
    norm: ClassVar[Norm] = "l1"
    strength: ClassVar[float] = 1.0
    """The distillation of the outputs that is published together with the method."""
    published_factor: ClassVar[float] = 1.0
    """Of the method's own first term. Losses here are of images in [0, 1]: where the published
    code keeps images in [0, 255] and the term has no such unit, its factor is divided by 255."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    """The features that `forward` will be shown, names from the networks' facts."""

    def __init__(self, *, factor: float | None = None) -> None:
        """Make the method; `factor` replaces the published one."""
        super().__init__()
        self.factor = self.published_factor if factor is None else factor

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """The method's own terms; gradients reach the student and whatever it trains."""
        raise NotImplementedError

    def begin_rounding(self) -> None:
        """The student has its grids from here on (`train.float_steps`): other numbers than before.

        Their values are other ones too where its channels were scaled.
        """

    def describe(self) -> str:
        """What the event stream and the report say of it, where the name does not say it all."""
        return ""


class FeatureMethod(Method):
    """A method that compares features, pair by pair."""

    def __init__(self, setting: Setting, *, factor: float | None = None) -> None:
        """Pair the networks' taps, and look through both once, so that a wrong one is found now.

        Raises:
            SparkirError: a network names none, or one that gives no feature map.
        """
        super().__init__(factor=factor)
        self.student_taps, self.teacher_taps = setting.taps
        assert len(setting.shapes) == len(self.student_taps)
