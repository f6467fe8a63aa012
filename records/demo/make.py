"""Makes this record again: every control of the demo, paired over seeds.

    python records/demo/make.py            # about forty minutes on one core; resumes if stopped

Each method starts from the same float weights, and for one seed sees the same crops in the same
order for the same number of steps. Every figure is of the integer network on the held-out
photographs. Differences are to QAT, per image and seed, with a bootstrap over both.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from sparkir.assemble import convention_of, gather
from sparkir.evaluate.benchmark import evaluate
from sparkir.evaluate.statistics import paired_bootstrap
from sparkir.measure import baselines
from sparkir.quant.reference import freeze
from sparkir.recipe import Recipe, load
from sparkir.run import train_student, versions

HERE = Path(__file__).parent
SEEDS = (0, 1)
NO_KD = ("distill", "weighting")


def methods() -> dict[str, list[str] | None]:
    """Row -> changes to the demo recipe; None takes the distillation out."""
    uniform = 'weighting.name="uniform"'
    strong = "distill.strength=20.0"
    return {
        "QAT": None,
        "QAT + 20 MSE to the truth (no teacher)": [uniform, strong, 'distill.target="truth"'],
        "QAT + KD, uniform, strength 1": [uniform],
        "QAT + KD, uniform, strength 20": [uniform, strong],
        "QAT + KD, uniform, strength 100": [uniform, "distill.strength=100.0"],
        "constant W = 0.5": ['weighting.name="constant"', "weighting.options.value=0.5"],
        "random W": ['weighting.name="random"'],
        "fixed W, student error": ['weighting.name="fixed:student_error"'],
        "SPARK (paper)": [],
        "SPARK (paper), strength 20": [strong],
    }


def recipe_of(changes: list[str] | None, seed: int) -> Recipe:
    """The demo recipe for one method and seed."""
    recipe = load("demo", [f"seed={seed}", "train.evaluate_every=0", *(changes or ())])
    if changes is None:
        fields = {name: Recipe.model_fields[name].default for name in NO_KD}
        return recipe.model_copy(update=fields)
    return recipe


def main() -> None:
    """Train what is not trained yet, then write the table."""
    runs = Path("runs") / "records-demo"
    materials = gather(load("demo"))
    convention = convention_of(load("demo"))
    scores: dict[str, list[list[float]]] = {}
    similarity: dict[str, list[list[float]]] = {}
    for contender in baselines(load("demo"), materials):
        found = evaluate(contender.restorer, materials.test, convention)
        scores[contender.name] = [[s.psnr_db for s in found]]
        similarity[contender.name] = [[s.ssim for s in found]]
    for done, seed in enumerate(SEEDS, 1):
        for name, changes in methods().items():
            folder = runs / f"{seed}-{name.replace(' ', '-')}"
            trained = train_student(recipe_of(changes, seed), materials, folder)
            found = evaluate(freeze(trained.student), materials.test, convention)
            scores.setdefault(name, []).append([s.psnr_db for s in found])
            similarity.setdefault(name, []).append([s.ssim for s in found])
            print(f"seed {seed}  {name:40} {np.mean(scores[name][-1]):.3f} dB", flush=True)
        write(scores, similarity, materials.test.names, SEEDS[:done])


def write(
    scores: dict[str, list[list[float]]],
    similarity: dict[str, list[list[float]]],
    images: tuple[str, ...],
    seeds: tuple[int, ...],
) -> None:
    """Everything found so far."""
    convention = convention_of(load("demo"))
    values = {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "convention": convention.label,
        "images": list(images),
        "seeds": list(seeds),
        "psnr_db": scores,
        "ssim": similarity,
    }
    (HERE / "result.json").write_text(json.dumps(values, indent=1) + "\n")
    (HERE / "result.md").write_text(table(scores, similarity, convention.label))


def table(
    scores: dict[str, list[list[float]]], similarity: dict[str, list[list[float]]], label: str
) -> str:
    """Markdown, one row a method."""
    seeds = len(scores["QAT"])
    lines = [
        f"{label}; SSIM alike. Mean over 3 photographs and, where trained, {seeds} seeds.",
        "",
        "| method | PSNR dB | SSIM | difference to QAT, dB | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    base = np.array(scores["QAT"])
    for name, values in scores.items():
        row = np.array(values)
        cells = [name, f"{row.mean():.3f}", f"{np.mean(similarity[name]):.4f}"]
        if row.shape == base.shape and name != "QAT":
            found = paired_bootstrap(row - base)
            cells += [f"{found.mean:+.3f}", f"{found.low:+.3f} .. {found.high:+.3f}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
