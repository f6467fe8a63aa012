"""Makes this record again: every example with and without SPARK, three seeds, paired.

    python records/integrations/make.py plain_pytorch torchao_pt2e    # what is installed here
    python records/integrations/make.py                               # the table alone

Both scripts of a pair start from the same float weights and see the same crops in the same order.
The script without SPARK has no teacher: a difference may come from the teacher, from the norm of
the loss or from the weights, and this record cannot tell which.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from sparkir.evaluate.statistics import paired_bootstrap

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
SEEDS = (0, 1, 2)
NAMES = (
    "plain_pytorch",
    "torchao_pt2e",
    "brevitas_qat",
    "nncf_qat",
    "lightning_qat",
    "accelerate_qat",
)


def run(script: str, seed: int) -> dict[str, object]:
    """What a script prints at its end."""
    command = [sys.executable, f"{script}.py", "--seed", str(seed)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, runs: dict[str, list[dict]]) -> str:
    """One line of the table: the exported files, and the paired difference."""
    without, with_ = (
        np.array([one["psnr_db"]["export"] for one in runs[key]]) for key in ("without", "with")
    )
    trained = np.array([one["psnr_db"]["qat"] for one in runs["with"]])
    gain = paired_bootstrap(with_ - without)
    versions = ", ".join(f"{k} {v}" for k, v in runs["with"][0]["versions"].items())
    cpu_s = np.mean([one["cpu_s"] for one in runs["with"]])
    return (
        f"| {name} | {without.mean():.3f} | {with_.mean():.3f} | {gain.mean:+.3f} | "
        f"{gain.low:+.3f} .. {gain.high:+.3f} | {np.abs(with_ - trained).max():.3f} | "
        f"{cpu_s:.0f} | {versions} |"
    )


def main() -> None:
    """Run what was asked for, then write the table of all that has been run."""
    for name in sys.argv[1:]:
        runs = {"without": [run(f"{name}_before", s) for s in SEEDS]}
        runs["with"] = [run(name, s) for s in SEEDS]
        (HERE / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    head = (
        "PSNR-Y studio range, uint8, crop 2 px, of each library's own integer export; three "
        "photographs, seeds 0 to 2, 80 steps.\n\n"
        "| example | without, dB | with SPARK, dB | difference | 95 % interval | "
        "export against its QAT, largest | CPU s a run | versions |\n"
        "|---|---:|---:|---:|---:|---:|---:|---|\n"
    )
    found = [name for name in NAMES if (HERE / f"{name}.json").is_file()]
    rows = [row(name, json.loads((HERE / f"{name}.json").read_text("utf-8"))) for name in found]
    (HERE / "result.md").write_text(head + "\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
