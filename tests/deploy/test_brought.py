"""Networks as users write them, in files that show the integer network's pixels."""

import pytest
import torch
import torch.nn.functional as F
from exported import images
from torch import Tensor, nn

from sparkir.deploy.onnx import to_onnx
from sparkir.deploy.parity import Parity, check_parity
from sparkir.deploy.runtime import saturates
from sparkir.models.facts import ModelFacts
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec
from sparkir.quant.targets import TARGETS


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Brought(nn.Module):
    """head -> ReLU -> `middle` -> ReLU -> tail."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.head, self.middle, self.tail = convolution(3, 8), middle, convolution(8, 3)
        self.facts = ModelFacts(
            name="brought", scale=1, channels=3, value_range=1.0, taps=(), halo_px=8
        )
        nn.init.constant_(self.tail.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(F.relu(self.middle(F.relu(self.head(x)))))


class Layer(nn.Module):
    """What it holds is called `layer`, as are the exporter's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(convolution(8, 8), nn.ReLU(), convolution(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Delicate(nn.Module):
    """Left in float as a whole, with a convolution inside."""

    stays_in_float = "it is delicate"

    def __init__(self) -> None:
        super().__init__()
        self.inner = convolution(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Rows(nn.Module):
    """A convolution of one dimension, which has no integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2)).unflatten(2, (x.shape[2], x.shape[3]))


class InTwoStages(Brought):
    """The first stage's sums are seen by the second, and are a part of the output."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.second, self.third = convolution(3, 8), convolution(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.third(F.relu(self.second(y + x)))


class OnBicubic(Brought):
    """An interpolation that stays in float, added to a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.wide, self.narrow = convolution(3, 12), convolution(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=2, mode="bicubic")
        return F.max_pool2d(self.narrow(y + F.pixel_shuffle(self.wide(x), 2)), 2)


def gate(network: nn.Module, target: str, **options: object) -> Parity:
    spec = QuantSpec(target=target, reduce_range=saturates(TARGETS[target].runtime), **options)
    student = prepare(network.eval(), spec)
    calibrate(student, [images(network.facts, 2, 32, 24)])
    frozen = freeze(student)
    return check_parity(to_onnx(frozen), frozen, [images(network.facts, 1, 96, 80)])


MADE = {
    "layer": lambda: Brought(nn.Sequential(Layer(), Layer())),
    "delicate": lambda: Brought(Delicate()),
    "rows": lambda: Brought(Rows()),
    "two stages": InTwoStages,
    "bicubic": OnBicubic,
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "onnxruntime") for name in MADE),
        *((name, "openvino") for name in MADE if name != "two stages"),  # no step suits both ends
    ],
)
def test_the_file_shows_the_same(name, target):
    torch.manual_seed(0)
    parity = gate(MADE[name](), target)
    assert parity.failures == []
    assert parity.layers


def test_a_transposed_convolution_that_a_recipe_leaves_in_float():
    torch.manual_seed(0)
    middle = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.MaxPool2d(2))
    parity = gate(Brought(middle), "onnxruntime", float_layers=("middle.0",))
    assert parity.failures == []
    assert any(layer.is_float for layer in parity.layers)


def test_what_flows_from_an_operation_in_float_is_known():
    torch.manual_seed(0)
    layers = {layer.name: layer for layer in gate(OnBicubic(), "openvino").layers}
    assert any(layer.is_float for layer in layers.values())
