"""Makes this record again: the paper's methods side by side, on configurations that fit two cores.

    python records/reproduction/make.py DATA PHOTOGRAPHS            # days, all of them
    python records/reproduction/make.py DATA PHOTOGRAPHS srcnn-x2   # one
    python records/reproduction/make.py DATA PHOTOGRAPHS srcnn-x2 --go-on   # what it lacks

DATA holds test/Set14/HR, test/Urban20/HR (the first 20 of Urban100), weights/RFDN/RFDN_AIM.pth (the
published teacher at x4) and the pairs in tasks/lowlight_LOL_train, tasks/lowlight_LOL_eval15 and
tasks/realnoise_PolyU (the 100 of PolyU's crops; those of eight scenes are for testing);
PHOTOGRAPHS is a folder with the 454 of CID22 (55) and BSDS500's train and test splits (399).
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kept import keep, take_up

HERE = Path(__file__).parent
ROWS = (
    "degraded,teacher,float,ptq,qat,kd,kd-mse@1,kd-mse@20,kd-mse@100,kd-matched,kd-matched@10,"
    "fakd,slkd,fixed:student_error,truth:spark-paper,constant:spark-paper,random:spark-paper,"
    "spark-paper,truth:spark,constant:spark,random:spark,spark"
)
OF_THE_OUTPUT = (
    "degraded,teacher,float,ptq,qat,kd,kd-mse@1,kd-mse@20,kd-matched@10,fixed:student_error,"
    "constant:spark-paper,spark-paper,truth:spark,constant:spark,random:spark,spark"
)
BASELINES = (
    *("truth", "float", "kd", "kd-mse@1", "kd-matched", "kd-matched@10", "slkd", "spark-paper"),
    *("truth:spark-paper", "constant:spark-paper", "random:spark-paper"),
    *("truth:spark", "constant:spark", "random:spark"),
)
LONG = "degraded,teacher,float,ptq,qat,spark"
LOW_RATE = (
    "degraded,teacher,float,ptq,qat,kd,kd-mse@1,kd-matched@10,fakd,slkd,spark-paper,"
    "truth:spark,constant:spark,random:spark,spark"
)


@dataclass(frozen=True)
class Run:
    """One comparison."""

    recipe: str
    methods: str
    settings: tuple[str, ...]
    seeds: int = 3
    more_tests: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()
    """Recipes of float networks that it starts from, each with its settings."""


PAIRS = (
    "data.train={photographs}",
    "data.test={data}/test/Set14/HR",
    "data.border=replicate",
)
SR = (*PAIRS, "teacher.weights={data}/weights/RFDN/RFDN_AIM.pth")
FAST = (*SR, "train.compile=true")
URBAN20 = ("Urban20={data}/test/Urban20/HR",)
LOW_LIGHT = (
    "data.train={data}/tasks/lowlight_LOL_train",
    "data.test={data}/tasks/lowlight_LOL_eval15",
)
POLYU = ("data.train={out}/polyu/train", "data.test={out}/polyu/test")
POLYU_TEST_SCENES = (
    "Canon5D2_5_160_6400_circuit",
    "Canon5D2_5_200_3200_fruit",
    "Canon600D_4-5_125_1600_book",
    "Canon80D_8_8_6400_comproom",
    "NikonD800_11_160_3200_classroom",
    "NikonD800_8_100_6400_bulletin",
    "Sony_4-5_125_3200_plant",
    "Sony_4_200_3200_door",
)


def real_noise(start: str, *settings: str, seeds: int) -> Run:
    """A student that begins as the float one of `start`, which was trained with `settings`."""
    return Run(
        "twin-mirnet-dncnn-sidd",
        f"{ROWS},dckd",
        (
            *POLYU,
            "teacher.weights={out}/teacher-twin-mirnet-sidd/student.safetensors",
            f"student.weights={{out}}/{start}/student.safetensors",
        ),
        seeds=seeds,
        before=(
            ("teacher-twin-mirnet-sidd", *POLYU, "train.channels_last=true"),
            ("float-twin-dncnn-sidd", *POLYU, *settings),
        ),
    )


FROM_ITS_TEACHER = (
    "student.weights=teacher",
    "train.steps=300",
    "train.float_steps=0",
    "train.learning_rate=2e-4",
    "train.channels_last=true",
    "train.compile=true",
)
RUNS: dict[str, Run] = {
    "lol-dncnn": Run(
        "twin-mirnet-dncnn-lol",
        f"{ROWS},dckd",
        (
            *LOW_LIGHT,
            "teacher.weights={out}/teacher-twin-mirnet-lol/student.safetensors",
            "student.weights={out}/float-twin-dncnn-lol/student.safetensors",
            "train.steps=300",
        ),
        before=(
            ("teacher-twin-mirnet-lol", *LOW_LIGHT, "train.channels_last=true"),
            ("float-twin-dncnn-lol", *LOW_LIGHT),
        ),
    ),
    "lol-mirnet": Run(
        "twin-mirnet-mirnet-lol",
        f"{ROWS},dckd",
        (
            *LOW_LIGHT,
            "teacher.weights={out}/teacher-twin-mirnet-lol/student.safetensors",
            *FROM_ITS_TEACHER,
        ),
        seeds=1,
        before=(("teacher-twin-mirnet-lol", *LOW_LIGHT, "train.channels_last=true"),),
    ),
    "polyu-dncnn": real_noise("float-twin-dncnn-sidd-seed-1", "seed=1", seeds=3),
    "polyu-dncnn-worse-start": real_noise("float-twin-dncnn-sidd", seeds=1),
    "polyu-mirnet": Run(
        "twin-mirnet-mirnet-sidd",
        f"{ROWS},dckd",
        (
            *POLYU,
            "teacher.weights={out}/teacher-twin-mirnet-sidd/student.safetensors",
            *FROM_ITS_TEACHER,
            "train.teacher_cache=true",  # not in low light: see records/teacher-outputs
        ),
        seeds=1,
        before=(("teacher-twin-mirnet-sidd", *POLYU, "train.channels_last=true"),),
    ),
    "rfdn-x2-w8a8": Run(
        "twin-rfdn-rfdn-x2",
        f"{ROWS},dckd",
        (*PAIRS, "train.steps=300", "train.compile=true", "train.teacher_cache=true"),
        more_tests=URBAN20,
    ),
    "rfdn-x4-w4a4": Run(
        str(HERE / "rfdn-x4.toml"),
        ROWS,
        (*SR, "quant.equalize=true"),
        seeds=2,
        more_tests=URBAN20,
    ),
    "rfdn-x4-w2a2": Run(
        str(HERE / "rfdn-x4.toml"),
        OF_THE_OUTPUT,
        (*SR, "quant.weight_bits=2", "quant.activation_bits=2", "quant.equalize=true"),
        seeds=2,
        more_tests=URBAN20,
    ),
    "srcnn-x4": Run(
        "twin-rfdn-srcnn-x4",
        f"{ROWS},dckd",
        (
            *SR,
            "student.weights={out}/float-twin-srcnn-x4/student.safetensors",
            "train.steps=500",
            "train.teacher_cache=true",
        ),
        before=(("float-twin-srcnn-x4", *PAIRS, "train.steps=4000"),),
    ),
    "srcnn-x2": Run(
        "twin-rfdn-srcnn-x2",
        f"{ROWS},dckd",
        (
            *PAIRS,
            "student.weights={out}/float-twin-srcnn-x2/student.safetensors",
            "train.steps=500",
            "train.teacher_cache=true",
        ),
        more_tests=URBAN20,
        before=(("float-twin-srcnn-x2", *PAIRS, "train.steps=4000"),),
    ),
}
for end, methods, steps, rate, seeds in (
    ("", LOW_RATE, 1000, "2e-5", 2),
    ("-long", LONG, 3000, "1e-4", 1),
):
    settings = (f"train.steps={steps}", f"train.learning_rate={rate}", "quant.equalize=true")
    RUNS[f"rfdn-x4-w8a8{end}"] = Run(
        "twin-rfdn-rfdn-x4", methods, (*FAST, *settings), seeds, more_tests=URBAN20
    )


def sparkir(*arguments: str | Path) -> None:
    """Run a command of this project."""
    subprocess.run([sys.executable, "-m", "sparkir", *map(str, arguments)], check=True)


def main() -> None:
    """Train the low-light networks, and then every method, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("runs", nargs="*", help="all, unless named")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduction"))
    parser.add_argument(
        "--go-on", action="store_true", help="take the record's rows and seeds as they are"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.runs) - RUNS.keys()
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    names = chosen.runs or list(RUNS)
    places = {"data": chosen.data, "photographs": chosen.photographs, "out": chosen.out}
    if any(name.startswith("polyu") for name in names):
        split_by_scene(chosen.data / "tasks" / "realnoise_PolyU", chosen.out / "polyu")
    for name in names:
        run, made = RUNS[name], chosen.out / name
        for recipe, *settings in run.before:
            train(recipe, settings, places)
        methods = ("--methods", run.methods, "--seeds", str(run.seeds), "--out", made)
        settings = [text.format(**places) for text in run.settings]
        tests = [test.format(**places) for test in run.more_tests]
        if chosen.go_on and not made.exists():
            take_up(HERE / name, made, run.recipe, settings, tests)
        options = written(run.settings, places)
        options += [word for test in tests for word in ("--test", test)]
        for baseline in (*BASELINES, "qat"):  # once they are trained, this only writes the tables
            if baseline in run.methods.split(","):
                sparkir("compare", run.recipe, *options, *methods, "--baseline", baseline)
                to = made / f"to-{re.sub('[:@]', '-', baseline)}.md"
                to.write_text((made / "comparison.md").read_text("utf-8"), "utf-8")
        keep(made, HERE / name, places)


def split_by_scene(pairs: Path, made: Path) -> None:
    """Copy the pairs of PolyU into `train` and `test`."""
    for file in pairs.glob("*/*"):
        part = "test" if file.name.startswith(POLYU_TEST_SCENES) else "train"
        folder = made / part / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)


def train(recipe: str, settings: Sequence[str], places: dict[str, Path]) -> None:
    """A float network, once; with another seed than its recipe's, in a folder that says so."""
    seeds = [text.replace("=", "-") for text in settings if text.startswith("seed=")]
    folder = places["out"] / "-".join([recipe, *seeds])
    if (folder / "report.md").is_file():
        return
    resume = ("--resume",) if folder.is_dir() else ()
    sparkir("distill", recipe, *written(settings, places), "--out", folder, *resume)


def written(settings: Sequence[str], places: dict[str, Path]) -> list[str]:
    """As options of a command."""
    return [word for text in settings for word in ("--set", text.format(**places))]


if __name__ == "__main__":
    main()
