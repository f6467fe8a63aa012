"""How fast the policy of `spark-paper` learns when rewards are rare, and what a higher rate mends.

    python benchmarks/reward_period.py                     # the table, minutes on one core
    python benchmarks/reward_period.py --json result.json

A task whose best allocation is known. The student is the picture itself, every pixel a parameter,
so that what a place is taught stays there; the teacher is right on the left and wrong on the right
of every picture, and each step brings new ones. A policy that has understood takes its weight from
the right. Printed is its mean weight on the left less that on the right, of pictures that it has
not seen. What rewards cost is in train_step.py: about one step and a quarter each.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn, optim

from sparkir import Spark

CHOICES = (
    *((period, 1e-3) for period in (1, 4, 8, 12, 16)),
    *((period, 2e-3) for period in (8, 12, 16)),
    *((period, 3e-3) for period in (8, 12, 16)),
)
"""Steps between two rewards, and the policy's learning rate."""
STEPS = (120, 240, 480, 960)
SEEDS = 12
BATCH, SIDE_PX = 8, 64
NOISE, WRONG = 0.1, 0.2
STRENGTH, RATE = 5.0, 800.0
"""Of the distillation, and of a pixel: one step takes a part of the error away."""


def pictures(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, truth), (BATCH, 3, SIDE_PX, SIDE_PX) each."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.rand(BATCH, 3, SIDE_PX, SIDE_PX, generator=draw)
    student = truth + NOISE * torch.randn(truth.shape, generator=draw)
    wrong = WRONG * torch.sign(truth - 0.5)
    wrong[..., : SIDE_PX // 2] = 0
    return student.clamp(0, 1), truth + wrong, truth


def preference(spark: Spark) -> float:
    """Weight on the left above that on the right."""
    left, right = spark.eval().weigh(*pictures(2**31))[1].chunk(2, dim=-1)
    spark.train()
    return float((left - right).mean())


def learned(period: int, rate: float, seed: int) -> list[float]:
    """The preference after each of STEPS."""
    torch.manual_seed(seed)
    options = {"reward_every": period, "learning_rate": rate}
    spark = Spark("spark-paper", strength=STRENGTH, seed=seed, **options)
    found = []
    for step in range(1, STEPS[-1] + 1):
        student, teacher, truth = pictures(seed * STEPS[-1] + step)
        picture = nn.Parameter(student)
        optimizer = optim.SGD([picture], lr=RATE)
        distillation, _ = spark.weigh(picture, teacher, truth)
        ((picture - truth).abs().mean() + distillation).backward()
        spark.learn(optimizer, lambda picture=picture: picture)
        if step in STEPS:
            found.append(preference(spark))
    return found


def main() -> None:
    """Every choice with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    file = parser.parse_args().json
    torch.set_num_threads(1)
    print(f"preference after {', '.join(map(str, STEPS))} steps: mean +- error of the mean")
    rows = []
    for period, rate in CHOICES:
        seeds = [learned(period, rate, seed) for seed in range(SEEDS)]
        facts = {"reward_every": period, "learning_rate": rate}
        rows.append(facts | {"steps": STEPS, "preference_of_seeds": seeds})
        columns = list(zip(*seeds, strict=True))
        errors = [statistics.stdev(column) / SEEDS**0.5 for column in columns]
        cells = [
            f"{statistics.mean(c):.2f} +- {e:.2f}" for c, e in zip(columns, errors, strict=True)
        ]
        print(f"every {period:2}, rate {rate:g}: {', '.join(cells)}", flush=True)
    if file is not None:
        result = {"torch": torch.__version__, "seeds": SEEDS, "rows": rows}
        file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
