"""Where W comes from: SPARK's policy, and the controls it has to beat.

Every source maps (student, teacher, target) to a weight map over the image, which multiplies a
per-location distillation loss. Most are fixed; `SparkPaper` learns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn, optim

from sparkir.errors import SparkirError
from sparkir.spark.batch import normal, of_all
from sparkir.spark.difficulty import (
    FEATURES,
    Standardize,
    difficulty_maps,
    rightness,
    to_cells,
)
from sparkir.spark.policy import Action, Policy
from sparkir.spark.reward import parameters_of
from sparkir.spark.trust import Trust

_BOUND = 1.5
"""Of the logarithm of a wish: no cell counts more than e**3 times as much as another."""

_SMALLEST_DEVIATION = 0.01
"""Of the teacher's rightness over the cells; what differs by less is alike."""


def to_pixels(weights: Float[Tensor, "b 1 g g"], size: tuple[int, int]) -> Float[Tensor, "b 1 h w"]:
    """W on the grid -> W on the image, of which `to_cells` made the cells.

    unspecified in the paper: bilinear.
    """
    whole = [side + -side % cells for side, cells in zip(size, weights.shape[-2:], strict=True)]
    smooth = F.interpolate(weights, size=whole, mode="bilinear", align_corners=False)
    return smooth[..., : size[0], : size[1]]


class Weighting(nn.Module):
    """A source of W. Maps are detached and of shape (B, 1, H, W)."""

    alpha, beta = 1.0, 10.0
    """What a learning source's reward is made of: per dB of PSNR, and per unit of SSIM."""

    def forward(
        self,
        student: Float[Tensor, "b c h w"],
        teacher: Float[Tensor, "b c h w"],
        target: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b 1 h w"]:
        """The weight of every pixel; all images in [0, 1]."""
        raise NotImplementedError

    def learns_at(self, step: int) -> bool:
        """Whether `learn` wants a reward for the map made at `step`."""
        return False

    def learn(self, reward: Float[Tensor, " b"]) -> dict[str, float]:
        """Improve with the reward of the last map; returns what to log."""
        raise NotImplementedError

    def compares_at(self, step: int) -> bool:
        """Whether the source learns at `step` by comparing the images that its map was made of."""
        return False

    def learn_from(
        self,
        student: Float[Tensor, "b c h w"],
        teacher: Float[Tensor, "b c h w"],
        target: Float[Tensor, "b c h w"],
    ) -> dict[str, float]:
        """Improve by comparing these images, those of the last map; returns what to log."""
        raise NotImplementedError


class Constant(Weighting):
    """The same weight everywhere: 1 is plain distillation, SPARK's mean W its matched control."""

    def __init__(self, value: float = 1.0) -> None:
        """W = value."""
        super().__init__()
        self.value = value

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """W = value at every pixel."""
        shape = (student.shape[0], 1, *student.shape[-2:])
        return torch.full((1, 1, 1, 1), self.value, device=student.device).expand(shape)


class Random(Weighting):
    """Noise with the distribution of SPARK's W: what is left of it without the policy."""

    def __init__(self, *, mean: float = 0.5, sigma: float = 0.2, grid: int = 8) -> None:
        """W = clamp(N(mean, sigma)) per cell, to [0, 1]."""
        super().__init__()
        self.mean, self.sigma, self.grid = mean, sigma, grid

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """A fresh map for every image."""
        shape = (student.shape[0], 1, self.grid, self.grid)
        draw = self.mean + self.sigma * normal(shape, device=student.device)
        return to_pixels(draw.clamp(0, 1), (student.shape[-2], student.shape[-1]))


class Fixed(Weighting):
    """One difficulty signal, used as it is: SPARK without its policy."""

    def __init__(
        self, feature: str, *, mean: float = 0.5, sigma: float = 0.2, grid: int = 8
    ) -> None:
        """W = clamp(mean + sigma * the standardized feature) per cell."""
        super().__init__()
        self.index = FEATURES.index(feature)
        self.mean, self.sigma, self.grid = mean, sigma, grid
        self.standardize = Standardize()

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """More weight where the feature is high."""
        maps = difficulty_maps(student, teacher, target, grid=self.grid)
        signal = self.standardize(maps)[:, self.index : self.index + 1]
        weights = (self.mean + self.sigma * signal).clamp(0, 1)
        return to_pixels(weights, (student.shape[-2], student.shape[-1]))


class Confidence(Weighting):
    """Less weight where the teacher is wrong: clip(exp(-10 |T - G|), 0.1, 0.75) (2604.20291)."""

    @torch.no_grad()
    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Per pixel, from the mean error over channels."""
        error = (teacher - target).abs().mean(1, keepdim=True)
        return (-10 * error).exp().clamp(0.10, 0.75)


ONE_IMAGE = (
    "spark-paper learns by comparing the images of a batch, and there is only one; "
    "make batches of two or more"
)


class SparkPaper(Weighting):
    """SPARK as published (arXiv 2606.15243), REINFORCE on the 8 x 8 grid.

    What is marked `unspecified in the paper` is our choice, here and in the modules it uses.
    """

    def __init__(
        self,
        *,
        grid: int = 8,
        sigma: float = 0.2,
        reward_every: int = 12,
        learning_rate: float = 2e-3,
        entropy_bonus: float = 1e-2,
        alpha: float = 1.0,
        beta: float = 10.0,
    ) -> None:
        """Make an untrained policy.

        Args:
            grid: cells per side.
            sigma: the policy's first standard deviation.
            reward_every: steps between two rewards, each of which costs about a step and a quarter.
                What counts for learning is the number of rewards times `learning_rate`.
            learning_rate: of the policy's Adam.
            entropy_bonus: reward for staying random, per nat and cell.
            alpha: reward per dB of PSNR gained; unspecified in the paper.
            beta: reward per unit of SSIM gained; unspecified in the paper.
        """
        super().__init__()
        self.grid, self.reward_every, self.entropy_bonus = grid, reward_every, entropy_bonus
        self.alpha, self.beta = alpha, beta
        self.standardize = Standardize()
        self.policy = Policy(sigma=sigma).requires_grad_(False)
        self.optimizer = optim.Adam(self.policy.parameters(), lr=learning_rate)
        self._action: Action | None = None

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Draw W from the policy; in evaluation its mean."""
        maps = difficulty_maps(student, teacher, target, grid=self.grid)
        features = self.standardize(maps)
        if self.training:
            self._action = self.policy.act(features)
            weights = self._action.weights
        else:
            with torch.no_grad():
                weights = self.policy(features)[0].clamp(0, 1)
        return to_pixels(weights, (student.shape[-2], student.shape[-1]))

    def learns_at(self, step: int) -> bool:
        """Every `reward_every`-th step, unspecified in the paper."""
        return step % self.reward_every == 0

    def learn(self, reward: Float[Tensor, " b"]) -> dict[str, float]:
        """One REINFORCE step on the last draw, the same in every process that shares the batch.

        unspecified in the paper: the estimator, the baseline (the batch's mean, divided by its
        deviation), the entropy bonus and the optimizer.
        """
        assert self._action is not None, "learn follows a forward in training"
        with _asking_for_gradients(self.optimizer):
            return self._reinforce(self._action.of_all(), of_all(reward))

    def _reinforce(self, action: Action, reward: Float[Tensor, " b"]) -> dict[str, float]:
        if reward.numel() == 1:
            raise SparkirError(ONE_IMAGE)
        reward = reward.double()  # equal float32 rewards may differ from their rounded mean
        deviation = reward.std(unbiased=False)
        advantage = (reward - reward.mean()) / (deviation + 1e-8)
        log_probability = self.policy.log_probability(action)
        cells = action.sample[0].numel()
        gain = (advantage.detach() * log_probability).mean() / cells
        loss = -(gain + self.entropy_bonus * self.policy.entropy())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {
            "reward": float(reward.mean()),
            "reward_deviation": float(deviation),
            "advantage_max": float(advantage.abs().max()),
            "log_probability": float(log_probability.detach().mean()),
            "policy_loss": float(loss.detach()),
            "entropy": float(self.policy.entropy().detach()),
            "sigma": float(self.policy.log_sigma.detach().exp()),
        }

    def get_extra_state(self) -> dict[str, object]:
        """The policy's optimizer travels with it."""
        return {"optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, object]) -> None:
        """Restore the policy's optimizer."""
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]


class Spark(Weighting):
    """Our own: W is how far to believe the teacher, and the rest of 1 is for the truth.

    What differs from the paper, and why:

    * W is a trust times an allocation, exp(a) / mean(exp(a)) for each image, at most 1.
    * The trust (`trust.Trust`) falls as the student comes near what the teacher can teach, and to
      nothing under a teacher that leads away from the truth. To be used with a distillation whose
      target is `both`, which pulls to the truth what W leaves.
    * Every cell's teacher is right or wrong by itself (`difficulty.rightness`), so that the policy
      follows the exact gradient of what it stands to gain; nothing need be drawn, and no step
      looked ahead. A bonus on the entropy of the allocation keeps it near uniform.
    * The policy also sees the teacher's error: where not to imitate.
    """

    def __init__(
        self,
        *,
        grid: int = 8,
        reward_every: int = 8,
        learning_rate: float = 1e-3,
        entropy_bonus: float = 1.0,
    ) -> None:
        """Make an untrained policy, whose allocation is uniform.

        Args:
            grid: cells per side.
            reward_every: steps between two moves of the policy, which cost next to nothing.
            learning_rate: of the policy's Adam.
            entropy_bonus: how much rightness, in deviations, an uneven allocation must earn.
        """
        super().__init__()
        self.grid, self.reward_every, self.entropy_bonus = grid, reward_every, entropy_bonus
        signals = len(FEATURES) + 1
        self.trust = Trust()
        self.standardize = Standardize(signals)
        self.policy = Policy(signals, start=0.0).requires_grad_(False)
        # Without its sigma: nothing is drawn.
        self.optimizer = optim.Adam(self.policy.body.parameters(), lr=learning_rate)
        self._features: Tensor | None = None

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The trust times the policy's allocation; in training, the trust follows the batch."""
        maps = difficulty_maps(student, teacher, target, grid=self.grid)
        teacher_error = to_cells((teacher - target).abs().mean(1, keepdim=True), self.grid).mean(-1)
        features = self.standardize(torch.cat([maps, teacher_error], 1))
        if self.training:
            self._features = features
            self.trust.follow(student, teacher, target)
        with torch.no_grad():
            weights = (self.trust.value * self._allocation(features).exp()).clamp(max=1)
        return to_pixels(weights, (student.shape[-2], student.shape[-1]))

    def compares_at(self, step: int) -> bool:
        """Every `reward_every`-th step."""
        return step % self.reward_every == 0

    def learn_from(self, student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, float]:
        """One step of the policy, the same in every process that shares the batch.

        Up the gradient of mean(W * rightness) + entropy_bonus * entropy(W), with the rightness of a
        cell beyond its image's, in deviations.
        """
        assert self._features is not None, "learn_from follows a forward in training"
        right = rightness(student, teacher, target, grid=self.grid)
        trust = {"trust": float(self.trust.value), "correlation": float(self.trust.correlation)}
        with _asking_for_gradients(self.optimizer):
            return trust | self._learn_where(of_all(right))

    def _learn_where(self, right: Float[Tensor, "b 1 g g"]) -> dict[str, float]:
        assert self._features is not None
        beyond = right - right.mean(dim=(2, 3), keepdim=True)
        standard = beyond / beyond.square().mean().sqrt().clamp_min(_SMALLEST_DEVIATION)
        logarithm = self._allocation(of_all(self._features))
        weights = logarithm.exp()
        gain, divergence = (weights * standard).mean(), (weights * logarithm).mean()
        loss = self.entropy_bonus * divergence - gain
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {
            "gain": float(gain.detach()),
            "divergence": float(divergence.detach()),
            "policy_loss": float(loss.detach()),
        }

    def _allocation(self, features: Tensor) -> Float[Tensor, "b 1 g g"]:
        """log W, with mean(W) = 1 over each image's cells."""
        wish = _BOUND * torch.tanh(self.policy(features)[0] / _BOUND)
        return wish - wish.exp().mean(dim=(2, 3), keepdim=True).log()

    def get_extra_state(self) -> dict[str, object]:
        """The policy's optimizer travels with it."""
        return {"optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, object]) -> None:
        """Restore the policy's optimizer."""
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]


@contextmanager
def _asking_for_gradients(optimizer: optim.Optimizer) -> Iterator[None]:
    """Of a policy, which outside of this is no matter of the student's loss and optimizer.

    Where a module that holds it is wrapped for several processes, every parameter that asks for a
    gradient has to get one from the loss.
    """
    parameters = parameters_of(optimizer)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


_SOURCES: dict[str, Callable[..., Weighting]] = {
    "uniform": Constant,
    "constant": Constant,
    "random": Random,
    "confidence": Confidence,
    "spark-paper": SparkPaper,
    "spark": Spark,
} | {f"fixed:{name}": (lambda name=name, **options: Fixed(name, **options)) for name in FEATURES}


def weightings() -> tuple[str, ...]:
    """The names that `weighting` knows."""
    return tuple(_SOURCES)


def described() -> dict[str, str]:
    """Every source and the first line of what it says of itself."""
    return {name: (_kind(name).__doc__ or "").partition("\n")[0] for name in _SOURCES}


def _kind(name: str) -> Callable[..., Weighting]:
    return Fixed if name.startswith("fixed:") else _SOURCES[name]


def options_of(name: str) -> dict[str, int | float]:
    """The options of a source by name, and what they are unless given."""
    parameters = inspect.signature(_kind(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def weighting(name: str, **options: int | float) -> Weighting:
    """A source of W by name, with its own options.

    Raises:
        KeyError: no such source.
        TypeError: an option that the source does not have.
        ValueError: an option's value that it cannot take.
    """
    known, chosen = options_of(name), dict(options)
    for option, value in options.items():
        whole = isinstance(value, int) and value >= 1
        if isinstance(known.get(option), int) and not whole:
            raise ValueError(f"{option} = {value!r}: give a whole number >= 1")
        if isinstance(known.get(option), float):
            if not 0 <= value < math.inf:
                raise ValueError(f"{option} = {value!r}: give a number >= 0")
            chosen[option] = float(value)  # of TOML, 1 is a whole number
    return _SOURCES[name](**chosen)
