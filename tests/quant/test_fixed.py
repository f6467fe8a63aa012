"""Normalisation and softmax of fixed bits, against torch's own in float64."""

import pytest
import torch
from torch import nn

from sparkir.models.attention import BiasedSoftmax
from sparkir.models.normalize import LayerNorm2d
from sparkir.quant.arithmetic import Quantized
from sparkir.quant.fixed import FixedLayerNorm, FixedSoftmax, fixed, is_fixed, normalized
from sparkir.quant.layers import MatrixProduct

STEP = torch.tensor(0.037)


def on_grid(*shape: int, step: torch.Tensor = STEP) -> Quantized:
    return Quantized(torch.randint(-128, 128, shape).float(), step, torch.tensor(128.0))


@pytest.mark.parametrize("kind", [nn.LayerNorm, LayerNorm2d])
def test_a_normalisation_is_torchs(kind):
    layer = kind(6)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = on_grid(2, 6, 5, 6)
    expected = layer.double()(x.ints.double() * x.scale.double())
    torch.testing.assert_close(fixed(layer.float())(x), expected.float(), rtol=1e-5, atol=1e-5)


def test_a_normalisation_does_not_depend_on_the_order_of_sums():
    ints = torch.randint(0, 256, (50, 256)).float()
    order = torch.randperm(256)
    epsilon = torch.tensor(1e-3)
    found = normalized(ints[:, order], dim=-1, epsilon=epsilon)
    assert torch.equal(found, normalized(ints, dim=-1, epsilon=epsilon)[:, order])


def test_nothing_is_lost_of_a_small_variance_far_from_zero():
    ints = torch.full((1, 256), 250.0)
    ints[0, 3] = 251
    expected = (ints.double() - ints.double().mean()) / ints.double().std(correction=0)
    found = normalized(ints, dim=-1, epsilon=torch.tensor(0.0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_same_value_everywhere_is_no_division_by_zero():
    x = Quantized(torch.full((1, 4, 1, 1), 7.0), STEP, torch.tensor(0.0))
    assert torch.equal(fixed(LayerNorm2d(4))(x), torch.zeros(1, 4, 1, 1))


@pytest.fixture
def softmax():
    layer = BiasedSoftmax(0.3)
    table, index = torch.randn(9, 2) * 3, torch.randint(0, 9, (5, 7))
    return layer, table, index


@pytest.mark.parametrize("masked", [False, True])
def test_a_softmax_is_torchs_to_a_part_of_1024(softmax, masked):
    layer, table, index = softmax
    mask = torch.zeros(3, 1, 5, 7)
    mask[1, :, :, 3:] = mask[2, :, 0, :6] = -100.0
    x = on_grid(3, 2, 5, 7)
    arguments = (table, index, mask) if masked else (table, index)
    expected = layer(x.ints.double() * x.scale, table.double(), *arguments[1:]).float()
    found = fixed(layer)(x, *arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 5))
    if masked:
        assert not found[mask.expand_as(found) < 0].any()


def test_what_is_hidden_stays_so_however_small_the_step(softmax):
    layer, _, index = softmax
    mask = torch.zeros(5, 7)
    mask[:, 0] = -100.0
    x = on_grid(1, 2, 5, 7, step=torch.tensor(1e-9))
    assert not fixed(layer)(x, torch.zeros(9, 2), index, mask)[..., 0].any()


def test_a_softmax_learns_as_the_smooth_one(softmax):
    layer, table, index = softmax
    x = on_grid(1, 2, 5, 7)
    weight = torch.randn(1, 2, 5, 7)
    gradients = []
    for function in (fixed(layer).train(), lambda x, *rest: layer(x.dequantize(), *rest)):
        ints, biases = x.ints.clone().requires_grad_(), table.clone().requires_grad_()
        (function(x._replace(ints=ints), biases, index) * weight).sum().backward()
        gradients.append((ints.grad, biases.grad))
    torch.testing.assert_close(*gradients)


def test_training_and_evaluation_are_the_same_bits(softmax):
    layer, table, index = softmax
    x, found = on_grid(4, 2, 5, 7), fixed(layer)
    assert torch.equal(found.train()(x, table, index), found.eval()(x, table, index))


def test_what_can_be_fixed():
    assert is_fixed(nn.LayerNorm(4))
    assert not is_fixed(nn.LayerNorm((4, 4)))
    assert not is_fixed(nn.Softmax(-1))
    assert isinstance(fixed(nn.LayerNorm(4)), FixedLayerNorm)
    assert isinstance(fixed(BiasedSoftmax(1.0)), FixedSoftmax)


def test_a_product_of_matrices_is_exact_at_any_length():
    a, b = on_grid(3, 1000), on_grid(1000, 3)
    a.ints[0], b.ints[:, 0] = -127, -127
    b.ints[1, 0] = -126
    sums = MatrixProduct().eval()(a, b)
    exact = a.ints.double() @ b.ints.double()
    assert torch.equal(sums.ints, exact.float())
    assert sums.scale == STEP * STEP
