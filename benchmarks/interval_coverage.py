"""How often the intervals of a comparison hold the truth, with as few seeds and images as it has.

    python benchmarks/interval_coverage.py                 # a minute on one core
    python benchmarks/interval_coverage.py --json result.json

Differences are drawn as a mean plus an effect of each seed, one of each image and one of each seed
on each image, all normal, and `evaluate.statistics.paired_bootstrap` is asked for its 95 %
interval. With one seed, the truth is that of this seed's training on all images, as the tables say;
with more, that of all trainings on all images. Beside it a t interval with Satterthwaite's degrees
of freedom, from the mean squares of the two-way table: how wide it would have to be.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from sparkir.evaluate.statistics import paired_bootstrap

SIZES = ((1, 3), (1, 14), (1, 20), (2, 14), (2, 34), (3, 3), (3, 14), (3, 26), (5, 14), (10, 100))
"""Seeds and images."""
EFFECTS = {
    "images": (0.2, 1.0, 0.5),
    "both alike": (1.0, 1.0, 1.0),
    "seeds": (1.0, 0.2, 0.5),
}
"""What varies most -> deviations of the effects of seed, image, and both."""
TRIALS, RESAMPLES = 2000, 1000


def drawn(
    rng: np.random.Generator, size: tuple[int, int], effects: tuple[float, float, float]
) -> tuple[np.ndarray, float]:
    """Differences (seeds, images), and the truth that an interval should hold."""
    seeds, images = size
    of_seed = effects[0] * rng.standard_normal((seeds, 1))
    of_image = effects[1] * rng.standard_normal((1, images))
    of_both = effects[2] * rng.standard_normal(size)
    return of_seed + of_image + of_both, float(of_seed[0, 0]) if seeds == 1 else 0.0


def by_t(differences: np.ndarray) -> tuple[float, float]:
    """The interval of mean squares."""
    seeds, images = differences.shape
    mean = differences.mean()
    rows, columns = differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    if seeds == 1:
        squares, freedom = [differences.var(ddof=1)], [images - 1]
        signs = [1]
    else:
        rest = differences - rows - columns + mean
        freedom = [seeds - 1, images - 1, (seeds - 1) * (images - 1)]
        sums = [images * ((rows - mean) ** 2).sum(), seeds * ((columns - mean) ** 2).sum()]
        squares = [total / n for total, n in zip([*sums, (rest**2).sum()], freedom, strict=True)]
        signs = [1, 1, -1]
    whole = sum(sign * square for sign, square in zip(signs, squares, strict=True))
    variance = max(whole, squares[-1]) / differences.size
    spread = sum(square**2 / n for square, n in zip(squares, freedom, strict=True))
    half = student_t.ppf(0.975, max(whole, squares[-1]) ** 2 / spread) * variance**0.5
    return mean - half, mean + half


def coverage(size: tuple[int, int], effects: tuple[float, float, float]) -> dict[str, float]:
    """Share of trials in which each interval holds the truth."""
    rng = np.random.default_rng(0)
    held = {"bootstrap": 0, "t": 0}
    for trial in range(TRIALS):
        differences, truth = drawn(rng, size, effects)
        _, low, high = paired_bootstrap(differences, resamples=RESAMPLES, seed=trial)
        held["bootstrap"] += low <= truth <= high
        low, high = by_t(differences)
        held["t"] += low <= truth <= high
    return {name: count / TRIALS for name, count in held.items()}


def main() -> None:
    """Print the table, and keep every figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    to = parser.parse_args().json
    rows = []
    print("Share of intervals called 95 % that hold the truth, bootstrap (t interval)\n")
    print("| seeds x images |", " | ".join(f"{name} vary most" for name in EFFECTS), "|")
    print("|---|" + "---:|" * len(EFFECTS))
    for size in SIZES:
        found = {name: coverage(size, effects) for name, effects in EFFECTS.items()}
        rows.append({"seeds": size[0], "images": size[1]} | found)
        cells = [f"{v['bootstrap']:.0%} ({v['t']:.0%})" for v in found.values()]
        print(f"| {size[0]} x {size[1]} |", " | ".join(cells), "|")
    if to is not None:
        to.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
