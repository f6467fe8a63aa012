"""Makes this record again: a teacher that restores worse than its student, two seeds.

    python records/weak-teacher/make.py TRAIN SET14       # twenty minutes on two cores

The student is that of records/compare-edsr-x2, from the same float network; its teacher is the same
architecture, trained for a tenth of the time. TRAIN and SET14 are that record's folders.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STUDENTS = HERE.parent / "compare-edsr-x2"
METHODS = (
    "degraded,teacher,float,ptq,qat,truth,kd,kd-mse@1,kd-mse@20,kd-matched,kd-matched@10,"
    "fixed:student_error,fixed:teacher_gap,confidence,"
    "constant:spark-paper,spark-paper,constant:spark,random:spark,spark"
)
WEAK = ("--set", "train.steps=250")


def sparkir(*arguments: str | Path) -> None:
    """Run a command of this project."""
    subprocess.run([sys.executable, "-m", "sparkir", *map(str, arguments)], check=True)


def float_network(folder: Path, *settings: str) -> Path:
    """Weights of the float network, trained once."""
    if not (folder / "student.safetensors").is_file():
        resume = ("--resume",) if folder.is_dir() else ()
        sparkir("distill", STUDENTS / "float.toml", *settings, "--out", folder, *resume)
    return folder / "student.safetensors"


def main() -> None:
    """Train the float networks once, then every method, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/weak-teacher"))
    chosen = parser.parse_args()
    data = ("--set", f"data.train={chosen.train}", "--set", f"data.test={chosen.test}")
    start = float_network(chosen.out / "float", *data)
    teacher = float_network(chosen.out / "weak", *data, *WEAK)
    weights = ("--set", f"student.weights={start}", "--set", f"teacher.weights={teacher}")
    wanted = ("--methods", METHODS, "--seeds", "2", "--jobs", "2")
    made = chosen.out / "weak-methods"
    sparkir("compare", HERE / "recipe.toml", *data, *weights, *wanted, "--out", made)
    places = {chosen.train: "train", chosen.test: "Set14", start: start.name, teacher: "weak"}
    for file in made.glob("comparison.*"):
        text = file.read_text("utf-8")
        for folder, name in places.items():
            text = text.replace(str(folder), name)  # where they lie is nobody's business
        (HERE / file.name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
