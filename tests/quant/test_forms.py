"""Operations said in other words: against the words that they had."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Toy, images, quantized

from sparkir.quant.forms import InterleavedConv2d, exact_step, interleaves
from sparkir.quant.graph import trace
from sparkir.quant.layers import GlobalAverage
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.rewrite import rewrite
from sparkir.quant.spec import QuantSpec

GEOMETRIES = [
    (kernel, stride, padding, kernel_and_output)
    for kernel, stride, padding in itertools.product(range(1, 7), range(1, 4), range(4))
    if (kernel_and_output := stride + 2 * padding - kernel) in range(stride)
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "output_padding"), GEOMETRIES)
def test_a_transposed_convolution_is_several_interleaved(kernel, stride, padding, output_padding):
    layer = nn.ConvTranspose2d(3, 2, kernel, stride, padding, output_padding)
    assert interleaves(layer)
    x = torch.randn(2, 3, 5, 4)
    found = F.pixel_shuffle(InterleavedConv2d(layer)(x), stride)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2},  # 2h + 1
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": (1, 0)},
        {"kernel_size": (2, 4), "stride": 2, "padding": (0, 1)},
        {"kernel_size": 2, "stride": 2, "groups": 2},
        {"kernel_size": 2, "stride": 3, "dilation": 2},
    ],
)
def test_other_transposed_convolutions_are_left_alone(options):
    assert not interleaves(nn.ConvTranspose2d(4, 4, **options))


def slow_exact_step(row: list[float]) -> float | None:
    """The smallest step of which a row is whole multiples of at most 127."""
    largest = max(map(abs, row))
    for level in range(127, 0, -1):
        parts = [value * level / largest for value in row]
        if all(abs(part - round(part)) < 1e-4 for part in parts):
            return largest / level
    return None


@pytest.mark.parametrize(
    "row",
    [[1, 2, 1, 2, 4, 2], [1, 3, 3, 9], [0.1] * 3, [-0.25, 1, 0], [127, 1], [128, 1], [1, 0.70711]],
)
def test_steps_that_hold_constants_exactly(row):
    weight = torch.tensor([row, row], dtype=torch.float32) / 16
    expected, found = slow_exact_step([value / 16 for value in row]), exact_step(weight)
    if expected is None:
        assert found is None
    else:
        torch.testing.assert_close(found, torch.tensor([expected] * 2))


def test_a_row_of_zeros_has_no_step():
    assert exact_step(torch.tensor([[1.0, 1.0], [0.0, 0.0]])) is None


class Means(Toy):
    def body(self, x):
        pixels = x.permute(0, 2, 3, 1).mean(1, keepdim=True)  # over the height: no channels
        means = x.mean((-1, -2)) + x.mean(dim=[2, 3]) + F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)
        x = x * torch.mean(x, dim=1, keepdim=True) + pixels.permute(0, 3, 1, 2)
        return x * means[:, :, None, None] + x.mean((1, 2, 3), keepdim=True)


class Pieces(Toy):
    def body(self, x):
        a, b, c = torch.split(x, [3, 4, 1], dim=1)
        d, e, f = x.chunk(3, 1)
        rows = x.split(2, dim=2)  # how many there are, the size of the image says
        return torch.cat([a, b * c, d * e, f], 1)[:, :8] + rows[0].amax(2, keepdim=True)


@pytest.mark.parametrize(
    ("toy", "left"), [(Means, {"mean", "mean_4"}), (Pieces, {"split_1", "getitem_7"})]
)
def test_other_words_mean_the_same(toy, left):
    network = toy().eval()
    module = trace(network, network.facts.taps)
    rewrite(module, torch.rand(1, 3, 16, 16), torch.rand(1, 3, 24, 24))
    x = images(network, height=18, width=30)
    torch.testing.assert_close(module(x), network(x))
    assert placement_of(prepare(network, QuantSpec())).left_in_float.keys() == left


class Average(Toy):
    def body(self, x):
        return x * F.adaptive_avg_pool2d(x, 1)


@pytest.mark.parametrize("size", [(24, 20), (300, 260)], ids=["small", "beyond 2**24"])
def test_an_average_is_that_of_whole_numbers(size):
    """Against int64: the sum exactly, one multiplier, half to even."""
    network = Average().eval()
    student = quantized(network, QuantSpec(), images(network))
    (node,) = [
        n
        for n in student.graph.nodes
        if n.op == "call_module" and isinstance(student.get_submodule(n.target), GlobalAverage)
    ]
    source, grid = (student.get_submodule(n.target) for n in (node.args[0], next(iter(node.users))))
    with torch.no_grad():
        given = source(torch.randn(2, 8, *size) + 0.5)
        found = grid(GlobalAverage()(given))
        sums = given.ints.to(torch.int64).sum((2, 3), keepdim=True)
        factor = source.scale() / (grid.scale() * size[0] * size[1])
        expected = (sums.float() * factor).round() + grid.zero_level
    assert torch.equal(found.ints + grid.zero_level, expected.clamp(0, 255))


def test_a_factor_stays_a_parameter_and_joins_the_weights():
    class Scaled(Toy):
        def __init__(self):
            super().__init__()
            self.beta = nn.Parameter(torch.rand(1, 8, 1, 1))

        def body(self, x):
            return self.middle(self.relu(x)) * self.beta

    network = Scaled().eval()
    student = prepare(network, QuantSpec(weight_bits=4))
    assert placement_of(student).left_in_float == {}
    assert torch.equal(student.middle.factor, network.beta)
    expected = network.middle.weight * network.beta.view(-1, 1, 1, 1)
    torch.testing.assert_close(student.middle.real_weight(), expected)
    assert {"middle.factor", "beta"} & dict(student.named_parameters()).keys() == {"middle.factor"}
