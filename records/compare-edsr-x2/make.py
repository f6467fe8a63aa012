"""Makes this record again, every method on a W4A4 EDSR x2, and the one under a weak teacher.

    python records/compare-edsr-x2/make.py TRAIN SET14                    # an hour on two cores
    python records/compare-edsr-x2/make.py TRAIN SET14 --weak-teacher     # twenty minutes
    python records/compare-edsr-x2/make.py TRAIN SET14 --longer           # an hour

TRAIN is a folder with the 55 photographs of CID22 and the 199 of BSDS500's train split that the
log counts, SET14 the 14 images of Set14. The weak teacher (records/weak-teacher) is the student's
own architecture in floating point, trained for a tenth of the time. `--longer` trains the first
comparison's main rows for 2,000 steps and not 300 (records/compare-edsr-x2-longer). Two seeds each,
one there.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WEAK = HERE.parent / "weak-teacher"
LONGER = HERE.parent / "compare-edsr-x2-longer"
METHODS = (
    "degraded,teacher,float,ptq,qat,truth,kd,kd-mse@1,kd-mse@20,kd-mse@100,kd-matched,"
    "kd-matched@10,fitnet,fakd,dckd,slkd,fixed:student_error,confidence,"
    "constant:spark-paper,random:spark-paper,spark-paper,"
    "truth:spark,constant:spark,random:spark,spark"
)
WEAK_METHODS = (
    "degraded,teacher,float,ptq,qat,truth,kd,kd-mse@1,kd-mse@20,kd-matched,kd-matched@10,"
    "fixed:student_error,fixed:teacher_gap,confidence,"
    "constant:spark-paper,spark-paper,truth:spark,constant:spark,spark"
)

LONGER_METHODS = (
    "degraded,teacher,qat,truth,kd,kd-matched,kd-matched@10,"
    "truth:spark,constant:spark,random:spark,spark"
)
LONGER_SETTINGS = ("train.steps=2000", "train.teacher_cache=true", "train.checkpoint_every=1000")


def sparkir(*arguments: str | Path) -> None:
    """Run a command of this project."""
    subprocess.run([sys.executable, "-m", "sparkir", *map(str, arguments)], check=True)


def float_network(folder: Path, *settings: str) -> Path:
    """Weights of the float network, trained once."""
    if not (folder / "student.safetensors").is_file():
        resume = ("--resume",) if folder.is_dir() else ()
        sparkir("distill", HERE / "float.toml", *settings, "--out", folder, *resume)
    return folder / "student.safetensors"


def main() -> None:
    """Train the float networks once, then every method, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--weak-teacher", action="store_true")
    which.add_argument("--longer", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-edsr-x2"))
    chosen = parser.parse_args()
    data = ("--set", f"data.train={chosen.train}", "--set", f"data.test={chosen.test}")
    start = float_network(chosen.out / "float", *data)
    settings = [*data, "--set", f"student.weights={start}"]
    places = {chosen.train: "train", chosen.test: "Set14", start: start.name}
    record, methods, made = HERE, METHODS, chosen.out / "methods"
    recipe = HERE / "recipe.toml"
    if chosen.weak_teacher:
        teacher = float_network(chosen.out / "weak", *data, "--set", "train.steps=250")
        settings += ["--set", f"teacher.weights={teacher}"]
        places[teacher] = "weak"
        record, methods, made = WEAK, WEAK_METHODS, chosen.out / "weak-methods"
        recipe = WEAK / "recipe.toml"
    if chosen.longer:
        settings += [word for setting in LONGER_SETTINGS for word in ("--set", setting)]
        record, methods, made = LONGER, LONGER_METHODS, chosen.out / "longer-methods"
        record.mkdir(exist_ok=True)
    seeds = "1" if chosen.longer else "2"
    wanted = ("--methods", methods, "--seeds", seeds, "--jobs", "2", "--out", made)
    if chosen.longer:
        sparkir("compare", recipe, *settings, *wanted, "--baseline", "truth:spark")
        shutil.copy(made / "comparison.md", record / "to-truth-spark.md")
    sparkir("compare", recipe, *settings, *wanted)
    for file in made.glob("comparison.*"):
        text = file.read_text("utf-8")
        for folder, name in places.items():
            text = text.replace(str(folder), name)  # where they lie is nobody's business
        (record / file.name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
