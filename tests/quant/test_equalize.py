"""Channels are scaled so that rounding costs least, and nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import CASES, WIDTH, Toy, Written, convolution, images

from sparkir.distill.features import observe
from sparkir.errors import SparkirError
from sparkir.models.registry import build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.channels import FIXED, ChannelReader
from sparkir.quant.equalize import equalize
from sparkir.quant.layers import QuantConv2d
from sparkir.quant.prepare import prepare
from sparkir.quant.quantizer import leave_in_float
from sparkir.quant.spec import QuantSpec
from sparkir.quant.targets import TARGETS

PUBLISHED = {
    "edsr": {"width": 8, "blocks": 2, "scale": 2},
    "rfdn": {"width": 8, "blocks": 1, "scale": 2},
    "carn-m": {"width": 8, "scale": 2},
    "imdn": {"width": 8, "blocks": 1, "scale": 2},
    "fmen": {"width": 8, "blocks": 1, "scale": 2},
    "safmn": {"width": 8, "blocks": 1, "scale": 2},
    "mirnet": {"width": 8, "groups": 1, "blocks": 1},
    "nafnet": {"width": 8, "encoder_blocks": [1], "middle_blocks": 1, "decoder_blocks": [1]},
    "swinir": {"width": 8, "depths": [2], "heads": 2},
}


class Uneven(Toy):
    """Channels that differ a hundredfold, and the same network without that."""

    def __init__(self, spread: float = 2.0) -> None:
        super().__init__()
        factors = torch.logspace(-spread / 2, spread / 2, WIDTH)
        with torch.no_grad():
            self.head.weight.mul_(factors.view(-1, 1, 1, 1))
            self.head.bias.mul_(factors)
            self.middle.weight.div_(factors.view(1, -1, 1, 1))

    def body(self, x):
        return self.middle(F.leaky_relu(x, 0.1))


class Routes(Toy):
    """One of each: a gate, a residual sum, a shuffle, a part that two layers own."""

    def __init__(self) -> None:
        super().__init__(tail_inputs=WIDTH // 4 + WIDTH)
        self.gate = convolution(WIDTH, WIDTH, 1)
        self.one, self.other = convolution(WIDTH, WIDTH), convolution(WIDTH, WIDTH)
        self.other.weight = self.one.weight

    def body(self, x):
        gate = torch.sigmoid(self.gate(x))
        gated = x * gate
        summed = self.middle(gated) + gated
        small = F.pixel_unshuffle(F.pixel_shuffle(summed, 2)[:, :, ::2, ::2], 1)
        return torch.cat([small, self.other(self.one(gate))], 1)


class LargestChannel(Toy):
    """A mask from whichever channel is the largest at a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = convolution(1, 1)

    def body(self, x):
        x = self.relu(x)
        return self.middle(x) * torch.sigmoid(self.mask(x.amax(1, keepdim=True)))


def prepared(network: nn.Module, **spec: object):
    torch.manual_seed(1)
    return prepare(network, QuantSpec(**{"weight_bits": 4, "activation_bits": 4} | spec)).eval()


@torch.no_grad()
def in_float(student, x):
    leave_in_float(student, on=True)
    output = student(x)
    leave_in_float(student, on=False)
    return output


def squared_error(network: nn.Module, *, first: bool, x, **spec) -> float:
    student = prepared(network, **spec)
    if first:
        equalize(student, [x])
    calibrate(student, [x], method="minmax")
    with torch.no_grad():
        return F.mse_loss(student(x), network.eval()(x)).item()


def classes_of(student, x):
    """Numbers of the channels of every tensor, by the name of its node."""
    leave_in_float(student, on=True)
    reader = ChannelReader(student)
    reader.run(x)
    return {
        str(n.target if n.op == "call_module" else n.name): list(map(reader.classes.of, channels))
        for n, channels in reader.channels.items()
    }


@pytest.fixture
def few_rounds(monkeypatch):
    """For tests that ask what any factors must keep, not how good they are."""
    monkeypatch.setattr("sparkir.quant.equalize._ROUNDS", 10)


@pytest.mark.usefixtures("few_rounds")
@pytest.mark.parametrize(
    ("name", "target"),
    [(name, "onnxruntime") for name in PUBLISHED] + [("rfdn", target) for target in TARGETS],
)
def test_every_network_computes_the_same(name, target):
    torch.manual_seed(0)
    network = build(name, **PUBLISHED[name]).eval()
    x = torch.rand(2, network.facts.channels, 32, 32) * network.facts.value_range
    student = prepared(network, target=target)
    weights = [m.weight.detach().clone() for m in student.modules() if isinstance(m, QuantConv2d)]
    before, after = equalize(student, [x])
    torch.testing.assert_close(
        in_float(student, x), network(x), rtol=1e-4, atol=1e-5 * network.facts.value_range
    )
    assert sum(after) <= sum(before) * 1.0001
    layers = [m.weight for m in student.modules() if isinstance(m, QuantConv2d)]
    changed = [not torch.equal(a, b) for a, b in zip(weights, layers, strict=True)]
    # Everything in the other two ends at a normalisation, a product or a linear layer.
    assert any(changed) == (name not in ("nafnet", "swinir"))


@pytest.mark.usefixtures("few_rounds")
@pytest.mark.parametrize("case", CASES)
def test_every_construction_computes_the_same(case):
    network = CASES[case].network().eval()
    x = images(network)
    student = prepared(network)
    equalize(student, [x])
    torch.testing.assert_close(in_float(student, x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("few_rounds")
def test_channels_that_are_compared_share_a_factor():
    torch.manual_seed(0)
    network = LargestChannel().eval()
    x = torch.rand(2, 3, 32, 32)
    student = prepared(network)
    equalize(student, [x])
    torch.testing.assert_close(in_float(student, x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("few_rounds")
@pytest.mark.parametrize("frozen", ["head", ""])
def test_frozen_layers_are_scaled_with_the_others(frozen):
    """Whether a parameter is trained is no matter of what the network computes."""
    network = Uneven().eval()
    network.get_submodule(frozen).requires_grad_(False)
    x = images(network)
    student, weight = prepared(network), network.head.weight.clone()
    equalize(student, [x])
    torch.testing.assert_close(in_float(student, x), network(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(student.head.weight, weight)
    assert not student.head.weight.requires_grad
    assert student.tail.weight.requires_grad == bool(frozen)


def test_nothing_is_scaled_without_images_or_by_nan():
    network = Uneven()
    student = prepared(network)
    with pytest.raises(SparkirError, match="no images; it needs at least one"):
        equalize(student, [])
    with pytest.raises(SparkirError, match=r"NaN or infinite.*check its weights"):
        equalize(student, [images(network) * float("nan")])
    for name, value in network.named_parameters():
        assert torch.equal(student.get_parameter(name), value), name


@pytest.mark.parametrize(("bits", "least"), [(8, 8), (4, 4)])
def test_channels_of_unlike_ranges_cost_what_like_ones_cost(bits, least):
    torch.manual_seed(0)
    network = Uneven().eval()
    x = torch.rand(4, 3, 32, 32)
    words = {"x": x, "weight_bits": bits, "activation_bits": bits, "first_last_bits": bits}
    as_it_is = squared_error(network, first=False, **words)
    equalized = squared_error(network, first=True, **words)
    assert equalized < as_it_is / least
    torch.manual_seed(0)
    even = squared_error(Uneven(spread=0.0).eval(), first=False, **words)
    assert equalized < 1.5 * even


def test_the_expected_noise_is_the_noise():
    """To a factor: errors are taken to be even over a step, and not to meet each other."""
    torch.manual_seed(0)
    network, x = Uneven().eval(), torch.rand(4, 3, 32, 32)
    student = prepared(network, weight_bits=8, activation_bits=8)
    exact = network(x).detach()
    before, _ = equalize(copy.deepcopy(student), [x])
    calibrate(student, [x], method="minmax")
    of_the_image = (1 / 255) ** 2 / 12  # whose grid it does not count
    with torch.no_grad():
        found = F.mse_loss(student(x), exact).item() - of_the_image
    assert 0.3 < found / sum(before) < 3


def test_which_channels_share_a_factor():
    torch.manual_seed(0)
    network = Routes().eval()
    found = classes_of(prepared(network), torch.rand(1, 3, 16, 16))
    assert FIXED not in found["head"]
    assert set(found["gate"]) == {FIXED}  # a sigmoid comes next
    assert found["one"] == found["other"] == [FIXED] * WIDTH  # one weight, two layers
    # A gate multiplies; the sum ties both its sides, the shuffle four channels to each other.
    assert found["middle"] == found["head"]
    assert [found["head"].count(c) for c in dict.fromkeys(found["head"])] == [4, 4]


@pytest.mark.usefixtures("few_rounds")
def test_channels_of_a_group_are_read_by_it_alone():
    torch.manual_seed(0)
    network = build("carn-m", width=8, scale=2).eval()
    x = torch.rand(2, 3, 24, 24)
    student = prepared(network)
    assert any(m.groups > 1 for m in student.modules() if isinstance(m, QuantConv2d))
    equalize(student, [x])
    torch.testing.assert_close(in_float(student, x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("few_rounds")
def test_it_leaves_no_trace_but_the_weights():
    torch.manual_seed(0)
    network, x = build("rfdn", width=8, blocks=1, scale=2), torch.rand(2, 3, 24, 24) * 255
    student = prepared(network).train()
    marked = next(student.parameters())
    marked.grad = torch.ones_like(marked)
    state = torch.get_rng_state()
    again = copy.deepcopy(student)
    equalize(student, [x])
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    assert all(p.grad is None for p in student.parameters() if p is not marked)
    assert torch.equal(marked.grad, torch.ones_like(marked))
    with torch.no_grad():
        equalize(again, [x])
    for name, value in student.state_dict().items():
        other = again.state_dict()[name]
        assert torch.allclose(value, other, rtol=0, atol=0, equal_nan=True), name  # no grids yet
    assert not any(name.startswith("taps") for name in student.state_dict())


@pytest.mark.usefixtures("few_rounds")
def test_who_looks_at_features_sees_those_of_the_network():
    torch.manual_seed(0)
    network, x = build("rfdn", width=8, blocks=1, scale=2).eval(), torch.rand(2, 3, 24, 24)
    student = prepared(network)
    equalize(student, [x * 255])
    leave_in_float(student, on=True)
    taps = network.facts.taps
    _, expected = observe(network, taps, x)
    _, found = observe(student, taps, x)
    assert len(found) == len(taps) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_channel_keeps_its_number_from_image_to_image():
    """Or factors that tensors ask for would be those of other channels than the weights get."""
    torch.manual_seed(0)
    network = Uneven().eval()
    x = torch.rand(4, 3, 32, 32)
    at_once, one_by_one = prepared(network), prepared(network)
    equalize(at_once, [x])
    equalize(one_by_one, list(x.split(1)))
    for name, value in at_once.named_parameters():
        other = one_by_one.get_parameter(name)  # grids are still to come
        torch.testing.assert_close(value, other, rtol=0.1, atol=1e-3, equal_nan=True)
    even = squared_error(network, first=False, x=x)
    calibrate(one_by_one, [x], method="minmax")
    with torch.no_grad():
        assert F.mse_loss(one_by_one(x), network(x)).item() < even / 2


def test_ranges_are_of_all_batches_and_gradients_of_the_first_three():
    network = Uneven().eval()
    dull = 0.5 + 0.1 * images(network, 2)
    student = prepare(network, QuantSpec()).eval()
    before, _ = equalize(copy.deepcopy(student), [dull] * 3)
    more, _ = equalize(copy.deepcopy(student), [dull] * 3 + [2 * dull])
    assert more.tensors > 1.1 * before.tensors  # grids are wider
    assert more.weights == before.weights


def shares_a_bias():
    network = Written(lambda net, x: net.middle(net.wide(x)), wide=convolution(8, 8))
    network.wide.bias = network.middle.bias
    return network, {}


def shares_weights_with_a_layer_in_float():
    network = Written(lambda net, x: net.middle(net.wide(F.relu(x))), wide=convolution(8, 8))
    network.wide.weight = network.middle.weight
    return network, {"float_layers": ("wide",)}


def shares_weights_with_a_function():
    def body(net, x):
        return F.conv_transpose2d(net.wide(F.relu(x)), net.wide.weight, padding=1)

    return Written(body, wide=convolution(8, 8)), {}


def reads_one_tensor_twice():
    def body(net, x):
        return net.wide(torch.cat([x, net.middle(x), x], 1))

    return Written(body, wide=convolution(24, 8)), {}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "make",
    [
        shares_a_bias,
        shares_weights_with_a_layer_in_float,
        shares_weights_with_a_function,
        reads_one_tensor_twice,
    ],
)
def test_what_others_own_too_is_not_scaled(make, target):
    network, options = make()
    x = images(network)
    student = prepare(network, QuantSpec(target=target, **options)).eval()
    with torch.no_grad():
        leave_in_float(student, on=True)
        before = student(x)
        equalize(student, [x])
        leave_in_float(student, on=True)
        torch.testing.assert_close(student(x), before, rtol=1e-4, atol=1e-5)
