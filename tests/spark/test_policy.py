import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from sparkir.spark.policy import Action, Policy


@pytest.fixture
def trained() -> Policy:
    """A policy that has an opinion: mu differs in every cell."""
    policy = Policy(sigma=0.3)
    with torch.no_grad():
        for parameter in policy.body.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("size", [1, 4, 8, 13])
def test_starts_at_exactly_one_half_everywhere(size):
    for scale in (0.0, 1.0, 1e4):
        mu, sigma = Policy()(scale * torch.randn(3, 4, size, size))
        assert mu.shape == (3, 1, size, size)
        assert (mu == 0.5).all()
        assert sigma.item() == pytest.approx(0.2)


def test_is_three_convolutions_of_the_published_kind():
    convolutions = [m for m in Policy().modules() if isinstance(m, nn.Conv2d)]
    widths = [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions]
    assert widths == [(4, 16, (3, 3)), (16, 16, (3, 3)), (16, 1, (3, 3))]


def test_log_probability_by_hand():
    """One sigma off in each of 64 cells: 64 * (-1/2 - ln 0.2 - ln(2 pi) / 2)."""
    action = Action(torch.randn(2, 4, 8, 8), torch.full((2, 1, 8, 8), 0.7))
    log_probability = Policy(sigma=0.2).log_probability(action)
    assert log_probability.tolist() == pytest.approx([12.19196027] * 2, rel=1e-5)


def test_log_probability_and_its_gradient_against_torch(trained):
    action = trained.act(torch.randn(5, 4, 8, 8))
    found = trained.log_probability(action)
    mu, sigma = trained(action.features)
    expected = Normal(mu, sigma).log_prob(action.sample).sum((1, 2, 3))
    torch.testing.assert_close(found, expected)
    weights, parameters = torch.randn(5), list(trained.parameters())
    for a, b in zip(
        torch.autograd.grad(found @ weights, parameters),
        torch.autograd.grad(expected @ weights, parameters),
        strict=True,
    ):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 3.0])
def test_entropy_is_of_one_cell(sigma):
    expected = Normal(torch.tensor(0.5), torch.tensor(sigma)).entropy()
    torch.testing.assert_close(Policy(sigma=sigma).entropy(), expected)


class TestAct:
    def test_draws_follow_mu_and_sigma(self, trained):
        features = torch.randn(1, 4, 8, 8)
        mu, sigma = trained(features)
        samples = torch.cat([trained.act(features).sample for _ in range(2000)])
        standard = ((samples - mu) / sigma).detach().numpy()
        error = 1 / math.sqrt(2000)
        np.testing.assert_allclose(standard.mean(0), 0, atol=5 * error)
        np.testing.assert_allclose(standard.std(0), 1, atol=5 * error)

    def test_cells_and_images_are_independent(self, trained):
        sample = trained.act(torch.zeros(500, 4, 8, 8)).sample.flatten(1).numpy()
        correlation = np.corrcoef(sample[:, :10].T) - np.eye(10)
        assert np.abs(correlation).max() < 0.25
        assert len(np.unique(sample)) > 0.99 * sample.size

    def test_weights_are_the_sample_clamped(self):
        action = Policy(sigma=2.0).act(torch.randn(4, 4, 8, 8))
        assert action.sample.min() < 0
        assert action.sample.max() > 1
        assert action.weights.min() == 0
        assert action.weights.max() == 1
        inside = (action.sample > 0) & (action.sample < 1)
        assert inside.any()
        assert torch.equal(action.weights[inside], action.sample[inside])

    def test_carries_no_gradient_and_remembers_the_features(self, trained):
        features = torch.randn(2, 4, 8, 8)
        action = trained.act(features)
        assert not action.sample.requires_grad
        assert not action.weights.requires_grad
        assert action.features is features

    def test_equal_seeds_draw_equally(self, trained):
        features = torch.randn(2, 4, 8, 8)
        torch.manual_seed(7)
        first = trained.act(features).sample
        torch.manual_seed(7)
        assert torch.equal(trained.act(features).sample, first)
        assert not torch.equal(trained.act(features).sample, first)
