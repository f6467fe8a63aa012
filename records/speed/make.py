"""Makes this record again: float and integer networks in every runtime present.

    python records/speed/make.py           # a quarter of an hour on two cores that do nothing else

The students are as initialised and hardly trained: values do not change the time. Each network is
made once for kernels that go from grid to grid and once for OpenVINO, because placement is chosen
before training.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = {"edsr": ("onnxruntime", "openvino"), "rfdn": ("portable", "openvino")}
OPTIONS = "student.options={scale=4}"
SIZE, REPEATS = "180x320", "7"


def sparkir(*arguments: str) -> None:
    """Run a command of this project."""
    subprocess.run([sys.executable, "-m", "sparkir", *arguments], check=True)


def main() -> None:
    """Make the four runs, time what is not timed yet, and write one table."""
    lines = ["# Speed\n", f"Input {SIZE}, medians of {REPEATS} runs, interleaved.\n"]
    for network, targets in TARGETS.items():
        for target in targets:
            run, name = Path("runs") / f"speed-{network}-{target}", f"{network}-{target}"
            result = HERE / f"{name}.json"
            if not (run / "student.onnx").is_file():
                changes = (OPTIONS, f'student.model="{network}"', f'quant.target="{target}"')
                sets = [part for change in changes for part in ("--set", change)]
                sparkir("distill", str(HERE / "speed.toml"), "--out", str(run), *sets)
            if not result.is_file():
                sizes = ("--size", SIZE, "--repeats", REPEATS)
                sparkir("bench", str(run), *sizes, "--json", str(result))
            lines += table(name, json.loads(result.read_text("utf-8")))
    (HERE / "result.md").write_text("\n".join(lines), "utf-8")


def table(name: str, found: dict[str, Any]) -> list[str]:
    """Markdown of one benchmark; times are ratios within one run."""
    head = ("", "times as fast as torch float32", "integer operators", "float layers", "file KiB")
    rows = [f"## {name}\n", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in found["rows"]:
        if row["median_ms"] is None:
            rows.append(f"| {row['label']} | {row['failure']} | | | |")
            continue
        part = row["contender"]
        share = part.get("integer_share")
        cells = (
            row["label"],
            f"{row['times_as_fast']:.2f}",
            "" if share is None else f"{share:.0%}",
            "" if share is None else f"{part['float_layers']} of {part['layers']}",
            "" if not part.get("file_bytes") else f"{part['file_bytes'] / 1024:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


if __name__ == "__main__":
    main()
