"""Makes this record again: the paper's methods side by side, on configurations that fit two cores.

    python records/reproduction/make.py DATA PHOTOGRAPHS                  # hours, all of them
    python records/reproduction/make.py DATA PHOTOGRAPHS rfdn-x4-w8a8     # one

DATA holds test/Set14/HR, weights/RFDN/RFDN_AIM.pth (the published teacher) and the pairs in
tasks/lowlight_LOL_train and tasks/lowlight_LOL_eval15; PHOTOGRAPHS is a folder with the 454 of
CID22 (55) and BSDS500's train and test splits (399).
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAPER = (
    "degraded,teacher,float,ptq,qat,truth,kd,kd-mse@1,fakd,slkd,"
    "constant:spark-paper,random:spark-paper,spark-paper,spark"
)
EIGHT_BITS = PAPER.replace("random:spark-paper", "kd-matched")
CONTROLS = (
    "degraded,teacher,float,ptq,qat,truth,kd,kd-mse@1,kd-mse@20,kd-mse@100,kd-matched,"
    "fixed:student_error,constant:spark-paper,random:spark-paper,spark-paper,random:spark,spark"
)
BASELINES = ("truth", "kd", "kd-mse@1", "constant:spark-paper", "random:spark-paper", "float")
FEW = "degraded,teacher,ptq,qat,truth,kd-matched,spark-paper,spark"


@dataclass(frozen=True)
class Run:
    """One comparison."""

    recipe: str
    methods: str
    settings: tuple[str, ...]


SR = (
    "data.train={photographs}",
    "data.test={data}/test/Set14/HR",
    "data.border=replicate",
    "teacher.weights={data}/weights/RFDN/RFDN_AIM.pth",
)
LOW_LIGHT = (
    "data.train={data}/tasks/lowlight_LOL_train",
    "data.test={data}/tasks/lowlight_LOL_eval15",
)
TAUGHT = "teacher.weights={out}/teacher-twin-mirnet-lol/student.safetensors"
STARTED = "student.weights={out}/float-twin-dncnn-lol/student.safetensors"
RUNS = {
    "lol-dncnn": Run(
        "twin-mirnet-dncnn-lol", PAPER, (*LOW_LIGHT, TAUGHT, STARTED, "train.steps=300")
    ),
    "rfdn-x4-w8a8": Run(
        "twin-rfdn-rfdn-x4", EIGHT_BITS, (*SR, "train.steps=100", "train.compile=true")
    ),
    "rfdn-x4-w4a4": Run(str(HERE / "rfdn-x4.toml"), CONTROLS, SR),
    "rfdn-x4-w2a2": Run(
        str(HERE / "rfdn-x4.toml"), FEW, (*SR, "quant.weight_bits=2", "quant.activation_bits=2")
    ),
}


def sparkir(*arguments: str | Path) -> None:
    """Run a command of this project."""
    subprocess.run([sys.executable, "-m", "sparkir", *map(str, arguments)], check=True)


def main() -> None:
    """Train the low-light networks, and then every method, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("runs/reproduction"))
    chosen = parser.parse_args()
    places = {"data": chosen.data, "photographs": chosen.photographs, "out": chosen.out}
    for name in chosen.runs:
        run, made = RUNS[name], chosen.out / name
        if TAUGHT in run.settings:
            train("teacher-twin-mirnet-lol", "train.channels_last=true", places=places)
            train("float-twin-dncnn-lol", places=places)
        settings = [word for text in run.settings for word in ("--set", text.format(**places))]
        methods = ("--methods", run.methods, "--seeds", "3", "--out", made)
        for baseline in (*BASELINES, "qat"):  # once they are trained, this only writes the tables
            if baseline in run.methods.split(","):
                sparkir("compare", run.recipe, *settings, *methods, "--baseline", baseline)
                to = made / f"to-{re.sub('[:@]', '-', baseline)}.md"
                to.write_text((made / "comparison.md").read_text("utf-8"), "utf-8")
        keep(made, HERE / name, places)


def train(recipe: str, *more: str, places: dict[str, Path]) -> None:
    """A float network for low light, once."""
    folder = places["out"] / recipe
    if (folder / "report.md").is_file():
        return
    resume = ("--resume",) if folder.is_dir() else ()
    settings = [word for text in (*LOW_LIGHT, *more) for word in ("--set", text.format(**places))]
    sparkir("distill", recipe, *settings, "--out", folder, *resume)


def keep(made: Path, record: Path, places: dict[str, Path]) -> None:
    """The tables, without where things lay."""
    record.mkdir(exist_ok=True)
    for file in (*made.glob("comparison.*"), *made.glob("to-*.md")):
        text = file.read_text("utf-8")
        for place in places.values():
            text = text.replace(f"{place}/", "").replace(str(place), "photographs")
        (record / file.name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
