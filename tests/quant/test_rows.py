"""Pixel shuffles that copy rows, where training rounds in compiled passes."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import CASES, Written, convolution, images, quantized

from sparkir.quant import fused
from sparkir.quant.forms import in_rows, shuffle_rows
from sparkir.quant.layers import QuantConv2d
from sparkir.quant.prepare import prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 5])
def test_by_hand(factor, channels):
    last = torch.channels_last
    x = torch.randn(2, channels * factor**2, 6, 7).contiguous(memory_format=last)
    rows = torch.stack([in_rows(image, factor) for image in x]).contiguous(memory_format=last)
    found = shuffle_rows(rows, factor)
    assert torch.equal(found, F.pixel_shuffle(x, factor))
    assert found.is_contiguous(memory_format=last)


def shuffle(body, **options):
    """A network of a convolution and a pixel shuffle, written in one way or another."""
    wide = convolution(8, 32, **options)
    return Written(
        lambda net, x: F.max_pool2d(body(net, x), 2), wide=wide, shuffle=nn.PixelShuffle(2)
    )


TOLD = {
    "a module": shuffle(lambda net, x: net.shuffle(net.wide(x))),
    "a function": shuffle(lambda net, x: F.pixel_shuffle(net.wide(x), 2)),
    "by name": shuffle(lambda net, x: torch.pixel_shuffle(net.wide(x), upscale_factor=2)),
    "a ReLU between": shuffle(lambda net, x: net.shuffle(net.relu(net.wide(x)))),
    "called twice": shuffle(lambda net, x: net.shuffle(net.wide(x)) + net.shuffle(net.wide(x))),
}
NOT_TOLD = {
    "read by another": shuffle(
        lambda net, x: net.shuffle(y := net.wide(x)) + net.shuffle(y.roll(1, 1))
    ),
    "in groups": shuffle(lambda net, x: net.shuffle(net.wide(x)), groups=2),
    "moved between": shuffle(lambda net, x: net.shuffle(net.wide(x).roll(1, 1))),
    "by a factor that follows from a size": shuffle(
        lambda net, x: F.pixel_shuffle(y := net.wide(x), y.shape[1] // 16)
    ),
    "not after a convolution": shuffle(lambda net, x: net.shuffle(torch.cat([x, x, x, x], 1))),
}


def shuffled(network, **spec):
    """The convolutions that were told, and for which factor."""
    modules = prepare(network, QuantSpec(**spec)).named_modules()
    return {n: m.shuffled for n, m in modules if isinstance(m, QuantConv2d) and m.shuffled}


@pytest.mark.parametrize("case", TOLD)
def test_what_it_alone_reads(case):
    assert set(shuffled(TOLD[case]).values()) == {2}


@pytest.mark.parametrize("case", NOT_TOLD)
def test_what_it_does_not(case):
    assert shuffled(NOT_TOLD[case]) == {}


def test_not_what_is_looked_at():
    """Who taps a layer sees its channels as the network made them."""
    network = copy.deepcopy(TOLD["a module"])
    network.facts = replace(network.facts, taps=("wide",))
    assert shuffled(network) == {}


def test_of_a_transposed_convolution_and_of_published_networks():
    assert shuffled(CASES["resized"].network()) == {"transposed": 2}
    assert shuffled(CASES["edsr"].network()) == {"tail.0.0": 2}


@pytest.mark.parametrize("case", ["shuffles", "resized", "edsr", "nafnet"])
def test_networks_train_the_same(uncompiled, case):
    """Forward bit for bit; the terms of gradients are summed in another order."""
    last = torch.channels_last
    network = CASES[case].network().to(memory_format=last)
    x = images(network).contiguous(memory_format=last)
    prepared = quantized(network, QuantSpec(weight_bits=4, activation_bits=4), x).train()
    student, usual = copy.deepcopy(prepared), copy.deepcopy(prepared)
    for module in usual.modules():
        if isinstance(module, QuantConv2d):
            module.shuffled = None
    outputs = []
    for network in (usual, student):
        with fused.fused_rounding(True):
            outputs.append(network(x))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    expected, found = (
        {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        for network in (usual, student)
    )
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * largest)


def test_a_frozen_network_has_its_channels_in_order(uncompiled):
    """Wherever it runs."""
    network = CASES["edsr"].network().to(memory_format=torch.channels_last)
    x = images(network).contiguous(memory_format=torch.channels_last)
    frozen = freeze(quantized(network, QuantSpec(), x))
    expected = frozen(x)
    with fused.fused_rounding(True):
        assert torch.equal(frozen(x), expected)


def test_only_then_and_only_in_channels_last(uncompiled):
    """Everywhere else rows would gain nothing, and the last bits of gradients would change."""
    convolution = prepare(CASES["edsr"].network(), QuantSpec()).get_submodule("tail.0.0")
    assert convolution.rows() is None
    with fused.fused_rounding(True):
        assert convolution.rows() is None
        convolution.to(memory_format=torch.channels_last)
        assert convolution.rows() == 2
    assert convolution.rows() is None
