"""Exported networks, each made once: an export takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparkir.deploy.onnx import to_onnx
from sparkir.deploy.parity import Parity, check_parity
from sparkir.deploy.session import Session, open_session
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec


def images(facts: ModelFacts, *shape: int) -> Tensor:
    """Smooth noise (N, C, H, W) of 256 grey levels, in the network's value range."""
    count, height, width = shape
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "srcnn": lambda: build("srcnn", scale=2),
    "dncnn": lambda: build("dncnn", depth=4, width=8),
    "edsr": lambda: build("edsr", width=8, blocks=1, scale=2),
    "rfdn": lambda: build("rfdn", width=8, blocks=1, scale=2),
    "everything": Everything,
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
    def parity(self) -> Parity:
        torch.manual_seed(0)
        sizes = [(1, 24, 24), (1, 31, 17)]
        return check_parity(self.model, self.frozen, [images(self.facts, *s) for s in sizes])


@cache
def deploy(name: str, bits: int) -> Deployed:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    student = prepare(network, QuantSpec(weight_bits=bits, activation_bits=bits))
    calibrate(student, [images(network.facts, 2, 32, 24)])
    frozen = freeze(student)
    return Deployed(frozen=frozen, model=to_onnx(frozen))


CASES = [
    ("srcnn", 8),
    ("srcnn", 4),
    ("dncnn", 8),
    ("dncnn", 4),
    ("dncnn", 2),
    ("edsr", 8),
    ("edsr", 4),
    ("rfdn", 8),
    ("rfdn", 4),
    ("everything", 8),
]
