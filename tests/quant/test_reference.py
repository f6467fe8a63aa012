"""The integer network: the student in whole numbers, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from toys import CASES, Plain, Toy, images, in_turn, quantized, unit_grid

from sparkir.errors import SparkirError
from sparkir.quant.arithmetic import Quantized
from sparkir.quant.calibrate import calibrate
from sparkir.quant.layers import QuantConv2d, QuantLinear
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.quantizer import ActivationQuantizer
from sparkir.quant.reference import (
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    IntegerQuantizer,
    freeze,
    stored_bytes,
)
from sparkir.quant.spec import QuantSpec

SPECS = {
    "W8A8": QuantSpec(),
    "W4A4 symmetric PAMS": QuantSpec(
        weight_bits=4, activation_bits=4, activation_grid="symmetric", learned="pams"
    ),
    "W2A3 edges in 5": QuantSpec(
        weight_bits=2, activation_bits=3, first_last_bits=5, calibration="minmax"
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize(("case", "spec"), in_turn(SPECS))
def test_the_integer_network_is_the_student_bit_for_bit(case, spec):
    network = CASES[case].network().eval()
    student = quantized(network, SPECS[spec], images(network))
    before = copy.deepcopy(student.state_dict())
    frozen = freeze(student.train())
    assert student.training
    assert not frozen.training
    student.eval()
    with torch.no_grad():
        for size in ((24, 20), (32, 36)):
            x = images(network, 1, *size)
            assert torch.equal(frozen(x), student(x))
    assert {type(m) for m in student.modules()} & {IntegerConv2d, IntegerQuantizer} == set()
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)

    assert frozen.facts == network.facts
    assert placement_of(frozen) == placement_of(student)
    assert not list(dict(frozen.named_parameters()).keys() & placement_of(frozen).layers.keys())
    for name, (bits, _) in placement_of(frozen).layers.items():
        layer = frozen.get_submodule(name)
        assert isinstance(layer, IntegerLayer)
        assert layer.weight.dtype == torch.int8
        assert layer.weight.min() >= -(2 ** (bits - 1))
        assert layer.weight.max() <= 2 ** (bits - 1) - 1
        assert layer.bias is None or layer.bias.dtype == torch.int32


def test_after_training_too():
    network = CASES["residual"].network()
    x = images(network)
    student = quantized(network, QuantSpec(weight_bits=4, activation_bits=4), x).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(3):
        student(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(freeze(student)(x), student.eval()(x))


def test_nothing_of_the_student_is_learned_any_more():
    network = CASES["plain"].network()
    frozen = freeze(quantized(network, QuantSpec(), images(network)))
    assert list(frozen.parameters()) == []


def test_weights_from_a_file_freeze_to_the_same_network(case):
    network = case.network().eval()
    spec = QuantSpec(weight_bits=4, activation_bits=4)
    student = quantized(network, spec, images(network))
    again = prepare(case.network().eval(), spec)
    again.load_state_dict(student.state_dict())
    expected, found = freeze(student), freeze(again)
    for name, buffer in expected.named_buffers():
        assert torch.equal(found.get_buffer(name), buffer), name
    x = images(network)
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))


# -- against whole numbers in numpy --------------------------------------------------------------


class Mixed(Toy):
    """Strided, depthwise and linear layers, with and without bias, in a row."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def body(self, x):
        return self.depthwise(self.relu(self.strided(self.relu(x))))


def slow_convolution(x, weight, bias, *, stride=1, groups=1):
    """Sums of whole numbers in int64, one kernel position at a time; 3x3, zero padding."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    count, channels, height, width = x.shape
    out = np.zeros((count, len(weight), -(-height // stride), -(-width // stride)), np.int64)
    share = len(weight) // groups
    for o in range(len(weight)):
        for i in range(weight.shape[1]):
            source = i + (o // share) * (channels // groups)
            for row in range(3):
                for column in range(3):
                    moved = padded[:, source, row : row + height, column : column + width]
                    out[:, o] += moved[:, ::stride, ::stride] * weight[o, i, row, column]
        if bias is not None:
            out[:, o] += bias[o]
    return out


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_against_a_slow_network_of_int64(bits):
    network = Mixed().eval()
    x = images(network, 2, 15, 17)
    spec = QuantSpec(weight_bits=bits, activation_bits=bits)
    frozen = freeze(quantized(network, spec, x))

    def layer(name, value, step):
        """Sums, with the step of each output channel."""
        module = frozen.get_submodule(name)
        bias = None if module.bias is None else module.bias.numpy().astype(np.int64)
        sums = slow_convolution(
            value,
            module.weight.numpy().astype(np.int64),
            bias,
            stride=module.geometry.stride[0],
            groups=module.geometry.groups,
        )
        return sums, step * module.weight_scale.numpy()

    def to_grid(name, sums, sum_step):
        """clamp(rint(float32(sum) * float32(s_x * s_w / s_y)))."""
        module = frozen.get_submodule(f"quantizers.{name}")
        step, zero = module.scale.numpy(), int(module.zero_point)
        multiplier = (sum_step / step).astype(np.float32)[:, None, None]
        ints = np.rint(sums.astype(np.float32) * multiplier).astype(np.int64)
        return ints.clip(-zero, module.levels - 1 - zero), step

    value = np.rint(x.numpy().astype(np.float64) * 255).astype(np.int64)
    step = np.float32(1 / 255)
    for name, grid in [
        ("head", "relu"),
        ("strided", "relu_1"),
        ("depthwise", "depthwise"),
        ("tail", "tail"),
    ]:
        value, step = to_grid(grid, *layer(name, value, step))
    with torch.no_grad():
        restored = frozen(x)
    assert len(np.unique(value)) > 10
    np.testing.assert_array_equal((restored * 255).round().long().numpy(), value)


def image_grid() -> IntegerQuantizer:
    return IntegerQuantizer(ActivationQuantizer(bits=8, image_step=1 / 255))


def wide(channels: int, kind: type[nn.Module]) -> nn.Module:
    """A layer whose weights are 127 or next to it, and whose bias is an odd number of steps."""
    layer = nn.Linear(channels, 3) if kind is QuantLinear else nn.Conv2d(channels, 3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(120, 128, layer.weight.shape) / 127)
        layer.weight.view(3, -1)[:, 0] = 1.0
        layer.bias.copy_(torch.tensor([0, 1001, -77]) / (255 * 127))
    prepared = kind(layer, bits=8, learned="none")
    prepared.weight_quantizer.calibrate(layer.weight, "minmax")
    return prepared


@pytest.mark.parametrize(
    ("kind", "integer", "shape"),
    [(QuantConv2d, IntegerConv2d, (2, -1, 5, 5)), (QuantLinear, IntegerLinear, (50, -1))],
    ids=["convolution", "linear"],
)
@pytest.mark.parametrize(
    ("channels", "beyond", "in_halves", "compute_type"),
    [
        (400, False, False, torch.float32),
        (4000, True, True, torch.float32),
        (9000, True, False, torch.float64),
    ],
)
def test_sums_beyond_2_to_the_24_are_exact(
    kind, integer, shape, channels, beyond, in_halves, compute_type
):
    """Where float32 skips whole numbers; 127 * 255 * 518 is the first such sum."""
    source = image_grid()
    layer = integer(wide(channels, kind), "wide", source)
    assert layer.in_halves == in_halves
    assert layer.compute_type == compute_type
    ints = torch.randint(240, 256, [channels if n < 0 else n for n in shape])
    found = layer(Quantized(ints.float(), source.scale, source.zero_point)).ints
    axis = 1 if kind is QuantConv2d else -1
    sums = np.tensordot(
        ints.numpy().astype(np.int64),
        layer.weight.numpy().reshape(3, -1).astype(np.int64),
        axes=([axis], [1]),
    )
    sums += layer.bias.numpy()
    assert layer.bias.tolist() == [0, 1001, -77]
    if kind is QuantConv2d:
        sums = np.moveaxis(sums, -1, 1)
    assert (sums.max() > 2**24) == beyond
    np.testing.assert_array_equal(found.numpy(), sums.astype(np.float32))
    # The runtime's int32 sums, as the float32 that it multiplies: nothing lost on the way there.
    in_float32 = layer.apply_weights(ints.float(), layer.weight.float(), layer.bias.float()).numpy()
    assert (in_float32 != sums.astype(np.float32)).any() == beyond


def test_dead_channels_keep_their_bias():
    """Counted in whole steps of next to nothing it would leave int32."""
    network = CASES["dead channels"].network().eval()
    x = images(network)
    frozen = freeze(quantized(network, QuantSpec(), x))
    for name, channel in (("head", 1), ("middle", 2)):
        layer = frozen.get_submodule(name)
        bias = layer.bias[channel].item() * layer.sum_scale[channel].item()
        assert bias == pytest.approx(0.7, rel=1e-5)


def test_a_bias_beyond_int32_is_refused():
    """Counted in steps of what a layer reads, which here is next to nothing."""
    network = Plain().eval()
    with torch.no_grad():
        network.head.weight.mul_(1e-8)
        network.head.bias.zero_()
        network.middle.bias.fill_(0.7)
    student = quantized(network, QuantSpec(), images(network))
    with pytest.raises(SparkirError, match=r"sums of middle can reach .*int32.*float_layers"):
        freeze(student)


def test_what_has_no_grids_yet_is_refused():
    with pytest.raises(SparkirError, match="no grids yet; calibrate it before"):
        freeze(prepare(Plain(), QuantSpec()))


def test_bytes_and_values_turn_into_each_other():
    quantizer = unit_grid(bits=4)
    quantizer.zero_point.fill_(5.0)
    quantizer._zero_level = 5
    grid = IntegerQuantizer(quantizer)
    value = grid(torch.arange(-7.0, 13.0))
    stored = grid.stored(value)
    assert stored.dtype == torch.uint8
    assert stored.tolist() == [0, 0, *range(16), 15, 15]
    back = grid.loaded(stored)
    assert torch.equal(back.ints, value.ints)
    assert grid(back) is back


def test_stored_bytes_count_weights_biases_and_grids():
    network = CASES["plain"].network()
    frozen = freeze(quantized(network, QuantSpec(), images(network)))
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))
    channels = 8 + 8 + 3
    per_channel = 4 + 4 + 4  # bias, weight step, step of the sums
    grids = 5 * 2 * 4
    assert stored_bytes(frozen) <= weights + channels * per_channel + grids
    assert stored_bytes(frozen) >= weights + channels * 8


def test_stored_bytes_count_what_stays_in_float():
    network = CASES["plain"].network()
    sizes = {}
    for layers in ((), ("middle",), ("*",)):
        spec = QuantSpec(float_layers=layers)
        sizes[layers] = stored_bytes(freeze(quantized(network, spec, images(network))))
    middle = network.middle.weight.numel()
    assert sizes["middle",] - sizes[()] == pytest.approx(3 * middle, abs=300)
    everything = sum(p.numel() for p in network.parameters())
    assert 4 * everything <= sizes["*",] < 4 * everything + 30


def test_calibrating_again_changes_the_frozen_network():
    """A frozen network is a snapshot, not a view."""
    network = CASES["plain"].network()
    student = quantized(network, QuantSpec(), images(network))
    frozen = freeze(student)
    x = images(network)
    with torch.no_grad():
        before = frozen(x)
        calibrate(student, [x * 0.1])
        assert torch.equal(frozen(x), before)
        assert not torch.equal(freeze(student)(x), before)


def test_sums_of_values_far_below_zero_are_counted_exactly_too():
    """With a zero point of 255 the farthest value is 255 steps away, and not 0."""
    source = unit_grid(bits=8)
    with torch.no_grad():
        source.zero_point.fill_(255.0)
    source.load_state_dict(source.state_dict())
    layer = QuantLinear(nn.Linear(1000, 1), bits=8, learned="lsq")
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.weight_quantizer.calibrate(layer.real_weight(), "minmax")
    frozen = IntegerLinear(layer, "far", IntegerQuantizer(source))
    assert frozen.in_halves or frozen.compute_type == torch.float64
