"""Exported networks, each made once by all processes of a test run: an export takes seconds."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx, nn

from sparkir.deploy.onnx import to_onnx, write_model
from sparkir.deploy.parity import Parity, check_parity
from sparkir.deploy.runtime import saturates
from sparkir.deploy.session import Session, open_session
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec
from sparkir.quant.targets import TARGETS, TargetName

shared_folder: Path | None = None
"""Where processes that run tests side by side leave what they exported."""


def images(facts: ModelFacts, *shape: int) -> Tensor:
    """Smooth noise of 256 grey levels, in the network's value range.

    (N, C, H, W), or more where the network wants multiples.
    """
    count, *size = shape
    height, width = (px + -px % facts.size_multiple for px in size)
    noise = torch.rand(count, facts.channels, height, width)
    smooth = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (smooth * 255).round() / 255 * facts.value_range


class Everything(nn.Module):
    """What the registered networks lack, in one file."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="everything", scale=1, channels=3, value_range=1.0, taps=("head",), halo_px=9
        )
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.per_channel = nn.Linear(8, 8)
        self.per_pixel = nn.Linear(8, 8, bias=False)
        self.per_pixel_2 = nn.Linear(8, 8)
        self.tail = nn.Conv2d(16, 3, 3, padding=1)
        nn.init.constant_(self.tail.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.head(x))
        small = self.depthwise(F.relu(self.strided(wide)))
        large = self.transposed(small)[:, :, : x.size(2), : x.size(3)]
        large = large + F.interpolate(small, size=(x.size(2), x.size(3)), mode="nearest")
        large = self.dilated(F.max_pool2d(large, 3, 1, 1)) * 0.5 + wide
        gate = torch.sigmoid(self.per_channel(wide.mean((2, 3))))[:, :, None, None]
        first, second = (large * gate).chunk(2, dim=1)
        pixels = torch.cat([first, second], 1).permute(0, 2, 3, 1)
        pixels = self.per_pixel_2(F.relu(self.per_pixel(pixels))).permute(0, 3, 1, 2)
        return self.tail(torch.cat([F.relu(self.reflecting(pixels)), wide], dim=1)) + x


class Twins(nn.Module):
    """Two layers of equal weights, as a recursive network has them, and two that are all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="twins", scale=1, channels=3, value_range=1.0, taps=("first",), halo_px=5
        )
        self.head, self.tail = (nn.Conv2d(3, 3, 3, padding=1) for _ in "ht")
        self.first, self.second, self.third, self.fourth = (
            nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(4)
        )
        self.second.weight = self.first.weight
        nn.init.zeros_(self.third.weight)
        nn.init.zeros_(self.fourth.weight)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.head(x))
        twice = F.relu(self.second(F.relu(self.first(features))))
        return self.tail(twice + self.fourth(self.third(features)))


class Branches(nn.Module):
    """Functions of one value behind layers, and in front of an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="branches", scale=1, channels=3, value_range=1.0, taps=("head",), halo_px=9
        )
        self.head, self.first, self.second, self.third = (
            nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8, 8)
        )
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.head(x))
        x = F.leaky_relu(self.first(x), 0.1) + F.gelu(self.second(x))
        return self.tail(x + torch.sigmoid(self.third(x)))


def with_trained_norms(network: nn.Module) -> nn.Module:
    """Give what starts as ones and zeros, or small, values as training leaves them."""
    for name, parameter in network.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(("norm.bias", "norm1.bias", "norm2.bias", "beta", "gamma")):
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "srcnn": lambda: build("srcnn", scale=2),
    "dncnn": lambda: build("dncnn", depth=4, width=8),
    "edsr": lambda: build("edsr", width=8, blocks=1, scale=2),
    "rfdn": lambda: build("rfdn", width=8, blocks=1, scale=2),
    "anchored": lambda: build("rfdn", width=8, blocks=1, scale=2, anchored=True),
    "rlfn": lambda: build("rlfn", width=8, blocks=1, scale=2),
    "bsrn": lambda: build("bsrn", width=16, blocks=1, scale=2),
    "bsrn-s": lambda: build("bsrn-s", width=8, blocks=1, scale=2),
    "carn-m": lambda: build("carn-m", width=8, scale=2),
    "imdn": lambda: build("imdn", width=8, blocks=1, scale=2),
    "fmen": lambda: build("fmen", width=8, blocks=1, scale=2),
    "span": lambda: build("span", width=8, cat_width=8, blocks=2, scale=2),
    "safmn": lambda: with_trained_norms(build("safmn", width=8, blocks=1, scale=2)),
    "plainusr": lambda: build("plainusr", size="u", scale=2),
    "pooling": lambda: build("plainusr", size="s", scale=2),
    "everything": Everything,
    "mirnet": lambda: build("mirnet", width=8, groups=1, blocks=1),
    "nafnet": lambda: with_trained_norms(
        build("nafnet", width=8, encoder_blocks=[1], middle_blocks=1, decoder_blocks=[1])
    ),
    "swinir": lambda: with_trained_norms(build("swinir", width=8, depths=[2], heads=2)),
    "twins": Twins,
    "branches": Branches,
}


@dataclass(frozen=True)
class Deployed:
    """One network, quantized, frozen and exported."""

    frozen: fx.GraphModule
    model: onnx.ModelProto

    @property
    def facts(self) -> ModelFacts:
        return self.frozen.facts

    @cached_property
    def content(self) -> bytes:
        return self.model.SerializeToString()

    @cached_property
    def session(self) -> Session:
        return open_session(self.content)

    @cached_property
    def bits_say(self) -> float:
        """Bytes of the weights at their bits, of the int32 biases and of the weights' steps."""
        layers = {
            self.frozen.get_submodule(name): bits
            for name, (bits, _) in placement_of(self.frozen).layers.items()
        }
        weights = sum(layer.weight.numel() * bits / 8 for layer, bits in layers.items())
        rows = sum(len(one.weight) * (1 + (one.bias is not None)) for one in layers)
        return weights + 4 * rows

    @cached_property
    def parity(self) -> Parity:
        torch.manual_seed(0)
        sizes = [(24, 24), (31, 17)]
        return check_parity(self.model, self.frozen, [images(self.facts, 1, *s) for s in sizes])


def deploy(
    name: str,
    bits: int,
    activation_bits: int | None = None,
    target: TargetName = "onnxruntime",
    grid: str = "auto",
    float_layers: tuple[str, ...] = (),
) -> Deployed:
    spec = QuantSpec(
        weight_bits=bits,
        activation_bits=activation_bits or bits,
        target=target,
        activation_grid=grid,
        float_layers=float_layers,
        reduce_range=saturates(TARGETS[target].runtime),
    )
    return _deployed(name, spec)


@cache
def _deployed(name: str, spec: QuantSpec) -> Deployed:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    student = prepare(network, spec)
    calibrate(student, [images(network.facts, 2, 32, 24)])
    frozen = freeze(student)
    if shared_folder is None:
        return Deployed(frozen=frozen, model=to_onnx(frozen))
    key = hashlib.sha256(f"{name} {spec}".encode()).hexdigest()
    file = shared_folder / f"{key}.onnx"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            write_model(to_onnx(frozen), file)
    return Deployed(frozen=frozen, model=onnx.load(file))


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every layer's weights as they are once the file is loaded, however they are stored."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    pairs = [made_by.get(n.input[1]) for n in layers]
    names = {
        n.name: pair.input[0]
        for n, pair in zip(layers, pairs, strict=True)
        if pair is not None and pair.op_type == "DequantizeLinear"
    }
    alone = copy.deepcopy(model)
    constant = {t.name for t in alone.graph.initializer}
    kept = []
    for node in alone.graph.node:
        if constant.issuperset(node.input):
            kept.append(node)
            constant |= set(node.output)
    for part, content in ((alone.graph.node, kept), (alone.graph.input, [])):
        del part[:]
        part.extend(content)
    del alone.graph.output[:]
    made = {name for node in kept for name in node.output}
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    wanted = sorted({name for name in names.values() if name in made})
    for name in wanted:
        alone.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.INT8, None))
    if wanted:
        session = onnxruntime.InferenceSession(
            alone.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        stored |= dict(zip(wanted, session.run(wanted, {}), strict=True))
    return {layer: stored[name] for layer, name in names.items()}


CASES = [
    ("srcnn", 8),
    ("srcnn", 4),
    ("dncnn", 8),
    ("dncnn", 4),
    ("dncnn", 2),
    ("edsr", 8),
    ("edsr", 4),
    ("rfdn", 8),
    pytest.param(("rfdn", 4), marks=pytest.mark.slow),
    ("everything", 8),
]
