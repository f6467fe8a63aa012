"""Makes this record again: every control of the demo, three seeds.

python records/demo/make.py            # about an hour on one core; resumes if stopped
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
METHODS = (
    "degraded,teacher,float,ptq,qat,truth,truth@20,kd,kd-mse@1,kd-mse@20,kd-mse@100,"
    "kd-matched,kd-matched@10,"
    "fixed:laplacian_variance,fixed:pixel_variance,fixed:student_error,fixed:teacher_gap,"
    "constant:spark-paper,random:spark-paper,spark-paper,"
    "truth:spark,constant:spark,random:spark,spark"
)
SETTINGS = (
    "train.evaluate_every=0",
    "distill.norm=mse",  # of the rows that have the recipe's own: as published
    "distill.strength=1",
    "distill.target=teacher",
    "weighting.name=spark-paper",
)


def main() -> None:
    """Train what is not trained yet, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/records-demo"))
    made = parser.parse_args().out
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    wanted = ("--methods", METHODS, "--seeds", "3", *settings)
    command = (sys.executable, "-m", "sparkir", "compare", "demo", *wanted, "--out", str(made))
    subprocess.run(command, check=True)
    for file in made.glob("comparison.*"):
        (HERE / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
