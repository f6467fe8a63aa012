"""Makes again what stored outputs do to a teacher that looks at the whole image.

    python records/teacher-outputs/make.py DATA        # some minutes

A MIRNet's attention averages channels over the image, and in low light the average is what it
restores by. Its own network in W8A8 imitates it, from its outputs on whole images and from those on
the crops that the student sees. DATA as for records/reproduction/make.py.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "reproduction"))

from kept import keep  # noqa: E402
from make import RUNS, sparkir, train, written  # noqa: E402


def main() -> None:
    """Train the teacher, and the student under it twice."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/teacher-outputs"))
    chosen = parser.parse_args()
    places = {"data": chosen.data, "photographs": chosen.data, "out": chosen.out}
    run = RUNS["lol-mirnet"]
    for recipe, *settings in run.before:
        train(recipe, settings, places)
    for name, cached in (("stored", "true"), ("run", "false")):
        settings = (*run.settings, f"train.teacher_cache={cached}")
        made = chosen.out / name
        sparkir(
            "compare", run.recipe, *written(settings, places), "--methods", "qat,kd", "--out", made
        )
        keep(made, HERE / f"low-light-{name}", places)


if __name__ == "__main__":
    main()
