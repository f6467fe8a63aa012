"""The policy: difficulty maps -> a Gaussian over the weight of every cell."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.spark.batch import normal, of_all


class Action(NamedTuple):
    """One draw from the policy."""

    features: Float[Tensor, "b k g g"]
    """What the policy saw."""
    sample: Float[Tensor, "b 1 g g"]
    """The draw before the clamp, whose probability is known."""

    @property
    def weights(self) -> Float[Tensor, "b 1 g g"]:
        """W, the draw clamped to [0, 1]; carries no gradient."""
        return self.sample.clamp(0, 1)

    def of_all(self) -> Action:
        """The draws for the whole batch, where several processes share it."""
        return Action(of_all(self.features), of_all(self.sample))


class Policy(nn.Module):
    """Three 3 x 3 convolutions and one learned standard deviation.

    unspecified in the paper: widths, activations, that sigma is one number, and where mu starts.
    """

    def __init__(
        self, channels: int = 4, *, width: int = 16, sigma: float = 0.2, start: float = 0.5
    ) -> None:
        """Start with mu = `start` in every cell, whatever the features.

        Raises:
            ValueError: `sigma` is not above 0.
        """
        super().__init__()
        if sigma <= 0:
            raise ValueError(f"sigma = {sigma!r}: give a number above 0")
        last = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, start)  # type: ignore[arg-type]
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            last,
        )
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)))

    def forward(
        self, features: Float[Tensor, "b k g g"]
    ) -> tuple[Float[Tensor, "b 1 g g"], Float[Tensor, ""]]:
        """(mu per cell, sigma)."""
        return self.body(features), self.log_sigma.exp()

    @torch.no_grad()
    def act(self, features: Float[Tensor, "b k g g"]) -> Action:
        """Draw W ~ N(mu, sigma), independently per cell."""
        mu, sigma = self(features)
        return Action(features, mu + sigma * normal(tuple(mu.shape), device=mu.device))

    def log_probability(self, action: Action) -> Float[Tensor, " b"]:
        """log N(sample; mu, sigma), summed over cells, with gradient to the policy.

        unspecified in the paper: of the draw before the clamp; the clamped one has no density.
        """
        mu, sigma = self(action.features)
        standard = (action.sample - mu) / sigma
        density = -0.5 * standard.square() - self.log_sigma - 0.5 * math.log(2 * math.pi)
        total: Tensor = density.sum(dim=(1, 2, 3))
        return total

    def entropy(self) -> Float[Tensor, ""]:
        """Entropy of one cell's Gaussian, in nats."""
        return self.log_sigma + 0.5 * math.log(2 * math.pi * math.e)
