"""How sure a difference is, given that both the seeds and the images could have been others."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sparkir.errors import SparkirError

_LEVEL_PERCENT = 95.0
_RESAMPLES_AT_ONCE = 1000  # bounds the memory to this many rows of images


class Interval(NamedTuple):
    """A mean and its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    differences: Float[np.ndarray, "seeds images"], *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean paired difference with its 95 % interval over seeds and images.

    Percentile bootstrap (Efron 1979) with both levels resampled with replacement, independently
    of each other: each resample draws as many seeds and as many images as there are, and
    averages the differences of every drawn seed on every drawn image. With a single seed the
    interval covers the images alone, and cannot speak of other trainings.

    Args:
        differences: figure of one method minus that of the other, on the same image and seed.
        resamples: number of bootstrap resamples.
        seed: of the resampling; the result is a function of the arguments.

    Raises:
        SparkirError: there are no differences, or some are NaN or infinite.
    """
    if differences.size == 0:
        raise SparkirError("a bootstrap needs at least one seed and one image")
    if not np.isfinite(differences).all():
        raise SparkirError(
            "some paired differences are NaN or infinite (equal images have infinite PSNR); "
            "leave those images out of both methods"
        )
    if resamples < 1:
        raise SparkirError(f"a bootstrap needs resamples >= 1, got {resamples}")
    exact = differences.astype(np.float64)
    means = _resampled_means(exact, resamples, np.random.default_rng(seed))
    tail = (100 - _LEVEL_PERCENT) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(exact.mean()), float(low), float(high))


def _resampled_means(
    differences: Float[np.ndarray, "seeds images"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    """Return one mean per resample; how often each row and column is drawn is all that counts."""
    parts = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - start)
        seed_counts, image_counts = (
            rng.multinomial(size, np.full(size, 1 / size), size=count) for size in differences.shape
        )
        parts.append(((seed_counts @ differences) * image_counts).sum(axis=1) / differences.size)
    return np.concatenate(parts)
