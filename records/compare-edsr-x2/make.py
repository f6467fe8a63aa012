"""Makes this record again: every method on a W4A4 EDSR x2, two seeds.

    python records/compare-edsr-x2/make.py TRAIN SET14       # about an hour on two cores

TRAIN is a folder with the 55 photographs of CID22 and the 199 of BSDS500's train split that the
log counts, SET14 the 14 images of Set14.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
METHODS = (
    "degraded,teacher,float,ptq,qat,truth,kd,kd-mse@1,kd-mse@20,kd-mse@100,kd-matched,"
    "kd-matched@10,fitnet,fakd,dckd,slkd,fixed:student_error,confidence,"
    "constant:spark-paper,random:spark-paper,spark-paper,constant:spark,random:spark,spark"
)


def sparkir(*arguments: str | Path) -> None:
    """Run a command of this project."""
    subprocess.run([sys.executable, "-m", "sparkir", *map(str, arguments)], check=True)


def main() -> None:
    """Train the float student once, then every method, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/compare-edsr-x2"))
    chosen = parser.parse_args()
    data = ("--set", f"data.train={chosen.train}", "--set", f"data.test={chosen.test}")
    start = chosen.out / "float" / "student.safetensors"
    if not start.is_file():
        resume = ("--resume",) if start.parent.is_dir() else ()
        sparkir("distill", HERE / "float.toml", *data, "--out", start.parent, *resume)
    made = chosen.out / "methods"
    weights = ("--set", f"student.weights={start}")
    wanted = ("--methods", METHODS, "--seeds", "2", "--jobs", "2")
    sparkir("compare", HERE / "recipe.toml", *data, *weights, *wanted, "--out", made)
    for file in made.glob("comparison.*"):
        text = file.read_text("utf-8")
        for folder, name in ((chosen.train, "train"), (chosen.test, "Set14"), (start, start.name)):
            text = text.replace(str(folder), name)  # where they lie is nobody's business
        (HERE / file.name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
