"""Training EDSR-baseline x4 with L1, not quantized: here, and in BasicSR, side by side.

    python benchmarks/against_basicsr.py --images FOLDER
    python benchmarks/against_basicsr.py --images FOLDER --basicsr CHECKOUT --json result.json

Both read the same PNG files, sub-images of 480 x 480 and of 120 x 120, and train at batch 16 on LR
patches of 48. BasicSR runs its own recipe options/train/EDSR/train_EDSR_Mx4.yml, with its dataset,
sampler, loader of 6 workers, prefetcher and SRModel; only folders, the device and the pretrained
weights are changed. CHECKOUT is a clone of its repository; nothing is installed or changed in it.

Measured are the data path alone (an epoch of batches, from starting the workers to the last one, as
float tensors in [0, 1]) and whole steps, in turn, round after round; medians are reported. CPU
seconds are those of the process and of its workers, so that other work on the machine adds little.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import torch

from sparkir import recipe, run
from sparkir.assemble import Materials, gather, open_pairs
from sparkir.data.codec import read_image, write_png
from sparkir.data.degrade import bicubic_resize
from sparkir.data.images import find_images
from sparkir.data.pairs import PatchSampler
from sparkir.train.loop import Interrupted

BATCH, PATCH_PX, SCALE = 16, 48, 4
SUB_IMAGE_PX = 480
STEPS = 1_000_000
THEIR_RECIPE = "options/train/EDSR/train_EDSR_Mx4.yml"
ABSENT = {
    "torchvision": (),
    "torchvision.models": ("vgg",),
    "torchvision.models.vgg": (),
    "torchvision.ops": (),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("normalize", "rgb_to_grayscale"),
    "torchvision.utils": ("make_grid",),
    "basicsr.version": ("__version__", "__gitsha__"),  # written by its setup.py
}
"""What BasicSR imports and this benchmark never calls: empty modules with these names in them."""

WORDS = {"data": "data path alone", "float32": "step, float32", "auto": "step, bfloat16 if fast"}
PRECISIONS = ("float32", "auto")
"""Ours; `auto` is bfloat16 where the machine is fast at it. Theirs is float32 beside either."""

Timed = tuple[float, float]  # wall s, CPU s


# Data -----------------------------------------------------------------------------------------


def make_sub_images(images: Path, folder: Path) -> int:
    """PNG pairs of the size that BasicSR's extract_subimages.py makes: two corners of each."""
    made = 0
    for path in find_images(images):
        image = read_image(path)
        if min(image.shape[:2]) < SUB_IMAGE_PX:
            continue
        for corner, target in enumerate(
            (image[:SUB_IMAGE_PX, :SUB_IMAGE_PX], image[-SUB_IMAGE_PX:, -SUB_IMAGE_PX:])
        ):
            small = bicubic_resize(target, scale=Fraction(1, SCALE))
            made += 1
            for kind, pixels in (("target", target), ("input", small)):
                name = folder / kind / f"{path.stem}_s{corner}.png"
                name.parent.mkdir(parents=True, exist_ok=True)
                write_png(name, pixels)
    if not made:
        sys.exit(f"no image in {images} is as large as {SUB_IMAGE_PX} x {SUB_IMAGE_PX}")
    return made


# Clocks ---------------------------------------------------------------------------------------


def cpu_s() -> float:
    """CPU seconds of this process and of its children, alive and gone."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in multiprocessing.active_children():  # workers that have not been waited for
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def clocks() -> Timed:
    return time.perf_counter(), cpu_s()


def since(began: Timed) -> Timed:
    wall, cpu = clocks()
    return wall - began[0], cpu - began[1]


def timed(work: Callable[[], object]) -> Timed:
    began = clocks()
    work()
    return since(began)


# Ours -----------------------------------------------------------------------------------------


def our_recipe(pairs: Path, precision: str) -> recipe.Recipe:
    values = {
        "name": "against-basicsr",
        "seed": 10,
        "data": {
            "train": str(pairs),
            "test": str(pairs),
            "degradation": "pairs",
            "scale": SCALE,
            "patch_px": PATCH_PX,
            "batch": BATCH,
        },
        "student": {"model": "edsr", "options": {"scale": SCALE}},
        "train": {
            "steps": STEPS,
            "learning_rate": 1e-4,
            "schedule": "constant",
            "ema": 0.999,
            "precision": precision,
            "device": "cpu",
            "log_every": 1,
            "checkpoint_every": STEPS,
            "calibration_images": 8,
        },
    }
    return recipe.from_values(values, "against_basicsr.py")


def our_steps(
    chosen: recipe.Recipe,
    materials: Materials,
    folder: Path,
    *,
    rounds: int,
    between: Callable[[], object],
) -> list[Timed]:
    """The loop itself; `between` runs after each step, untimed. The first step is left out."""
    times: list[Timed] = []
    began = clocks()

    def report(event: dict[str, Any]) -> None:
        nonlocal began
        if event["kind"] == "step":
            times.append(since(began))
            between()
            began = clocks()

    with suppress(Interrupted):
        run.train_student(
            chosen,
            materials,
            folder,
            report=report,
            stop_requested=lambda: len(times) > rounds,
        )
    return times[1:]


# Theirs ---------------------------------------------------------------------------------------


class BasicSR:
    """Its recipe, brought up as its train.py does."""

    def __init__(self, checkout: Path, pairs: Path, epoch: int) -> None:
        self.stubs = _make_importable(checkout)
        import yaml
        from basicsr.data.data_sampler import EnlargedSampler

        opt = yaml.safe_load((checkout / THEIR_RECIPE).read_text())
        opt |= {"num_gpu": 0, "dist": False, "rank": 0, "world_size": 1, "is_train": True}
        opt["path"] = {"pretrain_network_g": None}
        self.options = opt["datasets"]["train"]
        self.options |= {"dataroot_gt": str(pairs / "target"), "dataroot_lq": str(pairs / "input")}
        self.options |= {"phase": "train", "scale": opt["scale"]}
        from basicsr.data import build_dataloader, build_dataset
        from basicsr.data.prefetch_dataloader import CPUPrefetcher
        from basicsr.models import build_model

        self._dataset, self._epochs = build_dataset(self.options), 0
        # Their sampler repeats the set; as many times as make the epoch that is timed.
        self._sampler = EnlargedSampler(self._dataset, 1, 0, epoch * BATCH / len(self._dataset))
        self._loader = build_dataloader(
            self._dataset,
            self.options,
            num_gpu=0,
            dist=False,
            sampler=self._sampler,
            seed=opt["manual_seed"],
        )
        self._prefetcher = CPUPrefetcher  # `prefetch_mode: ~` takes this one
        torch.manual_seed(opt["manual_seed"])
        self._model, self._batches, self.iteration = build_model(opt), self.batches(), 0

    def batches(self) -> Iterator[dict[str, Any]]:
        """One epoch."""
        self._epochs += 1
        self._sampler.set_epoch(self._epochs)
        prefetcher = self._prefetcher(self._loader)
        while (batch := prefetcher.next()) is not None:
            yield batch

    def step(self) -> None:
        """The body of the loop in its train.py."""
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self.batches()
            batch = next(self._batches)
        self.iteration += 1
        self._model.update_learning_rate(self.iteration, warmup_iter=-1)
        self._model.feed_data(batch)
        self._model.optimize_parameters(self.iteration)


def _make_importable(checkout: Path) -> list[str]:
    """Put empty modules where BasicSR imports what is not here; returns their names."""
    sys.path.insert(0, str(checkout))
    made, found = [], importlib.util.find_spec("torchvision") is not None
    for name, words in ABSENT.items():
        if name.startswith("torchvision") and found:
            continue
        module = types.ModuleType(name)
        module.__path__ = []
        for word in words:
            setattr(module, word, None)
        sys.modules[name] = module
        made.append(name)
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, module)
    return made


# The measurement ------------------------------------------------------------------------------


def our_epoch(materials: Materials, batches: int) -> None:
    sampler = PatchSampler(materials.train, patch_px=PATCH_PX, batch=BATCH, seed=1)
    for _ in range(batches):
        lq, gt = sampler.next()
        lq.float() / 255, gt.float() / 255


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pairs = folder / "pairs"
    count = make_sub_images(arguments.images, pairs)
    chosen = our_recipe(pairs, "float32")
    building = timed(lambda: open_pairs(chosen.data, chosen.data.train))
    materials = gather(chosen)
    theirs = BasicSR(arguments.basicsr, pairs, arguments.batches) if arguments.basicsr else None

    samples: dict[str, list[Timed]] = {}

    def add(name: str, work: Callable[[], object]) -> None:
        samples.setdefault(name, []).append(timed(work))

    for _ in range(arguments.epochs):
        add("data, sparkir", lambda: our_epoch(materials, arguments.batches))
        if theirs is not None:
            add("data, BasicSR", lambda: sum(1 for _ in theirs.batches()))
    step = theirs.step if theirs is not None else lambda: None
    step()  # their workers fill their queues
    for precision in PRECISIONS:
        samples[f"{precision}, sparkir"] = our_steps(
            with_precision(chosen, precision),
            materials,
            folder / precision,
            rounds=arguments.rounds,
            between=lambda name=f"{precision}, BasicSR": add(name, step),
        )
    if theirs is None:
        samples = {name: times for name, times in samples.items() if "BasicSR" not in name}
    return {
        "sub_images": count,
        "building_the_store_s": building,
        "batches_per_epoch": arguments.batches,
        "samples_s": samples,
        "stubs_for_theirs": theirs.stubs if theirs else [],
        "versions": versions(arguments.basicsr),
    }


def with_precision(chosen: recipe.Recipe, precision: str) -> recipe.Recipe:
    return chosen.model_copy(
        update={"train": chosen.train.model_copy(update={"precision": precision})}
    )


def versions(checkout: Path | None) -> dict[str, str]:
    found = {n: metadata.version(n) for n in ("sparkir", "torch", "numpy", "pillow")}
    if checkout is not None:
        found["opencv"] = __import__("cv2").__version__
        found["BasicSR"] = (checkout / "VERSION").read_text().strip()
    return found | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "cpu": cpu_name(),
        "started_under_load": f"{os.getloadavg()[0]:.1f}",
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | | samples/s, wall | CPU ms per sample | samples per CPU second, to BasicSR's |",
        "|---|---|---:|---:|---:|",
    ]
    cost = {
        tuple(name.split(", ")): [statistics.median(column) for column in zip(*times, strict=True)]
        for name, times in result["samples_s"].items()
    }
    for (what, who), (wall, cpu) in cost.items():
        count = BATCH * (result["batches_per_epoch"] if what == "data" else 1)
        other = cost.get((what, "BasicSR"))
        ratio = f"{other[1] / cpu:.2f}" if other else ""
        named = WORDS["float32"] if (what, who) == ("auto", "BasicSR") else WORDS[what]
        lines.append(
            f"| {named} | {who} | {count / wall:.1f} | {1000 * cpu / count:.2f} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="of 480 px a side at least")
    parser.add_argument("--basicsr", type=Path, help="a clone of its repository")
    parser.add_argument("--batches", type=int, default=64, help="of an epoch of data alone")
    parser.add_argument("--epochs", type=int, default=3, help="of data alone, each")
    parser.add_argument("--rounds", type=int, default=7, help="of steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARKIR_CACHE"] = str(Path(folder) / "cache")
        result = measured(arguments, Path(folder))
    print(table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
