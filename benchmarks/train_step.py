"""What a training step costs: float, quantized, distilled and SPARK, side by side.

    python benchmarks/train_step.py                      # the table, minutes on one core
    python benchmarks/train_step.py --json result.json

All contenders train EDSR-baseline x4 (LR patch 48, batch 4) in one process, through the real loop,
in turn. On a CPU a turn is a single step of one thread whose CPU time is counted, for a machine's
speed moves by a tenth within seconds; on a GPU it is a whole reward period by the wall clock, for
what a training leaves in the caches is part of its speed. Steps that learn are told from those that
do not: the median of each kind is reported, weighted by how often it comes.
The teacher is an EDSR of five times the student's cost. Peak memory and cold starts are measured in
processes of their own. The exit status is 1 if a ratio that must be reached is not.
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
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import numpy as np
import torch

from sparkir.assemble import Materials, build_network, build_student, calibration_crops, device_for
from sparkir.data.degrade import bicubic_resize
from sparkir.data.outputs import OutputStore, output_store
from sparkir.data.pairs import Batch, PairStore, PatchSampler
from sparkir.memory import keep_freed_memory
from sparkir.recipe import Recipe, from_values
from sparkir.run import loop_settings, training_of
from sparkir.train.loop import train
from sparkir.train.optimize import fast_precision

STUDENT = {"model": "edsr", "options": {"scale": 4}}
TEACHER = {"model": "edsr", "options": {"scale": 4, "width": 144}}  # 5.05 times the products
BATCH, PATCH_PX = 4, 48
IMAGE_PX, IMAGES = 768, 8
PERIOD = 24
"""Steps of a round: a multiple of every source's period of rewards or leads."""
MEMORY_STEPS = 14
"""More than a reward period: the steps over which the peak of memory is looked for."""


@dataclass(frozen=True)
class Contender:
    """One way of training."""

    name: str
    quantized: bool = True
    teacher: str = ""
    """"" for none, `runs` at every step, `stored` if its outputs are."""
    weighting: str = "uniform"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False

    def recipe(self) -> Recipe:
        """The recipe that trains so."""
        values: dict[str, Any] = {
            "name": self.name,
            "data": {"train": "-", "test": "-", "scale": 4, "patch_px": PATCH_PX, "batch": BATCH},
            "student": STUDENT,
            "train": {
                "steps": 1_000_000,
                "precision": self.precision,
                "channels_last": self.channels_last,
                "compile": self.compile,
                "log_every": 1_000_000,
                "checkpoint_every": 1_000_000,
                "calibration_images": 8,
            },
        }
        if self.quantized:
            values["quant"] = {}
        if self.teacher:
            values |= {"teacher": TEACHER, "distill": {}, "weighting": {"name": self.weighting}}
        return from_values(values, "the benchmark")


FAST = {"precision": "bfloat16", "channels_last": True}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = fast_precision(DEVICE)
FASTEST = {**FAST, "compile": True, "precision": "bfloat16" if HALF else "float32"}
"""What those that distil are trained with: QAT's fastest settings on this device."""
ALL = (
    Contender("float, float32", quantized=False),
    Contender("float, float32, channels_last", quantized=False, channels_last=True),
    Contender("float, bfloat16, channels_last", quantized=False, **FAST),
    Contender("QAT, float32"),
    Contender("QAT, float32, channels_last, compile", channels_last=True, compile=True),
    Contender("QAT, bfloat16, channels_last", **FAST),
    Contender("QAT, bfloat16, channels_last, compile", **FAST, compile=True),
    Contender("KD, teacher runs", teacher="runs", **FASTEST),
    Contender("KD, teacher stored", teacher="stored", **FASTEST),
    Contender("SPARK", teacher="stored", weighting="spark", **FASTEST),
    Contender("SPARK (paper)", teacher="stored", weighting="spark-paper", **FASTEST),
)
CONTENDERS = tuple(contender for contender in ALL if HALF or contender.precision == "float32")
"""Without bfloat16 where a processor only emulates it, many times slower."""
BY_NAME = {contender.name: contender for contender in CONTENDERS}


@dataclass(frozen=True)
class Ratio:
    """One line of the result: what is divided by what, and how far it has to come."""

    name: str
    above: tuple[str, ...]
    """The fastest of these is meant."""
    below: tuple[str, ...]
    must: float
    aim: float
    needs_fast_bfloat16: bool = False


def names(*, quantized: bool, precision: str = "") -> tuple[str, ...]:
    """Contenders without a teacher."""
    return tuple(
        c.name
        for c in CONTENDERS
        if not c.teacher and c.quantized == quantized and precision in c.precision
    )


RATIOS = (
    Ratio("QAT / float", names(quantized=True), names(quantized=False), 1.30, 1.10),
    Ratio("uniform KD / QAT", ("KD, teacher stored",), names(quantized=True), 1.10, 1.02),
    Ratio("SPARK / uniform KD", ("SPARK",), ("KD, teacher stored",), 1.15, 1.03),
    Ratio("SPARK (paper) / uniform KD", ("SPARK (paper)",), ("KD, teacher stored",), 1.15, 1.03),
    Ratio(
        "bfloat16 QAT / float32 QAT",
        names(quantized=True, precision="bfloat16"),
        names(quantized=True, precision="float32"),
        0.40,
        0.25,
        needs_fast_bfloat16=True,
    ),
)
LARGEST_DATA_SHARE = 0.05
LARGEST_MEMORY_RATIO = 1.10


def clock_s(device: torch.device) -> float:
    """CPU seconds of this process; on a GPU, the time of day when all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class TimedSampler:
    """A sampler that remembers when it was asked, and when it had answered."""

    def __init__(self, sampler: PatchSampler, device: torch.device) -> None:
        self.sampler, self.device = sampler, device
        self.asked_s: list[float] = []
        self.answered_s: list[float] = []

    def next(self) -> Batch:
        self.asked_s.append(clock_s(self.device))
        batch = self.sampler.next()
        self.answered_s.append(clock_s(self.device))
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {}  # checkpoints are written, and never read


class Training:
    """A contender in the middle of its training."""

    def __init__(self, contender: Contender, folder: Path) -> None:
        recipe, data = contender.recipe(), images()
        device = device_for(recipe)
        torch.manual_seed(0)
        teacher = None
        if recipe.teacher is not None:
            teacher = build_network(recipe.teacher).eval().to(device)
        materials = Materials(
            train=data,
            test=data,
            teacher=teacher,
            student=build_student(recipe, teacher).to(device),
            crops=calibration_crops(data, recipe),
        )
        outputs = stored_outputs(data, folder) if contender.teacher == "stored" else None
        self.task, self.state = training_of(recipe, materials, outputs=outputs)
        self.sampler = TimedSampler(self.state.sampler, device)
        self.state.sampler = self.sampler  # type: ignore[assignment]
        self.settings = loop_settings(recipe, device)
        self.device, self.folder, self.contender = device, folder, contender
        self.steps_s: defaultdict[tuple[bool, bool], list[float]] = defaultdict(list)
        """By how W's source learns in a step: whether from a reward, and from images."""
        self.waited_s: list[float] = []

    def warm_up(self) -> None:
        """Compile, and take every kind of step once."""
        source = self.task.weighting
        learns = any(source.learns_at(step) for step in range(PERIOD))
        self.run(PERIOD if learns else 2)
        self.steps_s.clear()
        self.waited_s.clear()

    @property
    def step_s(self) -> float:
        """Mean over the kinds of step, of each the median."""
        count = sum(map(len, self.steps_s.values()))
        return sum(len(s) / count * statistics.median(s) for s in self.steps_s.values())

    @property
    def data_share(self) -> float:
        """Of the time of all steps, what they waited for their batch."""
        return sum(self.waited_s) / sum(map(sum, self.steps_s.values()))

    def run(self, steps: int) -> list[float]:
        """Train so many steps; seconds of each."""
        ended_s: list[float] = []

        def ends() -> bool:
            ended_s.append(clock_s(self.device))
            return False

        first, asked = self.state.step, len(self.sampler.asked_s)
        train(
            self.task,
            self.state,
            replace(self.settings, steps=first + steps),
            checkpoint=self.folder / "last.pt",
            evaluate=lambda network: float("-inf"),
            report=lambda event: None,
            stop_requested=ends,
        )
        began_s, answered_s = self.sampler.asked_s[asked:], self.sampler.answered_s[asked:]
        steps_s = [end - begin for begin, end in zip(began_s, ended_s, strict=True)]
        source = self.task.weighting
        for step, took_s in enumerate(steps_s, first):
            self.steps_s[source.learns_at(step), source.compares_at(step)].append(took_s)
        self.waited_s += [a - b for a, b in zip(answered_s, began_s, strict=True)]
        return steps_s


def images() -> PairStore:
    """Noise in pictures of a common size: what is in them does not change the time."""
    rng = np.random.default_rng(0)
    gt = [rng.integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8) for _ in range(IMAGES)]
    lq = [bicubic_resize(image, scale=0.25) for image in gt]
    return PairStore(names=[str(i) for i in range(IMAGES)], gt=gt, lq=lq, scale=4)


def stored_outputs(data: PairStore, folder: Path) -> OutputStore:
    """Outputs of no real teacher, on the disk as a real one's would be."""
    store = output_store(folder, ["benchmark"], [(IMAGE_PX, IMAGE_PX)] * IMAGES)
    for index in store.missing():
        store.write(
            index, data.pair(index)[1].astype(np.uint16) * np.uint16(128) + np.uint16(2**14)
        )
    return store


def measure(rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds of a step of every contender, measured in turn."""
    trainings = [Training(contender, folder) for contender in CONTENDERS]
    for training in trainings:
        say(f"first steps of {training.contender.name}")
        training.warm_up()
    turn = PERIOD if DEVICE.type == "cuda" else 1
    turns = rounds * PERIOD // turn
    for number in range(turns):
        say(f"turn {number + 1} of {turns}")
        for training in trainings[number % len(trainings) :] + trainings[: number % len(trainings)]:
            training.run(turn)
    return {
        training.contender.name: asdict(training.contender)
        | {"step_s": training.step_s, "data_share": training.data_share}
        | {"steps_s": [{"kind": k, "s": s} for k, s in training.steps_s.items()]}
        for training in trainings
    }


def in_own_process(what: str, name: str, cache: Path | None = None) -> float:
    """`memory` or `start` of one contender, from a fresh process."""
    environment = dict(os.environ)
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    say(f"{what} of {name}")
    command = [sys.executable, __file__, "--child", what, name]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def child(what: str, name: str) -> float:
    """Peak MiB over a reward period, or seconds of the first step beyond those of a later one."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training(BY_NAME[name], Path(folder))
        if what == "start":
            began_s = time.perf_counter()
            training.run(1)
            first_s = time.perf_counter() - began_s
            return first_s - min(training.run(2))
        training.run(MEMORY_STEPS)
        return peak_mib(training.device)


def peak_mib(device: torch.device) -> float:
    """The most memory that this process held: the GPU's where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would begin at the peak of the parent
        line = next(s for s in status.read_text("ascii").splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def fastest(found: dict[str, dict[str, Any]], contenders: tuple[str, ...]) -> dict[str, Any]:
    return min((found[name] for name in contenders), key=lambda row: row["step_s"])


def judged(found: dict[str, dict[str, Any]], memory_mib: dict[str, float]) -> list[dict[str, Any]]:
    """Every ratio with what it must reach."""
    lines = []
    for ratio in RATIOS:
        if not (ratio.above and ratio.below):  # of what is not measured here
            continue
        above, below = fastest(found, ratio.above), fastest(found, ratio.below)
        lines.append(
            {
                "name": ratio.name,
                "value": above["step_s"] / below["step_s"],
                "must": ratio.must,
                "aim": ratio.aim,
                "of": f"{above['name']} / {below['name']}",
                "counts": fast_bfloat16() or not ratio.needs_fast_bfloat16,
            }
        )
    stored, spark = "KD, teacher stored", "SPARK"
    share = max(found[name]["data_share"] for name in (stored, spark))
    wait = {"name": "waiting for data / step", "value": share, "must": LARGEST_DATA_SHARE}
    lines.append(wait | {"aim": 0.01, "of": "the larger of uniform KD's and SPARK's"})
    if memory_mib:
        peak = {"name": "peak memory SPARK / uniform KD", "must": LARGEST_MEMORY_RATIO, "aim": 1.03}
        value = memory_mib[spark] / memory_mib[stored]
        of = f"{memory_mib[spark]:.0f} / {memory_mib[stored]:.0f} MiB"
        lines.append(peak | {"value": value, "of": of})
    return lines


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices (AMX, or a GPU's tensor cores)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "amx_bf16" in processor_flags()


def processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    line = next((s for s in info.read_text("ascii").splitlines() if s.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    flags = processor_flags()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": sorted(
            f for f in flags if f.startswith(("amx", "avx2", "avx512_bf16", "avx512_vnni"))
        ),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The result for people."""
    clock = "wall clock" if "gpu" in result["machine"] else "CPU time, one thread"
    lines = [
        "# Training speed\n",
        f"EDSR-baseline x4, LR patch {PATCH_PX}, batch {BATCH}; {clock}; medians of "
        f"{result['rounds'] * PERIOD} interleaved steps. {result['machine']}\n",
        "| Ratio | is | must be at most | aim | of |",
        "|---|---:|---:|---:|---|",
    ]
    for line in result["ratios"]:
        verdict = "" if line.get("counts", True) else " (needs AMX or a GPU)"
        cells = (
            f"{line['value']:.3f} | {line['must']:.2f}{verdict} | {line['aim']:.2f} | {line['of']}"
        )
        lines.append(f"| {line['name']} | {cells} |")
    lines += ["", "| Step | ms | data | peak MiB | start s |", "|---|---:|---:|---:|---:|"]
    for row in result["contenders"]:
        name, share = row["name"], f"{row['data_share']:.2%}"
        memory, start = (result[key].get(name) for key in ("memory_mib", "start_s"))
        cells = f"{1000 * row['step_s']:#.3g} | {share} | {shown(memory, 0)} | {shown(start, 1)}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], file: Path | None) -> None:
    """As JSON, and a table beside it."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        file.with_suffix(".md").write_text(as_markdown(result), "utf-8")


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, perhaps write; 1 if something is slower than it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help=f"of {PERIOD} steps each")
    parser.add_argument("--json", type=Path, help="write everything here, and a table beside it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()  # as `sparkir distill` does
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if arguments.child:
        print(child(*arguments.child))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = measure(arguments.rounds, folder)
        result = {
            "machine": machine(),
            "rounds": arguments.rounds,
            "ratios": judged(found, {}),
            "contenders": list(found.values()),
            "memory_mib": {},
            "start_s": {},
        }
        write(result, arguments.json)  # the rest takes minutes, which a lent machine may not have
        memory = {n: in_own_process("memory", n) for n in ("KD, teacher stored", "SPARK")}
        compiled = f"QAT, {FASTEST['precision']}, channels_last, compile"
        start = {compiled: in_own_process("start", compiled, folder / "cache")}
    result |= {"ratios": judged(found, memory), "memory_mib": memory, "start_s": start}
    write(result, arguments.json)
    print(as_markdown(result))
    missed = [
        r["name"] for r in result["ratios"] if r["value"] > r["must"] and r.get("counts", True)
    ]
    if missed:
        say(f"slower than it must be: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
