"""SPARK for any training loop: the weighting, its policy and its reward as one module."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim

from sparkir.errors import SparkirError, did_you_mean
from sparkir.spark import replicas
from sparkir.spark.counterfactual import (
    Outputs,
    Seen,
    steps_of_the_output,
    steps_of_the_student,
    weighted,
)
from sparkir.spark.distance import MAPS, Distance, shared_maps
from sparkir.spark.reward import parameters_of, reward
from sparkir.spark.weighting import Weighting, weighting, weightings

_IDLE = 100
"""Batches that are weighed without a call of `learn` before a warning says so."""

_STRENGTHS = {"spark": 10.0}
"""Of a preset whose weights leave a rest, which goes to the truth; of all others 1."""


_outside_graphs: list[Callable[..., Any]] = []


def _call(function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    return function(*arguments)


class Spark(nn.Module):
    """A distillation loss that is weighted where it helps, for a training loop of your own.

    Needs torch alone, and nothing of the student but its output. ::

        spark = Spark()
        ...
        kd, weights = spark.weigh(student_out, teacher_out, target)
        (l1(student_out, target) + kd).backward()
        optimizer.step()
        spark.learn()                           # does nothing on most steps

    It draws its random numbers from a generator of its own, and leaves yours, the student, its
    buffers and its optimizer as they were. With several processes (torch.distributed) there is one
    policy, which learns from all of them. Save its `state_dict` with the rest.
    """

    def __init__(
        self,
        preset: str = "spark",
        *,
        distance: str | Distance = "matched",
        strength: float | None = None,
        value_range: float = 1.0,
        seed: int = 0,
        **options: int | float,
    ) -> None:
        """Make an untrained policy with an optimizer of its own.

        Args:
            preset: any source of weights: `spark`, which pulls to the truth what its W leaves of 1,
                `spark-paper` (as published, with the distance `mse`), or a control such as
                `uniform`.
            distance: between the two outputs, what W multiplies: `matched` (a squared error that
                pulls as hard as an L1), `mse`, `l1`, or a function of yours from student and
                teacher to a map (B, any, any, any).
            strength: factor of the distillation loss; 10 for `spark`, 1 for all others.
            value_range: the white level of your images, 1 or 255; the loss is of [0, 1].
            seed: of the policy's draws.
            options: the preset's own, such as `reward_every=8`.

        Raises:
            SparkirError: a preset, a distance or an option that does not exist, or a strength that
                is no number >= 0.
        """
        super().__init__()
        with torch.random.fork_rng([]):  # a policy begins with random weights, by its own seed
            torch.default_generator.manual_seed(seed)
            self.weighting: Weighting = _source(preset, options)
        self.distance = _chosen_distance(distance)
        if strength is not None and not 0 <= strength < math.inf:
            raise SparkirError(f"Spark(strength={strength!r}): give a number >= 0")
        self.strength = _STRENGTHS.get(preset, 1.0) if strength is None else strength
        self.pulls_to_truth = preset in _STRENGTHS
        self.value_range, self.seed = value_range, seed
        if not _outside_graphs:  # no decorator: torch.compiler takes seconds to import
            _outside_graphs.append(torch.compiler.disable(_call))
        self._steps = self._draws = self._overflows = 0
        self._seen: Seen | None = None
        self._factor: Tensor | None = None

    def weigh(
        self,
        student_out: Float[Tensor, ...],
        teacher_out: Float[Tensor, ...],
        target: Float[Tensor, ...],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b 1 h w"]]:
        """The distillation loss, and the weights that it was made with.

        Args:
            student_out: (B, C, H, W), what the student made of the batch; the loss's gradient flows
                here.
            teacher_out: what the teacher made of it.
            target: the ground truth.

        Returns:
            strength * mean(W * distance) in float32, to be added to your loss, and W, detached. Of
            `spark` strength * mean(W * distance + (1 - W) * distance of student and target).

        Raises:
            SparkirError: the three differ in shape, or there are none, or, on the first call, the
                teacher's or the target's values lie outside the range they should have.
        """
        if not student_out.shape == teacher_out.shape == target.shape:
            raise SparkirError(
                "spark.weigh compares images of one shape (B, C, H, W), but got "
                f"{tuple(student_out.shape)}, {tuple(teacher_out.shape)}, {tuple(target.shape)}"
            )
        if student_out.numel() == 0:
            raise SparkirError("spark.weigh got an empty batch; leave it out")
        if student_out.dim() != 4:
            raise SparkirError(
                f"spark.weigh wants a batch of images (B, C, H, W), but got {student_out.dim()} "
                "dimensions; for one image, image[None]"
            )
        run = _outside_graphs[0] if _outside_graphs else _call
        weighed: tuple[Tensor, Tensor] = run(self._weigh, student_out, teacher_out, target)
        return weighed

    def _weigh(
        self, student_out: Tensor, teacher_out: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        learning = self.training and torch.is_grad_enabled()
        if self._draws == 0:
            for what, image in (("target", target), ("teacher's output", teacher_out)):
                self._check_range(what, image)
        if learning:
            self._begin()
        with torch.autocast(student_out.device.type, enabled=False):
            student, teacher, truth = (
                self._unit(image) for image in (student_out, teacher_out.detach(), target.detach())
            )
            with self._own_generator(student.device), _learning(self.weighting, learning):
                weights = self.weighting(student.detach(), teacher, truth)
            loss = self.strength * self._distances(weights, student, teacher, truth)
        if learning and self._is_due():
            seen = Seen(student.detach(), teacher, truth, weights)
            self._seen, self._factor = seen, None
            if loss.requires_grad:
                loss.register_hook(partial(self._remember_factor, seen))
        return loss, weights

    def _begin(self) -> None:
        """Count a batch that is learned from; before the first, be one policy everywhere."""
        if self._draws == 0:
            replicas.share(self.weighting)
        self._draws += 1
        if self._draws == _IDLE and self._steps == 0 and self._is_due():
            warnings.warn(
                f"{_IDLE} batches were weighed, and the policy learns nothing: spark.learn() is to "
                "be called once a step",
                stacklevel=5,
            )

    def _distances(
        self, weights: Tensor, student: Tensor, teacher: Tensor, truth: Tensor
    ) -> Tensor:
        """mean(W * distance), and with `spark` of the truth with what W leaves."""
        if not self.pulls_to_truth:
            return weighted(weights, _map(self.distance(student, teacher)))
        to_teacher, to_truth = map(_map, shared_maps(self.distance, student, teacher, truth))
        return weighted(weights, to_teacher) + weighted(1 - weights, to_truth)

    def learn(
        self,
        optimizer: optim.Optimizer | None = None,
        student: Callable[..., Tensor] | None = None,
        *inputs: Any,  # noqa: ANN401 - whatever the student takes
        step: Callable[[], object] | None = None,
        unscaled_by: float = 1.0,
    ) -> dict[str, float] | None:
        """Improve the policy, on the steps on which it wants a reward.

        Call it once a step. The preset `spark` compares the outputs that `weigh` has seen, and
        needs nothing: `spark.learn()`. For `spark-paper` there are two ways::

            spark.learn(optimizer, student, lq)    # looks one step ahead, and undoes it
            spark.learn()                          # needs nothing, and is biased

        The first stands between the backward pass and the optimizer's step. It takes the step that
        is due and the same step without allocation, each time restores the last batch, and puts
        everything back. The second pretends that every pixel of the output could move by itself;
        see `steps_of_the_output`.

        Args:
            optimizer: the student's.
            student: a module, or anything that maps `inputs` to the output given to `weigh`. Of a
                module, buffers and gradients are put back too.
            inputs: the batch that was last weighed.
            step: takes the step in place of `optimizer.step`, for what happens before it, such as
                clipping.
            unscaled_by: `scaler.get_scale()`, where a GradScaler is used; after
                `scaler.unscale_(optimizer)`.

        Returns:
            What to log; None on steps without a reward, and where an output or a gradient has
            overflowed, so that a GradScaler will leave the step out.

        Raises:
            SparkirError: called in the wrong place, or the training has diverged.
        """
        due, compares = self._is_due(), self.weighting.compares_at(self._steps)
        self._steps += 1
        seen, self._seen = self._seen, None
        if not due:
            return None
        if seen is None:
            raise SparkirError("spark.learn has nothing to learn from; call spark.weigh before it")
        fine = replicas.everywhere(seen.student.isfinite().all())
        self._overflows = 0 if fine else self._overflows + 1
        if self._overflows == 1:  # may be half precision's; a second time, it is not
            return None
        source = self.weighting
        if compares:
            learn = partial(source.learn_from, seen.student, seen.teacher, seen.target)
            return self._learn(learn, seen.student, "student's output")
        if optimizer is None:
            return self._improve(steps_of_the_output(seen, self.distance), seen)
        if student is None or self._factor is None:
            raise SparkirError(
                "spark.learn(optimizer, student, lq) stands behind loss.backward() and before "
                "optimizer.step(); without student and batch, call spark.learn()"
            )
        if not any(p.grad is not None for p in parameters_of(optimizer)):
            raise SparkirError(
                "spark.learn finds no gradients in its optimizer; call it between loss.backward() "
                "and optimizer.step(), with the optimizer of the student"
            )
        if not replicas.everywhere(_finite(optimizer)):
            return None
        module = student if isinstance(student, nn.Module) else None
        outputs = steps_of_the_student(
            seen,
            self.distance,
            optimizer=optimizer,
            step=step or optimizer.step,
            student=lambda: self._unit(student(*inputs)),
            module=module,
            factor=self.strength * self._factor,
            unscaled_by=unscaled_by,
        )
        return self._improve(outputs, seen)

    def _improve(self, outputs: Outputs, seen: Seen) -> dict[str, float]:
        source = self.weighting
        gain = reward(*outputs, seen.target, alpha=source.alpha, beta=source.beta)
        return self._learn(partial(source.learn, gain), gain, "reward")

    def _learn(
        self, learn: Callable[[], dict[str, float]], found: Tensor, what: str
    ) -> dict[str, float]:
        if not replicas.everywhere(found.isfinite().all()):
            raise SparkirError(
                f"the {what} is {found.mean().item()}: the training has diverged; lower the "
                "learning rate or clip the gradients"
            )
        without_autocast = torch.autocast(found.device.type, enabled=False)
        with replicas.averaged(self.weighting), torch.enable_grad(), without_autocast:
            return learn()

    def _is_due(self) -> bool:
        source, step = self.weighting, self._steps
        return self.training and (source.learns_at(step) or source.compares_at(step))

    def _remember_factor(self, seen: Seen, gradient: Tensor) -> None:
        """What the loss was multiplied by on its way: accumulation, gradient scaling."""
        if seen is self._seen:
            self._factor = gradient.detach()

    def _unit(self, image: Tensor) -> Tensor:
        return image.float() / self.value_range

    @contextmanager
    def _own_generator(self, device: torch.device) -> Iterator[None]:
        seed = _seed_of(self.seed, replicas.rank(), self._draws)
        on_gpu = device.type == "cuda"
        with torch.random.fork_rng([device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)  # torch's own function would seed all devices
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def _check_range(self, what: str, image: Tensor) -> None:
        """A wrong white level trains, and trains the wrong thing."""
        low, high = map(float, image.detach().aminmax())
        white = self.value_range
        if min(low, white - high) < -0.5 * white or (white > 1 and low >= 0 and 0 < high <= 1):
            raise SparkirError(
                f"the {what}'s values reach from {low:g} to {high:g}, but white is {white:g}; "
                "say Spark(value_range=...), 1 or 255, or bring the images to it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Spark:
        """Go where the module that holds it goes, and stay in single precision."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        if isinstance(optimizer := getattr(self.weighting, "optimizer", None), optim.Optimizer):
            optimizer.load_state_dict(optimizer.state_dict())  # it follows its parameters
        return self

    def get_extra_state(self) -> dict[str, int]:
        """How far it is, so that a resumed training draws what it would have drawn."""
        return {"steps": self._steps, "draws": self._draws}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on where the state was saved."""
        self._steps, self._draws = state["steps"], state["draws"]


@contextmanager
def _learning(source: Weighting, learning: bool) -> Iterator[None]:
    """Let a source follow what it sees, or not: without gradients nothing is trained."""
    before = source.training
    source.train(learning and before)
    try:
        yield
    finally:
        source.train(before)


def _seed_of(*numbers: int) -> int:
    """A seed that has nothing to do with those of neighbouring numbers."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _map(distance: Tensor) -> Tensor:
    if distance.dim() != 4:
        raise SparkirError(
            f"the distance gives {distance.dim()} dimensions; it must return a map (B, any, any, "
            'any), to be weighted, such as (student - teacher).abs(), or be a name such as "l1"'
        )
    return distance


def _source(preset: str, options: dict[str, int | float]) -> Weighting:
    if preset not in weightings():
        raise SparkirError(f"no preset {preset!r}; {did_you_mean(preset, weightings())}")
    try:
        return weighting(preset, **options)
    except (TypeError, ValueError) as error:
        raise SparkirError(f"the preset {preset!r} does not take these options: {error}") from error


def _chosen_distance(distance: str | Distance) -> Distance:
    if callable(distance):
        return distance
    if distance not in MAPS:
        raise SparkirError(f"no distance {distance!r}; known: {', '.join(MAPS)}")
    return MAPS[distance]


def _finite(optimizer: optim.Optimizer) -> Tensor:
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    return torch.stack([g.isfinite().all() for g in gradients]).all()
