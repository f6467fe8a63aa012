import numpy as np
import pytest

from sparkir.errors import SparkirError
from sparkir.evaluate.statistics import _resampled_means, paired_bootstrap


def slow_bootstrap(differences, resamples, seed):
    """Draw the seeds, draw the images, average all their pairs; again and again."""
    rng = np.random.default_rng(seed)
    seeds, images = differences.shape
    means = []
    for _ in range(resamples):
        drawn_seeds = rng.integers(seeds, size=seeds)
        drawn_images = rng.integers(images, size=images)
        means.append(np.mean([[differences[s, i] for i in drawn_images] for s in drawn_seeds]))
    return np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize(("between_seeds", "between_images"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.5)])
def test_interval_is_that_of_the_slow_bootstrap(between_seeds, between_images):
    rng = np.random.default_rng(3)
    differences = (
        0.2
        + between_seeds * rng.normal(size=(4, 1))
        + between_images * rng.normal(size=(1, 7))
        + 0.1 * rng.normal(size=(4, 7))
    )
    low, high = slow_bootstrap(differences, 4000, seed=1)
    interval = paired_bootstrap(differences, resamples=20_000)
    assert interval.mean == pytest.approx(differences.mean())
    # Both ends are estimates from some thousand resamples: 5 % of the width is several of their
    # standard errors, and far less than leaving out either level would move them.
    assert interval.low == pytest.approx(low, abs=0.05 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.05 * (high - low))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        differences = rng.normal(1.0, 0.5, (1, 40))
        interval = paired_bootstrap(differences, resamples=500, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 180 <= covered <= 198


def test_same_arguments_give_the_same_interval_and_constants_have_no_width():
    differences = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    assert paired_bootstrap(differences) == paired_bootstrap(differences)
    assert paired_bootstrap(differences) != paired_bootstrap(differences, seed=1)
    assert paired_bootstrap(np.full((2, 3), 0.5)) == pytest.approx((0.5, 0.5, 0.5))


def test_resamples_beyond_one_portion_are_all_drawn():
    means = _resampled_means(np.eye(3), 2500, np.random.default_rng(0))
    assert means.shape == (2500,)


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        (np.zeros((0, 3)), "at least one seed"),
        (np.array([[0.0, np.nan]]), "NaN or infinite"),
        (np.array([[np.inf]]), "NaN or infinite"),
    ],
)
def test_differences_without_a_mean_are_refused(differences, message):
    with pytest.raises(SparkirError, match=message):
        paired_bootstrap(differences)


def test_no_resamples_are_refused():
    with pytest.raises(SparkirError, match="resamples >= 1"):
        paired_bootstrap(np.ones((1, 2)), resamples=0)
