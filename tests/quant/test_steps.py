"""Steps with which no order of operations makes a difference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import CASES, Toy, images, in_turn, unit_grid

from sparkir.quant.arithmetic import exact_rounding, to_multiple, to_odd_fraction, to_power_of_two
from sparkir.quant.calibrate import calibrate
from sparkir.quant.layers import FRACTION_BITS, IMAGE_PARTS, QuantConv2d, QuantLayer, Table
from sparkir.quant.prepare import prepare
from sparkir.quant.quantizer import ActivationQuantizer
from sparkir.quant.reference import IntegerLayer, IntegerQuantizer, freeze
from sparkir.quant.spec import QuantSpec

ANY_ORDER = ["portable", "openvino"]


def test_powers_of_two_are_exact_and_near():
    scale = torch.logspace(-9, 9, 4001, base=2, requires_grad=True)
    power = to_power_of_two(scale)
    assert torch.equal(power.frexp().mantissa, torch.full_like(power, 0.5))
    assert ((power / scale).log2().abs() <= 0.5 + 1e-6).all()
    power.sum().backward()
    torch.testing.assert_close(scale.grad, (power / scale).detach())


def test_multiples_are_exact_odd_and_never_nothing():
    scale, unit = torch.tensor([1e-9, 0.1, 0.30000001, 7.0]), torch.tensor(2.0**-10)
    odd, any_ = to_multiple(scale, unit, odd=True), to_multiple(scale, unit, odd=False)
    assert torch.equal((odd / unit) % 2, torch.ones(4))
    assert torch.equal((any_ / unit).round(), any_ / unit)
    assert odd[0] == any_[0] == unit
    assert ((odd - scale)[1:].abs() <= unit).all()
    assert ((any_ - scale)[1:].abs() <= unit / 2).all()


def test_sums_of_odd_parts_are_ties_only_where_they_are_large():
    """An even number of parts would make ties of small sums too: of 2**9 parts, every 32nd."""
    parts = 2**FRACTION_BITS
    for odd in (1, 3, 513, 4001, 32767):
        sums = torch.arange(-(2**14) + 1, 2**14)
        assert (sums * odd % parts != parts // 2).all()


@pytest.mark.parametrize("exponents", [(-1, -8), (-8, -1)])
@pytest.mark.parametrize("image", [False, True])
def test_sums_that_reach_several_grids_count_odd_parts_of_the_finest(exponents, image):
    layer = QuantConv2d(nn.Conv2d(1, 1, 1), bits=8, learned="lsq")
    grids = [unit_grid(bits=8) for _ in exponents]
    for grid, exponent in zip(grids, exponents, strict=True):
        nn.init.constant_(grid.log_scale, exponent * math.log(2))
        grid.power_of_two = True
    if image:
        grids.append(unit_grid(bits=8, image_step=1.0))
    layer.flows_to = tuple(grids)
    nn.init.constant_(layer.weight_quantizer.log_scale, math.log(0.3))
    parts = layer.weight_scale(torch.tensor(1.0)).detach().double() * 2 ** (8 + FRACTION_BITS)
    assert torch.equal(parts % 2, torch.ones_like(parts))


def test_odd_fractions_keep_every_sum_away_from_ties():
    """Against whole-number arithmetic: the distance of sums * 2**k / odd to the nearest tie."""
    for ratio in torch.logspace(-13, 2, 200, base=2):
        fraction = float(to_odd_fraction(ratio).double())
        power = next(p for p in (2**k for k in range(12)) if p / fraction >= 127.5)
        odd = round(power / fraction)
        assert odd % 2 == 1
        assert power == 1 or odd < 260
        assert float(torch.tensor(power / odd, dtype=torch.float64).float()) == fraction
        assert abs(fraction / float(ratio) - 1) < 0.009
        nearest = min(abs(2 * s * power % (2 * odd) - odd) for s in range(-500, 500))
        assert nearest >= 1  # in halves of 1 / odd


def test_sums_that_reach_the_image_keep_away_from_ties():
    """Added and divided in float32 in three ways, against whole numbers."""
    step = torch.tensor(1 / 255)
    part = step / IMAGE_PARTS
    draw = torch.Generator().manual_seed(0)
    for first, second in ((1, 1), (7, 113), (1023, 2)):  # parts to a sum's step
        top = 255 * IMAGE_PARTS
        a = torch.randint(-top // first, top // first, (200_000,), generator=draw)
        b = torch.randint(0, top // second, (200_000,), generator=draw)
        whole = a * first + b * second
        nearest = torch.div(2 * whole + IMAGE_PARTS, 2 * IMAGE_PARTS, rounding_mode="floor")
        assert ((2 * whole - (2 * nearest - 1) * IMAGE_PARTS).abs() >= 1).all()  # odd: no ties
        x, y = a * (first * part), b * (second * part)
        for found in (
            (x + y) / step,
            (x + y) * (1 / step),
            torch.addcmul(x, b, second * part) * 255,
        ):
            kept = nearest.abs() <= 256
            assert torch.equal(found.round()[kept], nearest[kept].float())


@pytest.mark.parametrize(("case", "target"), in_turn(ANY_ORDER))
def test_training_computes_the_integer_network_bit_for_bit(case, target):
    """No rounding is left that training would have to do faster and otherwise."""
    torch.manual_seed(0)
    network = CASES[case].network()
    student = prepare(network, QuantSpec(weight_bits=4, activation_bits=4, target=target))
    calibrate(student, [images(network)])
    frozen = freeze(student.eval())
    image = images(network, 1, 20, 28)
    with torch.no_grad():
        expected = frozen(image)
        assert torch.equal(student(image), expected)
        with exact_rounding(False):
            assert torch.equal(student(image), expected)
        assert torch.equal(student.train()(image), expected)


@pytest.mark.parametrize("target", ANY_ORDER)
def test_every_step_is_restricted_as_its_reader_needs(target):
    torch.manual_seed(0)
    network = CASES["residual"].network()
    student = prepare(network, QuantSpec(target=target))
    calibrate(student, [torch.rand(2, 3, 24, 24)])
    for module in student.modules():
        if isinstance(module, QuantLayer):
            assert bool(module.writes) != bool(module.flows_to)
        if isinstance(module, ActivationQuantizer) and module.power_of_two:
            assert float(module.scale().detach().frexp().mantissa) == 0.5
    loose = [m for m in student.modules() if isinstance(m, QuantLayer) and m.flows_to]
    assert bool(loose) == (target == "openvino")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_a_layer_reads_whose_sums_flow_on_has_a_power_of_two_for_its_step(case):
    """Its sums are then whole parts of the next grid's step; the image's grid is 1/255 anyway."""
    network = case.network()
    student = prepare(network, QuantSpec(target="openvino"))
    calibrate(student, [images(network)])
    modules = dict(student.named_modules())
    for node in student.graph.nodes:
        layer = modules.get(str(node.target))
        if isinstance(layer, QuantLayer) and layer.flows_to:
            source = node.all_input_nodes[0]
            while not isinstance(modules.get(str(source.target)), ActivationQuantizer):
                source = source.all_input_nodes[0]
            is_image = source.all_input_nodes[0].op == "placeholder"
            assert is_image or modules[str(source.target)].power_of_two


def test_without_such_a_target_steps_are_free():
    student = prepare(CASES["residual"].network(), QuantSpec())
    for module in student.modules():
        if isinstance(module, QuantLayer):
            assert module.writes is None
            assert not module.flows_to
        if isinstance(module, ActivationQuantizer):
            assert not module.power_of_two


class Saturating(Toy):
    """A function that reaches its end on most of an image."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.head.weight, 10.0)

    def body(self, x):
        return torch.sigmoid(x)


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_no_entry_of_a_table_is_half_way_between_two_levels(target):
    """Not even an end of 1 on a grid of which 8.5 steps are 1, unless steps are powers of two."""
    student = prepare(Saturating(), QuantSpec(target=target))
    calibrate(student, [torch.rand(2, 3, 24, 24)])
    written = student.get_submodule("quantizers.sigmoid")
    before = -math.log(8.5)
    with torch.no_grad():
        written.log_scale.fill_(before)
        written.zero_point.fill_(0.0)
    frozen = freeze(student)
    assert written.log_scale.item() == pytest.approx(before)  # the student keeps its own
    changed = {
        name: float(module.scale / student.get_submodule(name).scale().detach()) - 1
        for name, module in frozen.named_modules()
        if isinstance(module, IntegerQuantizer)
    }
    moved = changed.pop("quantizers.sigmoid")
    assert set(changed.values()) == {0.0}
    if target == "onnxruntime":
        assert 1e-4 < moved < 1e-3
    else:
        assert moved == 0


def test_what_is_added_into_the_image_counts_odd_parts_of_its_step():
    torch.manual_seed(0)
    student = prepare(CASES["plainusr"].network(), QuantSpec(target="openvino"))
    calibrate(student, [images(CASES["plainusr"].network())])
    for name in ("tail", "tail_image"):
        layer = freeze(student).get_submodule(name)
        parts = layer.sum_scale.double() * 255 * IMAGE_PARTS
        assert (parts - parts.round()).abs().max() < 1e-3
        assert parts.min() > 0.5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_reduced_range_holds_every_weight_to_7_bits(case):
    """Of learned layers and of constants; and no grid is stored as int8, but for int8 alone."""
    network = case.network()
    spec = QuantSpec(target="openvino", reduce_range=True)
    student = prepare(network, spec)
    calibrate(student, [images(network)])
    frozen = freeze(student)
    layers = [m for m in frozen.modules() if isinstance(m, IntegerLayer)]
    assert layers
    for layer in layers:
        assert int(layer.weight.min()) >= -64
        assert int(layer.weight.max()) <= 63
    assert not any(m.signed for m in frozen.modules() if isinstance(m, IntegerQuantizer))
    assert spec.label == "W7A8"


def test_a_slope_is_a_table_where_sums_flow_on():
    """A product of sums and a slope has more bits than float32: each runtime rounds it its way."""

    class Leaky(Toy):
        def body(self, x):
            return F.leaky_relu(self.middle(x) + x, 0.05)

    student = prepare(Leaky(), QuantSpec(target="openvino"))
    calls = [n for n in student.graph.nodes if n.op == "call_module"]
    (table,) = [n for n in calls if isinstance(student.get_submodule(n.target), Table)]
    made_by = student.get_submodule(table.all_input_nodes[0].target)
    assert isinstance(made_by, ActivationQuantizer)
    assert made_by.bits == 8


@pytest.mark.parametrize("shifts", [False, True])
def test_a_zero_point_added_first_rounds_away_the_last_bits(shifts):
    """19.5 - 2**-18 rounds to 19; with a zero point of 128 added first, float32 holds 147.5."""
    grid = unit_grid(bits=8, symmetric=True)
    grid.power_of_two, grid.shift_reals = True, shifts
    grid.observer = None
    with torch.no_grad():
        grid.zero_point.fill_(128.0)
    grid.load_state_dict(grid.state_dict())
    near = torch.tensor([19.5 - 2.0**-18])
    assert float(grid.eval()(near).ints.detach()) == (20 if shifts else 19)


@pytest.mark.parametrize(("target", "shifts"), [("portable", False), ("openvino", True)])
def test_only_a_target_that_fuses_adds_it_first(target, shifts):
    student = prepare(CASES["residual"].network(), QuantSpec(target=target))
    grids = [m for m in student.modules() if isinstance(m, ActivationQuantizer)]
    assert any(grid.shift_reals for grid in grids) == shifts
