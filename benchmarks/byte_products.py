"""What products of bytes are worth: steps of training and images scored, with and without.

    python benchmarks/byte_products.py                       # the table, minutes on one core
    python benchmarks/byte_products.py --json result.json

Both in one process, in turn; CPU time of one thread, medians. Trained is EDSR-baseline x4 as in
train_step.py, scored the demo's RFDN x2 in W8A8.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import numpy as np
import torch
from kept_memory import SIZES_PX
from train_step import BY_NAME, FAST, Training

from sparkir.assemble import gather, quantize_student
from sparkir.deploy.contenders import versions
from sparkir.evaluate.infer import restore_image
from sparkir.memory import keep_freed_memory
from sparkir.quant.convolve import byte_products, has_byte_products
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec
from sparkir.recipe import load

PRECISIONS = ("float32", FAST["precision"])
WITHOUT, WITH = "float products", "byte products"

Work = dict[str, Callable[[], object]]
"""By its name."""
Times = dict[str, dict[str, list[float]]]
"""Seconds by what is done, and how."""


def images() -> Work:
    """Pictures to be scored."""
    materials = gather(load("demo"))
    network = freeze(quantize_student(materials.student.eval(), QuantSpec(), materials.crops))
    found: Work = {}
    for height, width in SIZES_PX:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        name = f"image of {height} x {width} px, W8A8"
        found[name] = lambda image=image: restore_image(network, image)
    return found


def steps(folder: Path) -> Work:
    """Steps of training."""
    found: Work = {}
    for precision in PRECISIONS:
        for kind, compiled in (("float", ""), ("QAT", ", compile")):
            name = f"{kind}, {precision}, channels_last{compiled}"
            training = Training(BY_NAME[name], folder)
            found[f"step, {name}"] = lambda training=training: training.run(1)
    return found


def in_turn(todo: Work, rounds: int) -> Times:
    """All of it again and again, with and without."""
    times: Times = {name: {WITHOUT: [], WITH: []} for name in todo}
    for number in range(-2, rounds):  # the first two compile, and are not counted
        for name, do in todo.items():
            for how, taken in times[name].items():
                with byte_products(how == WITH):
                    began_s = time.process_time()
                    do()
                    took_s = time.process_time() - began_s
                if number >= 0:
                    taken.append(took_s)
    return times


def as_markdown(times: Times) -> str:
    """The table; of a float network both columns are the same work."""
    lines = ["| | float products, ms | byte products, ms | ratio |", "|---|---:|---:|---:|"]
    for name, taken in times.items():
        without, with_ = (1e3 * statistics.median(taken[how]) for how in (WITHOUT, WITH))
        lines.append(f"| {name} | {without:.0f} | {with_:.0f} | {with_ / without:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write everything here, and the table beside it")
    arguments = parser.parse_args()
    if not has_byte_products():
        parser.error(f"this processor has none: {versions()['processor']}")
    keep_freed_memory()
    torch.set_num_threads(1)
    scored = in_turn(images(), arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        times = in_turn(steps(Path(folder)), arguments.rounds) | scored
    print(as_markdown(times))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = versions() | {"seconds": times}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        arguments.json.with_suffix(".md").write_text(as_markdown(times), "utf-8")


if __name__ == "__main__":
    main()
