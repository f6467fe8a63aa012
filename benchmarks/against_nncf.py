"""A network in 8 bits on OpenVINO: made by NNCF, and made here, side by side.

    python benchmarks/against_nncf.py RECIPE [KEY=VALUE ...] [--seeds N] [--json result.json]

The recipe's student, as it is and trained: calibrated on the same crops, trained on the same
batches with the same optimizer, rates and steps. NNCF quantizes by its defaults, and by its preset
of asymmetric grids for activations, in OpenVINO where nothing is trained and in torch where it is;
here the target is `openvino`. Every row is what OpenVINO computes from the file, floating point in
float32. Beside the PSNR: how many values of the test images are not those that the network as
trained shows, and latency, in turn, of one thread.

Needs `nncf`, and for its `strip` torchao; a C++ compiler for its first training step.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import nncf
import numpy as np
import openvino
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from sparkir.assemble import Materials, convention_of, gather, quantize_student
from sparkir.deploy.bench import interleaved
from sparkir.deploy.onnx import to_float_onnx, to_onnx, write_model
from sparkir.deploy.session import OpenVinoSession, openvino_core
from sparkir.evaluate.benchmark import evaluate
from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.metrics import to_uint8
from sparkir.evaluate.statistics import paired_bootstrap
from sparkir.models.facts import facts_of
from sparkir.quant.reference import freeze
from sparkir.recipe import Recipe, load
from sparkir.run import qat_only, train_student, training_of
from sparkir.train.optimize import rate_factor

LATENCY_PX, REPEATS = 128, 15
BASELINE = "NNCF, trained"
PERFORMANCE, MIXED = nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED
"""Its default, symmetric grids throughout; and asymmetric ones for activations."""


@dataclass
class Made:
    """A file, and what its makers believe that it computes."""

    file: Path
    as_trained: Callable[[np.ndarray], np.ndarray] | None = None
    cpu_s: float = 0.0
    psnr_db: list[float] = field(default_factory=list)
    differing: float | None = None
    """Share of the test images' values that differ from those as trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load(chosen.recipe, chosen.settings)
    materials = gather(recipe)
    with tempfile.TemporaryDirectory() as folder:
        seeds = []
        for seed in range(chosen.seeds):
            made = rows(recipe.model_copy(update={"seed": seed}), materials, Path(folder))
            for name, row in made.items():
                measure(row, materials, recipe)
                say(f"seed {seed}: {name} {statistics.mean(row.psnr_db):.3f}")
            seeds.append(made)
        result = summary(recipe, seeds, latency_ms(seeds[0], materials))
    print(to_text(result))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


def rows(recipe: Recipe, materials: Materials, folder: Path) -> dict[str, Made]:
    """Every way to a file, by name."""
    here = folder / str(recipe.seed)
    here.mkdir()
    ways: dict[str, Callable[[Path], Made]] = {
        "float": lambda path: in_float(materials, path),
        "NNCF": lambda path: calibrated_by_nncf(materials, path, PERFORMANCE),
        "NNCF, mixed": lambda path: calibrated_by_nncf(materials, path, MIXED),
        "NNCF, trained": lambda path: trained_by_nncf(recipe, materials, path, PERFORMANCE),
        "NNCF, mixed, trained": lambda path: trained_by_nncf(recipe, materials, path, MIXED),
        "sparkir": lambda path: calibrated_here(recipe, materials, path),
        "sparkir, trained": lambda path: trained_here(qat_only(recipe), materials, path),
        "sparkir, trained under the teacher": lambda path: trained_here(recipe, materials, path),
    }
    made = {}
    for name, way in ways.items():
        began_s = time.process_time()
        made[name] = way(here / name.replace(", ", "-").replace(" ", "-"))
        made[name].cpu_s = time.process_time() - began_s
        say(f"{name}: {made[name].cpu_s:.0f} s")
    return made


# NNCF -----------------------------------------------------------------------------------------


def in_float(materials: Materials, path: Path) -> Made:
    file = path.with_suffix(".onnx")
    write_model(to_float_onnx(materials.student), file)
    return Made(file, lambda lq: restore_image(materials.student, lq))


def calibrated_by_nncf(materials: Materials, path: Path, preset: nncf.QuantizationPreset) -> Made:
    crops = [crop.numpy() for crop in as_read(materials)]
    in_float(materials, path)
    model = openvino_core().read_model(path.with_suffix(".onnx"))
    dataset = nncf.Dataset(crops)
    quantized = nncf.quantize(model, dataset, preset=preset, subset_size=len(crops))
    return Made(saved(quantized, path))


def trained_by_nncf(
    recipe: Recipe, materials: Materials, path: Path, preset: nncf.QuantizationPreset
) -> Made:
    """NNCF's calibration, and then steps like those of `sparkir, trained`."""
    _, state = training_of(qat_only(recipe), materials)
    sampler, settings, facts = state.sampler, recipe.train, facts_of(materials.student)
    crops = as_read(materials)
    student = nncf.quantize(
        copy.deepcopy(materials.student).eval(),
        nncf.Dataset(crops),
        preset=preset,
        subset_size=len(crops),
    )
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), lr=settings.learning_rate)
    for step in range(settings.steps):
        lq, gt = (images.float() / 255 for images in sampler.next()[:2])
        factor = rate_factor(
            step, steps=settings.steps, schedule=settings.schedule, warmup=settings.warmup
        )
        optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
        output = student(lq * facts.value_range) / facts.value_range
        optimizer.zero_grad()
        l1_loss(output, gt).backward()
        optimizer.step()
        if step % 20 == 0:
            say(f"NNCF step {step}")
    student.eval()
    stripped = nncf.strip(student, example_input=crops[0])
    model = openvino.convert_model(stripped, example_input=crops[0])

    def as_trained(lq: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return to_image(student(to_input(lq, facts.value_range)), facts.value_range)

    return Made(saved(model, path), as_trained)


def saved(model: openvino.Model, path: Path) -> Path:
    openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)
    return path.with_suffix(".xml")


# sparkir --------------------------------------------------------------------------------------


def calibrated_here(recipe: Recipe, materials: Materials, path: Path) -> Made:
    assert recipe.quant is not None
    return exported(quantize_student(materials.student, recipe.quant, materials.crops), path)


def trained_here(recipe: Recipe, materials: Materials, path: Path) -> Made:
    path.mkdir()
    return exported(train_student(recipe, materials, path).student, path)


def exported(student: nn.Module, path: Path) -> Made:
    file = path.with_suffix(".onnx")
    write_model(to_onnx(freeze(student.eval())), file)  # type: ignore[arg-type]
    return Made(file, lambda lq: restore_image(student, lq))


# Measuring ------------------------------------------------------------------------------------


def as_read(materials: Materials) -> list[Tensor]:
    """The calibration crops one by one, in the network's value range."""
    white = facts_of(materials.student).value_range
    return [crop[None] * white for batch in materials.crops for crop in batch]


def to_input(lq: np.ndarray, white: float) -> Tensor:
    return torch.from_numpy(lq.copy()).movedim(-1, 0)[None].float() / 255 * white


def to_image(output: Tensor, white: float) -> np.ndarray:
    return to_uint8(output[0] / white)


def measure(made: Made, materials: Materials, recipe: Recipe) -> None:
    """What OpenVINO makes of the test images."""
    white = facts_of(materials.student).value_range
    session = OpenVinoSession(made.file, threads=1)

    def restored(lq: np.ndarray) -> np.ndarray:
        return to_image(torch.from_numpy(session.run(to_input(lq, white).numpy())[0]), white)

    scores = evaluate(restored, materials.test, convention_of(recipe))
    made.psnr_db = [score.psnr_db for score in scores]
    if made.as_trained is not None:
        images = [materials.test.pair(index)[0] for index in range(len(materials.test))]
        differ = [(restored(lq) != made.as_trained(lq)).ravel() for lq in images]
        made.differing = float(np.concatenate(differ).mean())


def latency_ms(made: dict[str, Made], materials: Materials) -> dict[str, float]:
    """Medians of interleaved runs."""
    image = to_input(materials.test.pair(0)[0][:LATENCY_PX, :LATENCY_PX], 1.0).numpy()
    sessions = [OpenVinoSession(row.file, threads=1) for row in made.values()]
    runs: dict[int, Any] = {index: session.run for index, session in enumerate(sessions)}
    samples, failures = interleaved(runs, image, REPEATS, lambda event: None, time.perf_counter)
    assert not failures, failures
    return {name: statistics.median(samples[index]) for index, name in enumerate(made)}


def summary(
    recipe: Recipe, seeds: list[dict[str, Made]], latency: dict[str, float]
) -> dict[str, Any]:
    found = {}
    for name in seeds[0]:
        own, theirs = (
            np.array([made[which].psnr_db for made in seeds]) for which in (name, BASELINE)
        )
        found[name] = {
            "psnr_db": own.tolist(),
            "mean_psnr_db": float(own.mean()),
            f"to {BASELINE}": paired_bootstrap(own - theirs)._asdict(),
            "differing": [made[name].differing for made in seeds],
            "cpu_s": [round(made[name].cpu_s, 1) for made in seeds],
            "latency_to_float": latency[name] / latency["float"],
        }
    names = ("sparkir", "torch", "nncf", "openvino")
    return {
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "convention": convention_of(recipe).label,
        "recipe": recipe.model_dump(mode="json"),
        "latency_of": f"{LATENCY_PX} x {LATENCY_PX} px, one thread, medians of {REPEATS}",
        "rows": found,
    }


def to_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['convention']}; latency: {result['latency_of']}",
        "",
        f"| in OpenVINO | PSNR dB | to `{BASELINE}` [95 %] | values that differ from training | "
        "latency / float |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        mean, low, high = row[f"to {BASELINE}"].values()
        shares = [share for share in row["differing"] if share is not None]
        differing = f"{100 * statistics.mean(shares):.3g} %" if shares else ""
        lines.append(
            f"| {name} | {row['mean_psnr_db']:.3f} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | "
            f"{differing} | {row['latency_to_float']:.2f} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
