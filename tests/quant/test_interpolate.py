"""Bilinear interpolation in numbers that are exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparkir.models.facts import ModelFacts
from sparkir.quant.calibrate import calibrate
from sparkir.quant.interpolate import ExactBilinear
from sparkir.quant.layers import Add
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.quantizer import activation_quantizers, leave_in_float
from sparkir.quant.spec import QuantSpec

SIZES = [((10, 9), (70, 61)), ((3, 5), (3, 5)), ((1, 4), (9, 8)), ((12, 12), (5, 7))]


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_it_is_torchs_but_for_weights_of_1_in_128(small, large, corners):
    x = torch.rand(2, 3, *small)
    expected = F.interpolate(x, size=large, mode="bilinear", align_corners=corners)
    found = ExactBilinear(align_corners=corners)(x, *large)
    assert (found - expected).abs().max() <= 2 / 256 + 1e-6


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_it_is_exact_on_whole_numbers(small, large):
    x = torch.randint(0, 256, (1, 2, *small)).float()
    exact = ExactBilinear()(x.double(), *large)
    assert torch.equal(ExactBilinear()(x, *large).double(), exact)


class Resizes(nn.Module):
    facts = ModelFacts(name="resizes", scale=1, channels=3, value_range=1.0, taps=(), halo_px=9)

    def __init__(self, **words) -> None:
        super().__init__()
        self.head, self.tail, self.words = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 3, 1), words

    def forward(self, x):
        small = self.head(x)
        return self.tail(F.interpolate(small, size=(x.size(2), x.size(3)), **self.words))


class Masks(nn.Module):
    """As spatial attention does: sums on a coarse grid, interpolated, and added to others."""

    facts = ModelFacts(name="masks", scale=1, channels=3, value_range=1.0, taps=(), halo_px=9)

    def __init__(self) -> None:
        super().__init__()
        self.head, self.coarse, self.tail = (nn.Conv2d(c, 4, 3, 1, 1) for c in (3, 4, 4))
        self.fine, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = F.relu(self.head(x))
        size = (x.size(2), x.size(3))
        mask = F.interpolate(self.coarse(F.max_pool2d(x, 7, 3)), size=size, mode="bilinear")
        return self.last(self.tail(mask + self.fine(x)))


class Enlarges(nn.Module):
    facts = ModelFacts(name="enlarges", scale=2, channels=3, value_range=1.0, taps=(), halo_px=9)

    def __init__(self, enlarge) -> None:
        super().__init__()
        self.head, self.tail, self.enlarge = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), enlarge

    def forward(self, x):
        return self.tail(self.enlarge(self.head(x)))


def by(mode, factor, **words):
    return lambda x: F.interpolate(x, scale_factor=factor, mode=mode, **words)


@pytest.mark.parametrize(
    "enlarge",
    [
        by("bilinear", 2),
        by("bilinear", (2.0, 2.0), align_corners=True),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, None, 2, "bilinear"),
    ],
)
def test_a_whole_factor_is_a_size(enlarge):
    torch.manual_seed(0)
    network = Enlarges(enlarge)
    student = prepare(network, QuantSpec())
    assert any(isinstance(m, ExactBilinear) for m in student.modules())
    leave_in_float(student, on=True)
    x = torch.rand(1, 3, 6, 5)
    torch.testing.assert_close(student(x), network(x), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "enlarge",
    [
        by("nearest", 2),
        by("nearest-exact", (2.0, 2.0)),
        nn.Upsample(scale_factor=2),
        lambda x: F.interpolate(x, None, 2),
    ],
)
def test_repeating_pixels_keeps_their_grid(enlarge):
    torch.manual_seed(0)
    student = prepare(Enlarges(enlarge), QuantSpec())
    assert placement_of(student).left_in_float == {}
    calibrate(student, [torch.rand(1, 3, 8, 8)])
    assert len(activation_quantizers(student)) == 3  # the image, what is enlarged, the output


@pytest.mark.parametrize(
    "enlarge",
    [
        by("nearest", 1.5),
        by("bilinear", 1.5),
        by("bicubic", 2),
        by("bilinear", 2, antialias=True),
        nn.Upsample(scale_factor=1.5),
        nn.Upsample(size=(9, 9)),
    ],
)
def test_other_resizes_stay_in_float(enlarge):
    student = prepare(Enlarges(enlarge), QuantSpec())
    assert not any(isinstance(m, ExactBilinear) for m in student.modules())
    (reason,) = placement_of(student).left_in_float.values()
    assert reason == "interpolation makes values between grid points"


@pytest.mark.parametrize(
    ("height_and_width", "result"),
    [
        (lambda x: x.shape[-2:], (12, 10)),
        (lambda x: (x.size(2), x.size(3)), (12, 10)),
        (lambda x: [12, x.size(3)], (12, 10)),
        (lambda x: x.size(2), (12, 12)),
        (lambda _: 9, (9, 9)),
    ],
)
@pytest.mark.parametrize("by_place", [False, True])
def test_a_size_may_be_written_in_many_ways(height_and_width, result, by_place):
    def enlarge(x):
        size = height_and_width(x)
        if by_place:
            return F.interpolate(x, size, None, "bilinear", True)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)

    torch.manual_seed(0)
    network = Enlarges(enlarge)
    student = prepare(network, QuantSpec())
    (found,) = (m for m in student.modules() if isinstance(m, ExactBilinear))
    assert found.align_corners
    leave_in_float(student, on=True)
    x = torch.rand(1, 3, 12, 10)
    assert student(x).shape[-2:] == result
    torch.testing.assert_close(student(x), network(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("target", ["portable", "openvino"])
def test_what_is_interpolated_and_added_is_exact(target):
    """In float32 as in float64, so that no order of operations makes a difference."""
    torch.manual_seed(0)
    student = prepare(Masks(), QuantSpec(target=target))
    calibrate(student, [torch.rand(2, 3, 40, 37).mul(255).round() / 255])
    student.eval()
    seen = {}
    for name, module in student.named_modules():
        if isinstance(module, ExactBilinear | Add):
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (m, i, o)}))
    with torch.no_grad():
        student(torch.rand(1, 3, 40, 37).mul(255).round() / 255)
    assert len(seen) == 2
    for module, inputs, result in seen.values():
        exact = module(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs))
        if isinstance(result, torch.Tensor):  # where sums flow on; else a grid's own addition
            assert torch.equal(result.double(), exact)


@pytest.mark.parametrize(
    ("target", "words", "exact"),
    [
        ("openvino", {"mode": "bilinear"}, True),
        ("portable", {"mode": "bilinear", "align_corners": False}, True),
        ("onnxruntime", {"mode": "bilinear"}, True),
        ("openvino", {"mode": "bilinear", "align_corners": True}, True),
        ("openvino", {"mode": "nearest"}, False),
    ],
)
def test_every_target_gets_it(target, words, exact):
    student = prepare(Resizes(**words), QuantSpec(target=target))
    assert any(isinstance(m, ExactBilinear) for m in student.modules()) is exact
    (reason,) = placement_of(student).left_in_float.values()
    assert reason == "interpolation makes values between grid points"
