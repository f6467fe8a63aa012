"""Makes this record again: every control of the demo, three seeds.

python records/demo/make.py            # about an hour on one core; resumes if stopped
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
METHODS = (
    "degraded,teacher,float,ptq,qat,truth,truth@20,kd,kd-mse@1,kd-mse@20,kd-mse@100,kd-matched,"
    "fixed:laplacian_variance,fixed:pixel_variance,fixed:student_error,fixed:teacher_gap,"
    "constant:spark-paper,random:spark-paper,spark-paper,"
    "truth:spark,constant:spark,random:spark,spark"
)


def main() -> None:
    """Train what is not trained yet, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/records-demo"))
    made = parser.parse_args().out
    wanted = ("--methods", METHODS, "--seeds", "3", "--set", "train.evaluate_every=0")
    command = (sys.executable, "-m", "sparkir", "compare", "demo", *wanted, "--out", str(made))
    subprocess.run(command, check=True)
    for file in made.glob("comparison.*"):
        (HERE / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
