"""What you have already: a student, a teacher, images, a metric. Here: x2 super-resolution, small.

Every example trains this student, from the same float weights, on the same crops of the photographs
inside scikit-image; equal seeds make equal pairs. `report` is what each script ends in.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from sparkir.data.degrade import BicubicDownscale
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.data.photographs import photographs
from sparkir.evaluate.metrics import Convention, psnr_db, to_uint8
from sparkir.models.checkpoint import load_weights
from sparkir.models.facts import restore
from sparkir.models.registry import build
from torch import Tensor, nn

STEPS, BATCH, PATCH_PX, LQ_SIZE = 80, 8, 32, (144, 208)
FLOAT_STEPS = 300
CONVENTION = Convention(space="y", crop_px=2)


class Student(nn.Module):
    """Three convolutions on top of enlarged pixels; (B, 3, h, w) in [0, 1] -> (B, 3, 2h, 2w).

    Args:
        conv: makes a convolution; a library that swaps layers gives its own.
        relu: makes an activation.
        quant: makes what stands where a tensor is to be put on a grid.
    """

    def __init__(self, conv=nn.Conv2d, relu=nn.ReLU, quant=nn.Identity) -> None:
        super().__init__()
        self.body = nn.Sequential(
            quant(),
            conv(3, 24, 3, padding=1),
            relu(),
            quant(),
            conv(24, 24, 3, padding=1),
            relu(),
            quant(),
            conv(24, 12, 3, padding=1),
        )

    def forward(self, lq: Tensor) -> Tensor:
        """The enlarged pixels and what the convolutions add to them."""
        return F.interpolate(lq, scale_factor=2.0) + F.pixel_shuffle(self.body(lq), 2)

    def convolutions(self) -> list[nn.Module]:
        """The layers with weights, in order."""
        return [m for m in self.body if getattr(m, "weight", None) is not None]


def student(seed: int, **parts: Callable[..., nn.Module]) -> Student:
    """The student with the float weights of this seed; `parts` are a library's own layers."""
    made = Student(**parts)
    for own, (weight, bias) in zip(made.convolutions(), _float_weights(seed), strict=True):
        with torch.no_grad():
            own.weight.copy_(weight)
            own.bias.copy_(bias)
    torch.manual_seed(seed)
    return made


def teacher(lq: Tensor) -> Tensor:
    """What the small RFDN that ships with sparkir makes of a batch, in [0, 1]."""
    with torch.no_grad():
        return restore(_rfdn(), lq)


def batches(seed: int, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops (B, 3, 32, 32) and their ground truth (B, 3, 64, 64), [0, 1]."""
    sampler = PatchSampler(_pairs("train"), patch_px=PATCH_PX, batch=BATCH, seed=seed)
    for _ in range(steps):
        lq, gt = sampler.next()
        yield lq / 255, gt / 255


def psnr(network: Callable[[Tensor], Tensor]) -> list[float]:
    """PSNR-Y in dB of the middle of every test photograph."""
    found = []
    for lq, gt in _test():
        with torch.no_grad():
            found.append(psnr_db(to_uint8(network(lq))[0], gt, CONVENTION))
    return found


def example_inputs() -> tuple[Tensor]:
    """One test image, (1, 3, 144, 208): what exporters trace a network with."""
    return (_test()[0][0],)


def onnx_psnr(path: Path) -> list[float]:
    """The same for an exported file, executed by ONNX Runtime as it is written.

    Its integer kernels saturate on x86 without VNNI, and its own remedy (the session option
    `session.x64quantprecision`) refuses files whose layers share a zero point, as in torch's.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return psnr(lambda lq: torch.from_numpy(session.run(None, {name: lq.numpy()})[0]))


def report(main: Callable[..., dict[str, list[float]]], *libraries: str) -> None:
    """Run an example from the command line; what was computed by what, then every PSNR."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    torch.set_num_threads(1)
    began, chosen = time.process_time(), vars(parser.parse_args())
    found = main(**chosen, folder=Path(tempfile.mkdtemp(prefix="sparkir-example-")))
    versions = {name: version(name) for name in ("sparkir", "torch", *libraries)}
    took_s = round(time.process_time() - began, 1)
    print(json.dumps(chosen | {"versions": versions, "cpu_s": took_s, "psnr_db": found}))


@cache
def _float_weights(seed: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    made = Student()
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-3)
    for lq, gt in batches(1000 + seed, FLOAT_STEPS):
        optimizer.zero_grad()
        F.l1_loss(made(lq), gt).backward()
        optimizer.step()
    return [(m.weight.detach(), m.bias.detach()) for m in made.convolutions()]


@cache
def _rfdn() -> nn.Module:
    import sparkir.models

    network = build("rfdn", width=32, blocks=3, scale=2, value_range=1.0)
    folder = Path(sparkir.models.__file__).parent
    load_weights(network, folder / "weights" / "rfdn-x2-small.safetensors")
    return network.eval()


@cache
def _pairs(split: str) -> PairStore:
    folder = Path(tempfile.gettempdir()) / "sparkir-examples"
    return PairStore.from_images(photographs(split), BicubicDownscale(2), cache=folder)


@cache
def _test() -> list[tuple[Tensor, object]]:
    (height, width), pairs = LQ_SIZE, _pairs("test")
    found = []
    for index in range(len(pairs)):
        lq, gt = pairs.pair(index)
        top, left = (lq.shape[0] - height) // 2, (lq.shape[1] - width) // 2
        cut = lq[top : top + height, left : left + width]
        whole = gt[2 * top : 2 * (top + height), 2 * left : 2 * (left + width)]
        found.append((torch.from_numpy(cut.copy()).permute(2, 0, 1)[None] / 255, whole))
    return found
