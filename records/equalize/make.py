"""Makes this record again: students of scaled channels, and the same without.

    python records/equalize/make.py DATA PHOTOGRAPHS                # three hours on two cores
    python records/equalize/make.py DATA PHOTOGRAPHS rfdn-x4-w4a4   # one of them
    python records/equalize/make.py DATA PHOTOGRAPHS --table        # of what has been trained

DATA holds test/Set14/HR, test/Urban20/HR (the first 20 of Urban100), tasks/lowlight_LOL_train and
_eval15 and weights/RFDN/RFDN_AIM.pth; PHOTOGRAPHS is a folder with the 454 of CID22 (55) and
BSDS500's train and test splits (399). Two runs start from students of other records and are left
out without them:

    --place edsr_train=TRAIN --place edsr=runs/compare-edsr-x2/float/student.safetensors
    --place lol_teacher=.../student.safetensors --place lol=.../student.safetensors

the first two of records/compare-edsr-x2, the others of records/reproduction's low light. Pairs have
the same float weights, crops and steps; differences are paired by image and seed.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparkir.evaluate.statistics import paired_bootstrap

HERE = Path(__file__).parent
METHODS = ("ptq", "qat", "kd-matched@10", "truth:spark", "constant:spark", "spark")
LABELS = {
    "ptq": "PTQ",
    "qat": "QAT",
    "kd-matched@10": "KD, 10 x `matched`",
    "truth:spark": "the loss of `spark` to the truth (no teacher)",
    "constant:spark": "constant W of `spark`'s mean",
    "spark": "`spark`",
}
RFDN = (
    "data.train={photographs}",
    "data.test={data}/test/Set14/HR",
    "data.border=replicate",
    "teacher.weights={data}/weights/RFDN/RFDN_AIM.pth",
)


@dataclass(frozen=True)
class Run:
    """One student, trained both ways."""

    recipe: str
    settings: tuple[str, ...]
    seeds: int
    methods: tuple[str, ...] = METHODS
    more_tests: tuple[str, ...] = ()


RUNS = {
    "rfdn-x4-w4a4": Run(
        str(HERE.parent / "reproduction" / "rfdn-x4.toml"),
        RFDN,
        seeds=3,
        more_tests=("Urban20={data}/test/Urban20/HR",),
    ),
    "rfdn-x4-w8a8": Run(
        "twin-rfdn-rfdn-x4",
        (*RFDN, "train.compile=true", "train.steps=300", "train.learning_rate=1e-4"),
        seeds=2,
        methods=("ptq", "qat", "spark"),
    ),
    "demo": Run("demo", ("train.evaluate_every=0",), seeds=3, methods=("ptq", "qat", "spark")),
    "edsr-x2-w4a4": Run(
        str(HERE.parent / "compare-edsr-x2" / "recipe.toml"),
        ("data.train={edsr_train}", "data.test={data}/test/Set14/HR", "student.weights={edsr}"),
        seeds=2,
        methods=("ptq", "qat", "spark"),
    ),
    "lol-dncnn-w8a8": Run(
        "twin-mirnet-dncnn-lol",
        (
            "data.train={data}/tasks/lowlight_LOL_train",
            "data.test={data}/tasks/lowlight_LOL_eval15",
            "teacher.weights={lol_teacher}",
            "student.weights={lol}",
            "train.steps=300",
        ),
        seeds=2,
        methods=("ptq", "qat", "spark"),
    ),
}


def train(name: str, out: Path, places: dict[str, Path]) -> None:
    """Both comparisons of a run."""
    run = RUNS[name]
    for equalize in ("false", "true"):
        settings = (*run.settings, f"quant.equalize={equalize}")
        words = [word for one in settings for word in ("--set", one.format(**places))]
        for test in run.more_tests:
            words += ["--test", test.format(**places)]
        words += ["--methods", ",".join(run.methods), "--seeds", str(run.seeds)]
        words += ["--out", str(folder(out, name, equalize == "true"))]
        subprocess.run([sys.executable, "-m", "sparkir", "compare", run.recipe, *words], check=True)


def folder(out: Path, name: str, equalized: bool) -> Path:
    """The comparison."""
    return out / f"{name}-{'equalized' if equalized else 'as-it-is'}"


def scores(comparison: Path, method: str, test: str) -> dict[int, dict[str, float]]:
    """Seed -> image -> PSNR in dB of the integer network."""
    name = method.replace(":", "-").replace("@", "-")
    files = comparison.glob(f"seed-*/{name}/scores/{test}.json")
    return {
        int(file.parts[-4].removeprefix("seed-")): {
            image["name"]: image["psnr_db"]
            for image in json.loads(file.read_text("utf-8"))["scores"]["integer"]
        }
        for file in files
    }


def lines(name: str, out: Path) -> list[dict[str, object]]:
    """One for each test set and method that has been trained both ways, over the seeds of both."""
    both = [folder(out, name, equalized) for equalized in (False, True)]
    tests = sorted({file.stem for file in both[1].glob("seed-*/*/scores/*.json")})
    found: list[dict[str, object]] = []
    for test in tests:
        for method in RUNS[name].methods:
            without, with_ = (scores(comparison, method, test) for comparison in both)
            seeds = sorted(without.keys() & with_.keys())
            if not seeds:
                continue
            images = sorted(without[seeds[0]])
            values = [
                np.array([[one[seed][image] for image in images] for seed in seeds])
                for one in (without, with_)
            ]
            gain = paired_bootstrap(values[1] - values[0])
            found.append(
                {
                    "run": name,
                    "test": test,
                    "method": method,
                    "seeds": seeds,
                    "images": len(images),
                    "without_db": values[0].mean(),
                    "with_db": values[1].mean(),
                    "gain_db": [gain.mean, gain.low, gain.high],
                }
            )
    return found


def table(found: list[dict[str, object]]) -> str:
    """Markdown."""
    text = (
        "PSNR of the integer network, uint8: Y in studio range, 4 px cut off (RFDN x4), 2 px "
        "(demo, EDSR x2); RGB (LOL). Intervals are over seeds and images; of one seed, over images "
        "alone.\n\n"
        "| student | test | | without, dB | with, dB | difference | 95 % | seeds |\n"
        "|---|---|---|---:|---:|---:|---|---:|\n"
    )
    for one in found:
        mean, low, high = one["gain_db"]  # type: ignore[misc]
        text += (
            f"| {one['run']} | {one['test']} | {LABELS[str(one['method'])]} | "
            f"{one['without_db']:.3f} | {one['with_db']:.3f} | {mean:+.3f} | "
            f"{low:+.3f} .. {high:+.3f} | {len(one['seeds'])} |\n"  # type: ignore[arg-type]
        )
    return text


def main() -> None:
    """Train what was asked for, then write the table of all that has been trained."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("runs", nargs="*", help="all, unless named")
    parser.add_argument("--place", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--out", type=Path, default=Path("runs/equalize"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    chosen = parser.parse_args()
    unknown = set(chosen.runs) - RUNS.keys()
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    places = {"data": chosen.data, "photographs": chosen.photographs}
    places |= {name: Path(path) for name, _, path in (one.partition("=") for one in chosen.place)}
    if not chosen.table:
        for name in chosen.runs or RUNS:
            try:
                train(name, chosen.out, places)
            except KeyError as missing:
                print(f"{name} is left out: it needs --place {missing.args[0]}=...")
    found = [line for name in RUNS for line in lines(name, chosen.out)]
    (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (HERE / "result.md").write_text(table(found), "utf-8")
    for name in RUNS:  # every method against QAT, among equalized students
        for made in folder(chosen.out, name, equalized=True).glob("comparison.md"):
            (HERE / f"{name}.md").write_bytes(made.read_bytes())


if __name__ == "__main__":
    main()
