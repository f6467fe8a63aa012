"""What it is worth to keep freed memory: steps of training and images scored, with and without.

    python benchmarks/kept_memory.py                       # the table, minutes on one core
    python benchmarks/kept_memory.py --json result.json

Each is measured in processes of their own, in turn, round after round: what is set cannot be taken
back. CPU time of one thread, and how often the system had to map a page; medians over all rounds.
Trained is EDSR-baseline x4 as in train_step.py, scored the demo's RFDN x2, float and in W8A8.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

from sparkir.memory import keep_freed_memory

GIVEN_BACK, KEPT = "given back", "kept"
CONTENDERS = ("float, {}, channels_last", "QAT, {}, channels_last, compile")
SIZES_PX = ((400, 512), (640, 1024))
STEPS, IMAGES = 16, 3
"""Of each process."""

Used = tuple[float, int]  # CPU s, pages mapped


def used(work: Callable[..., object], *arguments: object) -> Used:
    before = resource.getrusage(resource.RUSAGE_SELF)
    work(*arguments)
    after = resource.getrusage(resource.RUSAGE_SELF)
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took_s, after.ru_minflt - before.ru_minflt


def measured() -> Iterator[tuple[str, list[Used]]]:
    """What is done, and what each time of it used, the first ones left out."""
    import numpy as np
    from train_step import BY_NAME, FASTEST, Training

    from sparkir.assemble import gather, quantize_student
    from sparkir.evaluate.infer import restore_image
    from sparkir.quant.spec import QuantSpec
    from sparkir.recipe import load

    for contender in CONTENDERS:
        name = contender.format(FASTEST["precision"])
        with tempfile.TemporaryDirectory() as folder:
            training = Training(BY_NAME[name], Path(folder))
            training.warm_up()
            yield f"step, {name}", [used(training.run, 1) for _ in range(STEPS)]
    materials = gather(load("demo"))
    student = materials.student.eval()
    quantized = quantize_student(student, QuantSpec(), materials.crops).eval()
    for what, network in (("float", student), ("W8A8", quantized)):
        for size in SIZES_PX:
            image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
            times = [used(restore_image, network, image) for _ in range(1 + IMAGES)]
            yield f"image of {size[0]} x {size[1]} px, {what}", times[1:]


def child(how: str) -> None:
    """Print what this process measured, and its peak of memory."""
    if how == KEPT:
        keep_freed_memory()
    import torch  # not before
    from train_step import peak_mib

    print(json.dumps({"used": dict(measured()), "peak_mib": peak_mib(torch.device("cpu"))}))


def run_in_turn(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each process printed."""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    printed: dict[str, list[dict[str, Any]]] = {GIVEN_BACK: [], KEPT: []}
    for number in range(rounds):
        for how, results in printed.items():
            print(f"round {number + 1} of {rounds}, {how}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--child", how]
            done = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return printed


def medians(results: list[dict[str, Any]], what: str) -> tuple[float, float]:
    """CPU s and pages mapped, over all processes."""
    times_s, pages = zip(*(one for r in results for one in r["used"][what]), strict=True)
    return statistics.median(times_s), statistics.median(pages)


def as_markdown(printed: dict[str, list[dict[str, Any]]]) -> str:
    """The table."""
    lines = [
        "| | given back, ms | kept, ms | kept / given back | pages mapped, given back | kept |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for what in printed[KEPT][0]["used"]:
        (back_s, back_pages), (kept_s, kept_pages) = (
            medians(results, what) for results in printed.values()
        )
        lines.append(
            f"| {what} | {1e3 * back_s:.0f} | {1e3 * kept_s:.0f} | {kept_s / back_s:.2f} | "
            f"{back_pages:.0f} | {kept_pages:.0f} |"
        )
    back, kept = (statistics.median(r["peak_mib"] for r in rs) for rs in printed.values())
    lines.append(f"| peak of the process, MiB | {back:.0f} | {kept:.0f} | {kept / back:.2f} | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything here, and the table beside it")
    parser.add_argument("--child", choices=(GIVEN_BACK, KEPT), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    printed = run_in_turn(arguments.rounds)
    print(as_markdown(printed))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in ("torch", "numpy")}
        result = {"libc": platform.libc_ver(), "versions": versions, "processes": printed}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        arguments.json.with_suffix(".md").write_text(as_markdown(printed), "utf-8")
    return None


if __name__ == "__main__":
    main()
