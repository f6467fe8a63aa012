"""Where the milliseconds of a SPARK step go, and the least that they could be.

    python benchmarks/profile_step.py                # the contender that train_step.py calls SPARK
    python benchmarks/profile_step.py "QAT, bfloat16, channels_last, compile"

Steps of one reward period are profiled and averaged, on one thread. The floors are arithmetic: the
products of all convolutions over the rate of a large matrix product measured here, forward of bytes
where the processor has products of them, backward of bfloat16; and the bytes that rounding must
read and write over the rate of a large copy measured here.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from train_step import BY_NAME, PERIOD, Training

from sparkir.memory import keep_freed_memory
from sparkir.quant.arithmetic import Quantized
from sparkir.quant.convolve import byte_products, has_byte_products
from sparkir.quant.quantizer import ActivationQuantizer

PARTS = {
    "convolutions, forward": (
        *("aten::mkldnn_convolution", "aten::cudnn_convolution"),
        *("onednn::qconv", "_Products"),
    ),
    "convolutions, backward": ("aten::convolution_backward",),
    "rounding to grids": ("## Call Compiled", "Torch-Compiled", "TorchDynamo", "_Round"),
    "pixel shuffle, there and back": ("aten::pixel_shuffle", "aten::pixel_unshuffle"),
    "optimizer": ("Optimizer.", "aten::addcdiv", "aten::addcmul", "aten::lerp", "aten::sqrt"),
}
OTHERS = "all else: losses, weighting, steps of grids, copies"
SIDE = 1536
BYTES_PER_VALUE = 10
"""Rounding in bfloat16: forward reads and writes, backward reads two and writes."""


def part_of(operation: str) -> str:
    found = (part for part, names in PARTS.items() if operation.startswith(names))
    return next(found, OTHERS)


def profiled_ms(training: Training) -> dict[str, float]:
    """Milliseconds of each part, per step."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        training.run(PERIOD)
    parts = dict.fromkeys([*PARTS, OTHERS], 0.0)
    for event in measured.key_averages():
        parts[part_of(event.key)] += event.self_cpu_time_total / 1e3 / PERIOD
    return parts


def best_s(work: Callable[[], object], repeats: int = 5) -> float:
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def floors_ms(training: Training) -> dict[str, float]:
    """The least that one step without a look-ahead can take."""
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(2))
    rate = rate_forward = 2 * SIDE**3 / best_s(lambda: a @ b)
    if has_byte_products():
        bytes_ = torch.ones(SIDE, SIDE, dtype=torch.int8)
        rate_forward = 2 * SIDE**3 / best_s(lambda: torch._int_mm(bytes_, bytes_))
    source = torch.zeros(2**26, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / best_s(lambda: target.copy_(source))
    values: list[int] = []

    def count(module: object, inputs: object, output: object) -> None:
        assert isinstance(output, Quantized)
        values.append(output.ints.numel())

    grids = [m for m in training.task.student.modules() if isinstance(m, ActivationQuantizer)]
    hooks = [grid.register_forward_hook(count) for grid in grids]
    counted = FlopCounterMode(display=False)
    with byte_products(on=False), counted:  # it knows nothing of those
        total = training.task(*(x.float() for x in training.sampler.next())).total()
        forward = counted.get_total_flops()
        total.backward()
    backward = counted.get_total_flops() - forward
    for hook in hooks:
        hook.remove()
    print(
        f"{forward / 1e9:.0f} G operations forward at {rate_forward / 1e9:.0f} G/s, "
        f"{backward / 1e9:.0f} backward at {rate / 1e9:.0f} G/s; "
        f"{sum(values) / 1e6:.0f} M values rounded, {BYTES_PER_VALUE} bytes each, at "
        f"{bandwidth / 1e9:.1f} GB/s\n"
    )
    return {
        "convolutions, forward": 1e3 * forward / rate_forward,
        "convolutions, backward": 1e3 * backward / rate,
        "rounding to grids": 1e3 * BYTES_PER_VALUE * sum(values) / bandwidth,
    }


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    name = sys.argv[1] if len(sys.argv) > 1 else "SPARK"
    with tempfile.TemporaryDirectory() as folder:
        training = Training(BY_NAME[name], Path(folder))
        training.run(PERIOD)  # compiles
        parts = profiled_ms(training)
        floors = floors_ms(training)
    print(f"{name}, ms per step\n\n| part | ms | share |\n|---|---:|---:|")
    total = sum(parts.values())
    for part, taken in parts.items():
        print(f"| {part} | {taken:.0f} | {taken / total:.0%} |")
    print(f"| in all | {total:.0f} | |\n\n| floor | ms |\n|---|---:|")
    for part, least in floors.items():
        print(f"| {part} | {least:.0f} |")


if __name__ == "__main__":
    main()
