import copy

import pytest
import torch
from tapped import Tapped, lq_images, quantized
from torch import nn

from sparkir.distill.features import _without_padding, at_one_size, observe, paired_taps
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, restore
from sparkir.models.registry import build

TAPS = ("blocks.0", "blocks.1")


def by_hand(network: Tapped, lq: torch.Tensor) -> list[torch.Tensor]:
    x = network.first(network.enlarge(lq * network.facts.value_range))
    features = []
    for block in network.blocks:
        x = block(x)
        features.append(x / network.facts.value_range)
    return features


class TestObserve:
    @pytest.mark.parametrize("value_range", [1.0, 255.0])
    def test_features_are_those_inside_in_units_of_white(self, value_range):
        network, lq = Tapped(value_range=value_range), lq_images()
        output, features = observe(network, TAPS, lq)
        assert torch.equal(output, restore(network, lq))
        for found, expected in zip(features, by_hand(network, lq), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            assert found.std() > 0

    def test_gradients_flow(self):
        network = Tapped()
        _, features = observe(network, TAPS, lq_images())
        features[0].sum().backward()
        assert network.first.weight.grad.abs().max() > 0

    def test_leaves_no_trace(self):
        """Neither on the network nor on its class, so that copies and pickles carry nothing."""
        network = Tapped()
        before = {name: len(m._forward_hooks) for name, m in network.named_modules()}
        observe(network, TAPS, lq_images())
        with pytest.raises(SparkirError):
            observe(network, TAPS, lq_images()[:, :2])
        assert {name: len(m._forward_hooks) for name, m in network.named_modules()} == before
        assert not nn.modules.module._global_forward_hooks
        copy.deepcopy(network)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_of_a_quantized_network_are_real_values(self, bits):
        """Near those of the float network, nearer with more bits."""
        network = Tapped(value_range=255.0)
        expected = by_hand(network, lq_images())
        student = quantized(network, bits)
        for mode in (True, False):
            _, features = observe(student.train(mode), TAPS, lq_images())
            for found, real in zip(features, expected, strict=True):
                assert found.shape == real.shape
                off = (found - real).abs().mean() / real.abs().mean()
                assert 0 < off < {4: 0.5, 8: 0.05}[bits]

    def test_of_a_copy(self):
        """As the moving average makes one."""
        student = quantized(Tapped())
        twin = copy.deepcopy(student)
        twin.facts = student.facts
        with torch.no_grad():
            twin.first.weight.mul_(0)
        own, other = (observe(n, TAPS, lq_images())[1][0] for n in (student, twin))
        assert not torch.equal(own, other)

    @pytest.mark.parametrize("name", ["edsr", "rfdn", "dncnn", "srcnn"])
    @pytest.mark.parametrize("bits", [None, 4])
    def test_every_tap_of_the_published_networks(self, name, bits):
        options = {
            "edsr": {"width": 4, "blocks": 3, "scale": 2},
            "rfdn": {"width": 8, "blocks": 2, "scale": 2},
            "dncnn": {"width": 4, "depth": 5, "channels": 3},
            "srcnn": {"scale": 2},
        }[name]
        network = build(name, **options)
        lq = lq_images(1, side=20)
        shapes = [f.shape for f in observe(network, network.facts.taps, lq)[1]]
        student = network if bits is None else quantized_at(network, lq, bits)
        _, features = observe(student, network.facts.taps, lq)
        assert [f.shape for f in features] == shapes
        assert all(f.requires_grad and f.dtype == torch.float32 for f in features)

    def test_float32_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            output, features = observe(Tapped(), TAPS, lq_images())
        assert {t.dtype for t in (output, *features)} == {torch.float32}

    def test_what_belongs_to_padding_is_cut_off(self):
        network, lq = Tapped(size_multiple=8), lq_images(side=13)
        _, features = observe(network, TAPS, lq)
        assert features[0].shape[-2:] == (13, 13)
        inside = by_hand(network, lq)[0]
        torch.testing.assert_close(features[0][..., :10, :10], inside[..., :10, :10])

    def test_without_taps_is_the_plain_forward(self):
        network = Tapped()
        output, features = observe(network, (), lq_images())
        assert torch.equal(output, restore(network, lq_images()))
        assert features == ()


def quantized_at(network: nn.Module, lq: torch.Tensor, bits: int) -> nn.Module:
    from sparkir.quant.calibrate import calibrate
    from sparkir.quant.prepare import prepare
    from sparkir.quant.spec import QuantSpec

    prepared = prepare(network, QuantSpec(weight_bits=bits, activation_bits=bits))
    calibrate(prepared, [lq * network.facts.value_range])
    return prepared


class Odd(nn.Module):
    """Names taps that cannot be used."""

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.flat = nn.Flatten(2)
        self.facts = ModelFacts(
            name="odd", scale=1, channels=3, value_range=1.0, taps=(tap,), halo_px=0
        )

    def forward(self, x):
        return self.flat(self.conv(x)).view_as(x)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("missing", r"odd has no module 'missing'.*correct facts\.taps"),
        ("unused", r"nothing passed through 'unused' of odd.*name another tap"),
        ("flat", r"the tap 'flat' of odd gives \(2, 3, 144\); name one that gives a feature map"),
    ],
)
def test_taps_that_are_none(tap, message):
    with pytest.raises(SparkirError, match=message):
        observe(Odd(tap), (tap,), lq_images())


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ("ab", "xy", ["ax", "by"]),
        ("abc", "xyz", ["ax", "by", "cz"]),
        ("ab", "wxyz", ["ax", "bz"]),
        ("abc", "wxyz", ["aw", "by", "cz"]),
        ("abcd", "x", ["dx"]),
        ("a", "xyz", ["az"]),
    ],
)
def test_pairs(student, teacher, pairs):
    found = paired_taps(tuple(student), tuple(teacher))
    assert ["".join(pair) for pair in zip(*found, strict=True)] == pairs


def test_maps_of_two_sizes_meet_at_the_smaller():
    large = torch.tensor([[1.0, 3], [5, 7]]).view(1, 1, 2, 2)
    small = torch.tensor([[10.0]]).view(1, 1, 1, 1)
    assert [m.item() for m in at_one_size(large, small)] == [4, 10]
    assert [m.item() for m in at_one_size(small, large)] == [10, 4]
    assert at_one_size(large, large)[0] is large


def test_a_row_that_is_partly_the_images_counts():
    """8.5 of the 10 rows of a feature whose image was padded from 17 to 20 rows: 9, and not 8."""
    assert _without_padding(10, 17, 4) == 9
    assert _without_padding(20, 17, 4) == 17
