"""The two learned grids, against plain fake quantization and torch's own kernels."""

import copy
import math

import numpy as np
import pytest
import torch
from slow_reference import FAKE_QUANTIZE, lsq
from torch import nn
from toys import unit_grid

from sparkir.quant.arithmetic import (
    Accumulated,
    Average,
    Product,
    Quantized,
    Sum,
    exact_rounding,
    quantize,
)
from sparkir.quant.layers import Concatenate, QuantConv2d
from sparkir.quant.quantizer import ActivationQuantizer, WeightQuantizer, scale_gradient
from sparkir.quant.ranges import RangeObserver
from sparkir.quant.reference import IntegerQuantizer

BITS = range(2, 9)
GRIDS = {
    "affine": {},
    "symmetric": {"symmetric": True},
    "non-negative": {"non_negative": True},
}


def calibrated(x: torch.Tensor, *, method="minmax", **options) -> ActivationQuantizer:
    quantizer = unit_grid(**options)
    quantizer.observer = RangeObserver()
    quantizer(x)
    quantizer.calibrate(method)
    return quantizer


def values(grid: str) -> torch.Tensor:
    """Skewed values; the observer sees them all, later draws go beyond."""
    x = torch.randn(4, 3, 10, 10) * 2 + 0.5
    return x.relu() if grid == "non-negative" else x


@pytest.fixture(params=[(bits, grid) for bits in BITS for grid in GRIDS], ids=str)
def bits_and_grid(request):
    return request.param


# -- activations: values -------------------------------------------------------------------------


def test_values_are_fake_quantizations(bits_and_grid):
    bits, grid = bits_and_grid
    seen = values(grid)
    quantizer = calibrated(seen, bits=bits, **GRIDS[grid])
    x = seen * 3
    found = quantizer(x)
    zero, step = quantizer.zero_level, quantizer.scale().detach()
    expected = lsq(x, step, -zero, 2**bits - 1 - zero)
    torch.testing.assert_close(found.dequantize(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found.ints, found.ints.round())
    stored = found.ints + found.zero
    assert stored.min() == 0
    assert stored.max() == 2**bits - 1


def test_values_are_those_of_torchs_kernel(bits_and_grid):
    """Which multiplies by the inverse of the step: values next to a tie may fall either way."""
    bits, grid = bits_and_grid
    x = values(grid)
    quantizer = calibrated(x, bits=bits, **GRIDS[grid])
    zero, step = quantizer.zero_level, float(quantizer.scale().detach())
    expected = torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 2**bits - 1)
    off_ties = ((x / step).frac().abs() - 0.5).abs() > 1e-4
    assert off_ties.float().mean() > 0.99
    torch.testing.assert_close(
        quantizer(x).dequantize()[off_ties], expected[off_ties], rtol=1e-6, atol=1e-6
    )


def test_zero_stays_exactly_zero(bits_and_grid):
    bits, grid = bits_and_grid
    found = calibrated(values(grid), bits=bits, **GRIDS[grid])(torch.zeros(5))
    assert torch.equal(found.ints, torch.zeros(5))
    assert torch.equal(found.dequantize(), torch.zeros(5))


def test_where_zero_lies(bits_and_grid):
    bits, grid = bits_and_grid
    zero = calibrated(values(grid), bits=bits, **GRIDS[grid]).zero_level
    if grid == "non-negative":
        assert zero == 0
    elif grid == "symmetric":
        assert zero == 2 ** (bits - 1)
    else:
        assert 0 < zero < 2**bits - 1
        assert zero < 2 ** (bits - 1) or bits == 2  # the values lean to the positive side


def test_symmetric_starts_at_zero_where_nothing_is_negative():
    assert calibrated(torch.rand(100), bits=4, symmetric=True).zero_level == 0


# -- activations: gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("learned", FAKE_QUANTIZE)
def test_gradients_are_fake_quantizations(bits_and_grid, learned):
    bits, grid = bits_and_grid
    quantizer = calibrated(values(grid), bits=bits, learned=learned, **GRIDS[grid])
    x = (values(grid) * 1.5).requires_grad_()
    weight = torch.randn_like(x)
    (quantizer(x).dequantize() * weight).sum().backward()

    zero, top = quantizer.zero_level, 2**bits - 1
    slow_x = x.detach().clone().requires_grad_()
    log_step = quantizer.log_scale.detach().clone().requires_grad_()
    slow = FAKE_QUANTIZE[learned](slow_x, log_step.exp(), -zero, top - zero)
    (slow * weight).sum().backward()
    # LSQ, section 2.2: the step's gradient is scaled by 1 / sqrt(N * Q).
    factor = 1 / math.sqrt(x.numel() * top) if learned == "lsq" else 1.0
    torch.testing.assert_close(x.grad, slow_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        quantizer.log_scale.grad, log_step.grad * factor, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("learned", ["lsq", "pams"])
def test_gradient_of_the_step_in_closed_form(learned):
    """LSQ: round(v) - v inside the range, the bound outside. PAMS: nothing, the bound."""
    quantizer = unit_grid(bits=4, learned=learned)
    x = torch.tensor([0.3, 1.6, 3.0, 14.9, 40.0, -2.0])
    by_hand = {"lsq": [-0.3, 0.4, 0.0, 0.1, 15.0, 0.0], "pams": [0.0, 0.0, 0.0, 0.0, 15.0, 0.0]}
    for place, expected in enumerate(by_hand[learned]):
        quantizer.log_scale.grad = None
        quantizer(x[place]).dequantize().backward()
        factor = 1 / math.sqrt(15) if learned == "lsq" else 1.0
        assert float(quantizer.log_scale.grad) == pytest.approx(expected * factor, abs=1e-6)


def operand(shape: tuple[int, ...]) -> Quantized:
    # A generator of its own: these are drawn when tests are collected, whichever those are.
    ints = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0))
    return Quantized(ints.float(), torch.tensor(0.3), torch.tensor(0.0))


# Not of one step, as a range of 16 levels could hold all of its values; the gradient is then zero.
CONVOLUTION = Accumulated(
    operand((2, 3, 4, 5)).ints, torch.tensor([0.2, 0.23, 0.31]).reshape(3, 1, 1)
)


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (torch.linspace(-1, 2, 120).reshape(2, 3, 4, 5), 120),
        (operand((2, 3, 4, 5)), 120),
        (CONVOLUTION, 120),
        (Sum(operand((2, 3, 4, 5)), operand((2, 3, 4, 5))), 120),
        (Product(operand((2, 3, 4, 5)), operand((2, 3, 1, 1))), 120),
        (Product(operand((2, 1, 4, 5)), operand((2, 3, 1, 1))), 120),
        (Average(operand((2, 3, 4, 5)).ints, torch.tensor(9.1), torch.tensor(0.0), 20), 6),
    ],
    ids=["tensor", "grid", "convolution", "sum", "gate", "outer product", "average"],
)
def test_the_gradient_scale_counts_every_value(value, count):
    """Whatever operation made the tensor; otherwise additions would learn at another rate."""
    quantizer = unit_grid(bits=4)
    quantizer(value).dequantize().square().sum().backward()
    gradient = float(quantizer.log_scale.grad)
    with exact_rounding(False):
        quantizer.eval().log_scale.grad = None
        quantizer(value).dequantize().square().sum().backward()
    assert abs(gradient) > 0
    assert gradient == pytest.approx(float(quantizer.log_scale.grad) / math.sqrt(count * 15))


def test_processes_that_share_a_batch_average_to_its_gradient():
    """Each takes the mean over its half; the gradient scale must count the values of both."""
    batch, steps = torch.randn(4, 3, 5, 5), []
    for parts, ranks in ((batch.split(4), 1), (batch.split(2), 2)):
        quantizer = unit_grid(bits=4)
        quantizer.ranks = ranks
        for part in parts:
            (quantizer(part).dequantize().square().mean() / ranks).backward()
        steps.append(float(quantizer.log_scale.grad))
    assert steps[1] == pytest.approx(steps[0])


def test_scale_gradient_changes_the_gradient_alone():
    x = torch.tensor(0.37, requires_grad=True)
    y = scale_gradient(x, 0.01)
    y.backward()
    assert float(y.detach()) == pytest.approx(0.37, rel=1e-6)
    assert float(x.grad) == pytest.approx(0.01)


def test_nothing_is_learned_without_learning():
    quantizer = unit_grid(bits=4, learned="none")
    assert not quantizer.log_scale.requires_grad
    x = torch.randn(50, requires_grad=True)
    quantizer(x).dequantize().sum().backward()
    assert quantizer.log_scale.grad is None
    assert torch.equal(x.grad, ((x.detach() >= 0) & (x.detach() <= 15)).float())


# -- activations: evaluation ---------------------------------------------------------------------


def test_evaluation_rounds_additions_as_the_runtime_and_training_in_float32():
    """All pairs of bytes, on steps that put many sums halfway between two levels."""
    stored, zeros = torch.arange(256.0), torch.tensor([3.0, 77.0])
    value = Sum(
        Quantized(stored[:, None] - zeros[0], torch.tensor(0.0123), zeros[0]),
        Quantized(stored[None, :] - zeros[1], torch.tensor(0.0369), zeros[1]),
    )
    quantizer = unit_grid(bits=8)
    with torch.no_grad():
        quantizer.log_scale.fill_(math.log(0.0738))
        options = {"scale": quantizer.scale(), "zero": torch.tensor(0.0), "zero_level": 0}
        exact, in_float32 = (
            quantize(value, **options, levels=256, exact=exact).ints for exact in (True, False)
        )
        assert not torch.equal(exact, in_float32)
        assert torch.equal(quantizer.train()(value).ints, in_float32)
        assert torch.equal(quantizer.eval()(value).ints, exact)
        assert torch.equal(IntegerQuantizer(quantizer)(value).ints, exact)
        with exact_rounding(False):
            assert torch.equal(quantizer(value).ints, in_float32)


# -- activations: the image's grid ---------------------------------------------------------------


@pytest.mark.parametrize("value_range", [1.0, 255.0])
def test_the_image_grid_is_lossless_and_fixed(value_range):
    quantizer = ActivationQuantizer(bits=8, learned="lsq", image_step=value_range / 255)
    assert not quantizer.log_scale.requires_grad
    levels = torch.arange(256)
    image = (levels.float() / 255) * value_range  # as it is read from a file
    for _ in range(2):
        found = quantizer(image)
        assert torch.equal(found.ints, levels.float())
        torch.testing.assert_close(found.dequantize(), image, rtol=2e-7, atol=0)
        assert torch.equal(quantizer.scale(), torch.tensor(value_range / 255))
        quantizer.observer = RangeObserver()  # calibration changes nothing
        quantizer(image * 0.5 - 0.2)
        quantizer.calibrate("minmax")
    clipped = quantizer(torch.tensor([-1.0, 300.0]) * value_range)
    assert clipped.ints.tolist() == [0.0, 255.0]


# -- activations: states -------------------------------------------------------------------------


def test_under_an_observer_values_pass_and_are_recorded():
    quantizer = unit_grid(bits=2)
    quantizer.observer = RangeObserver()
    x = torch.randn(100)
    assert quantizer(x) is x
    assert (quantizer.observer.low, quantizer.observer.high) == (float(x.min()), float(x.max()))
    quantizer.calibrate("mse")
    assert quantizer.observer is None
    assert isinstance(quantizer(x), Quantized)


def test_a_tensor_that_kept_its_grid_is_not_rounded_again():
    quantizer = calibrated(torch.randn(100), bits=4)
    first = quantizer(torch.randn(2, 4))
    moved = first._replace(ints=first.ints.flip(1))
    assert quantizer(moved) is moved
    other = calibrated(torch.randn(100) * 3, bits=4)
    assert other(moved) is not moved


@pytest.mark.parametrize("training", [True, False])
def test_float32_under_bfloat16(training):
    quantizer = calibrated(torch.randn(1000), bits=8).train(training)
    layer = QuantConv2d(nn.Conv2d(3, 4, 3), bits=8, learned="lsq").train(training)
    layer.weight_quantizer.calibrate(layer.weight, "minmax")
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        on_x = quantizer(x)
        sums = layer(on_x)
        on_y = quantizer(sums)
        bfloat = quantizer(x.bfloat16())
    for found in (on_x, on_y, bfloat):
        assert found.ints.dtype == torch.float32
        assert torch.equal(found.ints, found.ints.round())
        assert found.dequantize().dtype == torch.float32
    assert sums.dequantize().dtype == torch.float32
    torch.testing.assert_close(on_x.ints, quantizer(x).ints, rtol=0, atol=0)
    assert (on_y.ints - quantizer(layer(quantizer(x))).ints).abs().max() <= 2
    torch.testing.assert_close(bfloat.ints, quantizer(x.bfloat16().float()).ints)


def test_state_brings_the_zero_point_back_on_the_host():
    x = torch.randn(100) + 1
    source = nn.Sequential(calibrated(x, bits=4))
    target = nn.Sequential(unit_grid(bits=4))
    assert target[0].zero_level != source[0].zero_level
    target.load_state_dict(source.state_dict())
    assert target[0].zero_level == source[0].zero_level == int(source[0].zero_point)
    assert torch.equal(target[0](x).ints, source[0](x).ints)


def test_a_copy_computes_the_same_and_is_independent():
    x = torch.randn(100) + 1
    source = calibrated(x, bits=4)
    copied = copy.deepcopy(source)
    assert torch.equal(copied(x).ints, source(x).ints)
    assert copied(copied(x)).zero is copied.zero_point
    copied.load_state_dict(calibrated(x - 3, bits=4).state_dict())
    assert copied.zero_level != source.zero_level
    assert not source.log_scale.equal(copied.log_scale)


# -- weights -------------------------------------------------------------------------------------


def weight_quantizer(weight: torch.Tensor, bits: int, learned="lsq") -> WeightQuantizer:
    quantizer = WeightQuantizer(len(weight), bits=bits, learned=learned)
    quantizer.calibrate(weight, "mse")
    return quantizer


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 1, 3, 3), (6, 7)])
def test_weights_are_those_of_torchs_kernel(bits, shape):
    weight = torch.randn(shape) * torch.rand(len(torch.empty(shape)), *[1] * (len(shape) - 1))
    quantizer = weight_quantizer(weight, bits)
    ints, scale = quantizer(weight)
    assert scale.shape == shape[:1]
    assert torch.equal(ints, ints.round())
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= ints.min()
    assert ints.max() <= high
    per_channel = scale.detach().view(-1, *[1] * (len(shape) - 1))
    expected = torch.fake_quantize_per_channel_affine(
        weight, scale.detach(), torch.zeros(shape[0], dtype=torch.int32), 0, low, high
    )
    off_ties = ((weight / per_channel).frac().abs() - 0.5).abs() > 1e-4
    assert off_ties.float().mean() > 0.9
    torch.testing.assert_close(
        (ints * per_channel)[off_ties], expected[off_ties], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("learned", FAKE_QUANTIZE)
def test_gradients_of_weights_and_their_steps(bits, learned):
    start = torch.randn(4, 3, 3, 3)
    quantizer = weight_quantizer(start, bits, learned)
    weight = (start * 1.3).requires_grad_()  # some are clipped
    gradient = torch.randn_like(weight)
    ints, scale = quantizer(weight)
    (ints * scale.view(-1, 1, 1, 1) * gradient).sum().backward()

    slow_weight = weight.detach().clone().requires_grad_()
    log_step = quantizer.log_scale.detach().clone().requires_grad_()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    slow = FAKE_QUANTIZE[learned](slow_weight, log_step.exp().view(-1, 1, 1, 1), low, high)
    (slow * gradient).sum().backward()
    assert (slow_weight.grad == 0).any()
    factor = 1 / math.sqrt(27 * high) if learned == "lsq" else 1.0
    torch.testing.assert_close(weight.grad, slow_weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        quantizer.log_scale.grad, log_step.grad * factor, rtol=1e-3, atol=1e-5
    )


def test_fixed_weight_steps():
    quantizer = WeightQuantizer(3, bits=4, learned="none")
    assert not quantizer.log_scale.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_bias_is_an_integer_on_the_grid_of_the_sums(training):
    layer = QuantConv2d(nn.Conv2d(3, 4, 3), bits=4, learned="lsq").train(training)
    layer.weight_quantizer.calibrate(layer.weight, "mse")
    weight, bias, scale = layer.integers(torch.tensor(0.013))
    expected = layer.weight_quantizer.scale() * np.float32(0.013)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(bias, (layer.bias / scale).round(), rtol=0, atol=0)
    assert torch.equal(weight, layer.weight_quantizer(layer.weight)[0])
    (bias * scale).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.ones(4))


def test_a_concatenations_step_learns_from_every_part():
    """Of unlike size, for each of which LSQ's factor is another; readers know the first part's."""
    small, large = torch.randn(1, 1, 4, 4), torch.randn(1, 7, 4, 4)

    def gradient(read) -> float:
        quantizer = unit_grid(bits=4)
        read(quantizer, quantizer(small), quantizer(large))
        return float(quantizer.log_scale.grad)

    def together(quantizer, *parts):
        Concatenate(1)(*parts).dequantize().square().sum().backward()

    def apart(quantizer, *parts):
        sum(part.dequantize().square().sum() for part in parts).backward()

    assert gradient(together) == pytest.approx(gradient(apart), rel=1e-5)
