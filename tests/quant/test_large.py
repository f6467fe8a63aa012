"""Shipped networks that are too large for every test: what holds of the small ones, in short."""

import pytest
import torch
from toys import LARGE, images, psnr_db, quantized

from sparkir.quant.arithmetic import exact_rounding
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec


@pytest.fixture(params=LARGE, scope="module")
def case(request):
    torch.manual_seed(0)
    network = LARGE[request.param].network().eval()
    return LARGE[request.param], network, images(network, 1, 24, 16)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def w8a8(request, case):
    _, network, x = case
    return quantized(network, QuantSpec(target=request.param), x)


def test_what_stays_in_float_is_named_with_its_reason(case, w8a8):
    expected = case[0].left_in_float
    left = placement_of(w8a8).left_in_float
    assert left.keys() == expected.keys()
    for name, word in expected.items():
        assert word in left[name]


def test_first_and_last_layers_are_found(case):
    network = case[1]
    layers = placement_of(prepare(network, QuantSpec(weight_bits=3, activation_bits=5))).layers
    eight = {name for name, bits in layers.items() if bits == (8, 8)}
    assert {name for name in eight if not name.startswith("rewritten.")} == case[0].edges


def test_8_bits_are_close_to_float(case, w8a8):
    _, network, x = case
    with torch.no_grad():
        found, expected = w8a8.eval()(x), network(x).clamp(0, network.facts.value_range)
    assert psnr_db(found, expected, network.facts.value_range) > case[0].at_least_db


def test_the_integer_network_is_the_student_bit_for_bit(case, w8a8):
    frozen = freeze(w8a8.eval())
    x = images(case[1], 1, 16, 32)
    with torch.no_grad():
        expected = frozen(x)
        assert torch.equal(w8a8(x), expected)
        if placement_of(w8a8).spec.runs_on.any_order:
            with exact_rounding(False):
                assert torch.equal(w8a8(x), expected)
            assert torch.equal(w8a8.train()(x), expected)


def test_everything_learns(case, w8a8):
    restored = w8a8.train()(case[2])
    (restored * torch.randn_like(restored)).sum().backward()
    gradients = {name: p.grad for name, p in w8a8.named_parameters() if p.requires_grad}
    assert {name for name, gradient in gradients.items() if gradient is None} == set()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
