"""What `prepare` makes of a network: the same function in float, with every grid in its place."""

import copy
import dataclasses
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import (
    CASES,
    LARGE,
    WIDTH,
    Plain,
    Toy,
    Written,
    convolution,
    images,
    in_turn,
    observing,
    psnr_db,
    quantized,
)

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import available, build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.equalize import equalize
from sparkir.quant.interpolate import ExactBilinear
from sparkir.quant.layers import PassThrough, Table
from sparkir.quant.prepare import example_px, placement_of, prepare
from sparkir.quant.quantizer import ActivationQuantizer, activation_quantizers, leave_in_float
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec

W4A4 = QuantSpec(weight_bits=4, activation_bits=4)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_every_registered_network_is_among_the_cases():
    assert {name.removesuffix("-baseline") for name in available()} <= CASES.keys() | LARGE.keys()


# -- the same function ---------------------------------------------------------------------------


@contextmanager
def exactly_interpolated() -> Iterator[None]:
    """The original interpolates as a prepared network does: with weights of 7 bits."""
    original = F.interpolate

    def interpolate(x, size=None, *args, mode="nearest", align_corners=None, **words):
        if mode != "bilinear" or size is None:
            return original(x, size, *args, mode=mode, align_corners=align_corners, **words)
        return ExactBilinear(align_corners=bool(align_corners))(x, *size)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "interpolate", interpolate)
        yield


def test_in_calibration_the_network_is_the_original(case):
    """Bit for bit, unless it is said in other words."""
    network = case.network()
    before = copy.deepcopy(network.state_dict())
    student = prepare(network, W4A4)
    x = images(network)
    with torch.no_grad(), observing(student), exactly_interpolated():
        torch.testing.assert_close(student(x), network(x), rtol=0, atol=1e-6 * case.rewritten)
    assert student.facts == network.facts
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_taps_give_what_the_submodule_gave(case):
    network = case.network().eval()
    student = prepare(network, W4A4)
    x = images(network)
    expected, seen = {}, {}
    for name in network.facts.taps:
        # Copied, because a later operation may change the tensor in place.
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: expected.update({name: output.clone()})
        )
        student.get_submodule(f"taps.{name.replace('.', '_')}").register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.clone()})
        )
    with torch.no_grad(), observing(student), exactly_interpolated():
        student(x), network(x)
    assert len(seen) == len(network.facts.taps) > 0
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6 * case.rewritten)


def test_the_mode_of_the_network_is_kept():
    assert prepare(Plain().train(), W4A4).training
    assert not prepare(Plain().eval(), W4A4).training


# -- what is quantized ---------------------------------------------------------------------------


def test_placement_lists_every_layer_with_its_bits(case):
    network = case.network()
    layers = {
        name: (8, 8) if name in case.edges else (3, 5)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
        and name not in case.not_layers
    }
    layers |= {name: (8, 8) if constant else (3, 5) for name, constant in case.more_layers.items()}
    spec = QuantSpec(weight_bits=3, activation_bits=5)
    student = prepare(network, spec)
    assert placement_of(student).layers == layers
    assert placement_of(student).spec == spec
    for name, (weight_bits, _) in layers.items():
        assert student.get_submodule(name).weight_quantizer.bits == weight_bits


def test_what_stays_in_float_is_named_with_its_reason(case):
    left = placement_of(prepare(case.network(), W4A4)).left_in_float
    assert left.keys() == case.left_in_float.keys()
    for name, word in case.left_in_float.items():
        assert word in left[name]


def test_layers_read_the_bits_that_the_placement_says(case):
    """Found from the graph itself: the grid right before every layer."""
    student = prepare(case.network(), QuantSpec(weight_bits=3, activation_bits=5))
    reads = {
        str(node.target): student.get_submodule(str(node.args[0].target)).bits
        for node in student.graph.nodes
        if str(node.target) in placement_of(student).layers
    }
    assert reads == {name: bits for name, (_, bits) in placement_of(student).layers.items()}


def test_edge_layers_take_the_bits_of_the_spec():
    spec = QuantSpec(weight_bits=4, activation_bits=4, first_last_bits=6)
    layers = placement_of(prepare(Plain(), spec)).layers
    assert layers == {"head": (6, 6), "middle": (4, 4), "tail": (6, 6)}


def grid_bits(network: nn.Module, spec: QuantSpec = W4A4) -> dict[str, int]:
    return {
        name.removeprefix("quantizers."): quantizer.bits
        for name, quantizer in activation_quantizers(prepare(network, spec)).items()
    }


def test_a_tensor_read_only_by_layers_takes_their_bits():
    assert grid_bits(CASES["plain"].network()) == {"x": 8, "relu": 4, "relu_1": 8, "tail": 8}


def test_a_tensor_that_is_added_too_is_carried_at_8_bits_and_rounded_again():
    assert grid_bits(CASES["residual"].network()) == {
        "x": 8,
        "head": 8,  # carried: it is added
        "taps_head_4bit": 4,  # for the middle convolution
        "middle": 8,
        "relu": 8,  # for the last convolution; the addition has no grid of its own
        "tail": 8,
    }


def test_the_image_is_read_in_first_last_bits_and_added_as_it_is():
    spec = QuantSpec(weight_bits=4, activation_bits=4, first_last_bits=4)
    assert grid_bits(CASES["edges in four"].network(), spec) == {
        "x": 8,
        "x_4bit": 4,
        "relu": 4,
        "tail": 8,
        "add": 8,
    }


def grids_of(student: nn.Module, readers: type[nn.Module] | str) -> list[str]:
    """The grids that the calls of a module, by name, read."""
    (node,) = [n for n in student.graph.nodes if n.target == readers]
    return [str(source.target) for source in node.args if isinstance(source, torch.fx.Node)]


def test_parts_of_a_concatenation_share_one_grid():
    student = prepare(CASES["concatenation"].network(), W4A4)
    assert grids_of(student, "operations.cat") == ["quantizers.cat"] * 4
    calls = Counter(str(n.target) for n in student.graph.nodes)
    assert calls["quantizers.cat"] == 5  # the parts and the whole


def test_concatenations_that_share_a_part_share_one_grid():
    student = prepare(CASES["dense"].network(), W4A4)
    calls = [str(n.target) for n in student.graph.nodes if str(n.target).startswith("operations")]
    cats = [name for name in calls if name.startswith("operations.cat")]
    assert len(cats) == 3
    shared = {name: set(grids_of(student, name)) for name in cats}
    assert shared["operations.cat"] == shared["operations.cat_1"] == {"quantizers.cat_1"}
    # The last one is read at 8 bits, by the last layer.
    assert shared["operations.cat_2"] == {"quantizers.cat_2"}


def test_a_relu_before_a_concatenation_comes_before_its_grid_where_kernels_fuse():
    network = CASES["relu into concatenation"].network()
    for target, operation in (("onnxruntime", PassThrough), ("openvino", Table)):
        student = prepare(network, QuantSpec(target=target))
        (relu,) = [n for n in student.graph.nodes if n.target == "operations.relu"]
        assert isinstance(student.get_submodule("operations.relu"), operation)
        (grid,) = [str(user.target) for user in relu.users]
        assert grid == "quantizers.cat"


def test_a_grid_shared_with_negative_values_absorbs_no_relu():
    network = CASES["relu into concatenation"].network().eval()
    x = images(network)
    student = quantized(network, QuantSpec(), x)
    assert not student.quantizers.cat.non_negative
    assert student.quantizers.cat.zero_level > 0
    with torch.no_grad():
        assert psnr_db(student(x), network(x).clamp(0, 1), 1.0) > 50


def test_a_relu_is_absorbed_by_the_grid_behind_it():
    network = CASES["residual"].network()
    student = quantized(network, W4A4, images(network))
    assert student.quantizers.relu.non_negative
    assert student.quantizers.relu.zero_level == 0
    assert not student.quantizers.head.non_negative


def test_a_relu_beside_another_reader_is_not_absorbed():
    network = CASES["relu beside another"].network()
    assert grid_bits(network) == {"x": 8, "head": 4, "middle": 8, "sigmoid": 8, "add": 8, "tail": 8}
    assert not prepare(network, W4A4).quantizers.middle.non_negative


def test_a_tap_between_a_layer_and_its_relu_changes_no_grid():
    tapped, plain = CASES["plain"].network(), CASES["plain"].network()
    plain.facts = dataclasses.replace(plain.facts, taps=())
    assert tapped.facts.taps == ("head",)
    assert grid_bits(tapped) == grid_bits(plain)
    assert prepare(tapped, W4A4).quantizers.relu.non_negative


def test_a_shuffle_and_a_pooling_keep_the_grid():
    student = prepare(CASES["shuffles"].network(), W4A4)
    grid = "quantizers.relu"
    for operation in ("operations.max_pool2d", "operations.pixel_unshuffle"):
        assert grids_of(student, operation) == [grid]
    assert grids_of(student, "inner") == [grid]


def test_symmetric_grids_keep_zero_in_the_middle():
    network = CASES["residual"].network()
    spec = QuantSpec(weight_bits=4, activation_bits=4, activation_grid="symmetric")
    zeros = {
        name: quantizer.zero_level
        for name, quantizer in activation_quantizers(
            quantized(network, spec, images(network))
        ).items()
    }
    assert zeros == {
        "quantizers.x": 0,
        "quantizers.head": 128,
        "quantizers.taps_head_4bit": 8,
        "quantizers.middle": 128,
        "quantizers.relu": 0,
        "quantizers.tail": 0,
    }


def test_the_image_grids_are_fixed_at_256_levels(case):
    student = prepare(case.network(), QuantSpec(weight_bits=2, activation_bits=2))
    grids = [grid for grid in activation_quantizers(student).values() if grid.image_step]
    assert len(grids) >= 2  # what comes in and what goes out
    assert {(grid.bits, grid.log_scale.requires_grad) for grid in grids} == {(8, False)}
    assert {grid.image_step for grid in grids} == {student.facts.value_range / 255}


def test_dead_branches_are_left_out():
    student = prepare(CASES["unused branch"].network(), W4A4)
    assert grid_bits(CASES["unused branch"].network()).keys() == {"x", "relu", "tail"}
    assert "middle" not in dict(student.named_modules())


# -- how close -----------------------------------------------------------------------------------


def test_8_bits_are_close_to_float(case):
    """Rounding the output image alone leaves 58.9 dB."""
    network = case.network().eval()
    x = images(network)
    with torch.no_grad():
        restored = quantized(network, QuantSpec(), x)(x)
        expected = network(x).clamp(0, network.facts.value_range)
    assert psnr_db(restored, expected, network.facts.value_range) > 45
    levels = restored / network.facts.value_range * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert levels.min() >= 0
    assert levels.max() <= 255


@pytest.mark.parametrize("name", ["plain", "residual", "concatenation", "dncnn", "edsr"])
def test_more_bits_are_closer_to_float(name):
    network = CASES[name].network().eval()
    x = images(network)
    with torch.no_grad():
        expected = network(x).clamp(0, network.facts.value_range)
        found = [
            psnr_db(quantized(network, spec, x)(x), expected, network.facts.value_range)
            for spec in (QuantSpec(weight_bits=n, activation_bits=n) for n in (2, 4, 6, 8))
        ]
    assert found == sorted(found)
    assert found[3] > found[0] + 8


@pytest.mark.parametrize(("case", "bits"), in_turn(("4", "8")))
def test_training_and_evaluation_compute_almost_the_same(case, bits):
    """Training rounds additions in float32, which moves a value by one level here and there."""
    network = CASES[case].network().eval()
    x = images(network)
    student = quantized(network, W4A4 if bits == "4" else QuantSpec(), x)
    with torch.no_grad():
        levels = (student.train()(x) - student.eval()(x)) / network.facts.value_range * 255
    assert (levels.abs() > 0.5).float().mean() < 0.01


# -- refusals ------------------------------------------------------------------------------------


def facts(**changed) -> ModelFacts:
    given = {
        "name": "toy",
        "scale": 1,
        "channels": 3,
        "value_range": 1.0,
        "taps": (),
        "halo_px": 2,
    }
    return ModelFacts(**{**given, **changed})


class DataDependent(Toy):
    def body(self, x):
        return x if x.mean() > 0 else -x


class TwoOutputs(Toy):
    def forward(self, x):
        features = self.head(x)
        return self.tail(features), features


class NamedOutputs(Toy):
    def forward(self, x):
        return {"restored": self.tail(self.head(x))}


class PiecesAsOutput(Toy):
    def forward(self, x):
        return self.head(x).chunk(2, dim=1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (DataDependent, r"DataDependent\.forward cannot be traced .*control flow"),
        (TwoOutputs, "several values; it must return one image"),
        (NamedOutputs, "several values; it must return one image"),
        (PiecesAsOutput, "several values; it must return one image"),
    ],
)
def test_a_network_that_cannot_be_quantized_is_refused(network, message):
    with pytest.raises(SparkirError, match=message):
        prepare(network(), W4A4)


class OfOneSize(Toy):
    """As with tables of positions."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, WIDTH, 16, 16))

    def body(self, x):
        return x + self.positions


class OfFourChannels(Plain):
    def __init__(self):
        super().__init__()
        self.head = convolution(4, WIDTH)


class OfOneExample(Toy):
    """Takes the first size that it is shown, and no other."""

    def body(self, x):
        return x.reshape(1, -1, 48, 48)


@pytest.mark.parametrize("network", [OfOneSize, OfFourChannels, OfOneExample])
def test_a_network_that_does_not_take_what_its_facts_promise_is_refused(network):
    with pytest.raises(SparkirError, match=r"px and 3 channels, as its facts promise .*any size"):
        prepare(network(), W4A4)


def test_a_network_without_facts_is_refused():
    network = Plain()
    del network.facts
    with pytest.raises(SparkirError, match="carries no facts"):
        prepare(network, W4A4)


class SizeMultiple(nn.Module):
    """Takes images of 32 px and its multiples, from 160 px on."""

    facts = facts(size_multiple=32, min_size_px=130)

    def __init__(self):
        super().__init__()
        self.deep = convolution(3 * 32**2, 4)
        self.enlarge = convolution(4, 3 * 32**2)

    def forward(self, x):
        coarse = self.deep(F.pixel_unshuffle(x, 32))
        F.avg_pool2d(coarse, 5)  # fails below 160 px, if it runs at all
        return F.pixel_shuffle(self.enlarge(F.max_pool2d(coarse, 5, 1, 2)), 32)


def test_the_network_is_run_at_a_size_that_it_can_take():
    layers = placement_of(prepare(SizeMultiple(), W4A4)).layers
    assert layers == {"deep": (8, 8), "enlarge": (8, 8)}


class EnlargesToASize(Toy):
    """A transposed convolution that is told how large its result has to be, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)

    def body(self, x):
        return self.up(self.down(x), output_size=x.shape[-2:]) + x


def test_a_transposed_convolution_to_a_size_stays_in_float():
    torch.manual_seed(0)
    network = EnlargesToASize()
    student = prepare(network, QuantSpec())
    placement = placement_of(student)
    assert placement.layers.keys() == {"head", "down", "tail"}
    assert "up" in placement.left_in_float
    leave_in_float(student, on=True)
    x = torch.rand(1, 3, 21, 18)
    torch.testing.assert_close(student(x), network(x))


class PoolsByName(Toy):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def body(self, x):
        return self.pool(input=x) + x


def test_a_module_may_be_called_by_the_names_of_its_arguments():
    student = prepare(PoolsByName(), QuantSpec())
    assert placement_of(student).left_in_float == {}


def test_quantizers_are_found_by_name():
    student = prepare(Plain(), W4A4)
    found = activation_quantizers(student)
    assert found.keys() == {f"quantizers.{name}" for name in ("x", "relu", "relu_1", "tail")}
    assert all(isinstance(quantizer, ActivationQuantizer) for quantizer in found.values())


@pytest.mark.parametrize(
    ("multiple", "smallest", "expected"), [(1, 1, 48), (32, 1, 64), (1, 130, 130), (32, 130, 160)]
)
def test_example_images_suit_the_facts(multiple, smallest, expected):
    suited = facts(size_multiple=multiple, min_size_px=smallest)
    assert example_px(suited, at_least=48) == expected


class WritesThroughAnotherName(Plain):
    def body(self, x):
        y = x
        x += self.middle(x)
        return self.relu(y)


def test_writing_through_another_name_is_refused():
    with pytest.raises(SparkirError, match="in place that it also uses under another name"):
        prepare(WritesThroughAnotherName(), QuantSpec())


# -- layers left in float -------------------------------------------------------------------------

BLOCKS_ONLY = {"float_layers": ("head.*", "body.2", "tail.*")}


def test_the_recipes_float_layers_stay_and_the_others_keep_their_bits():
    network = build("edsr", width=8, blocks=2, scale=4)
    placement = placement_of(
        prepare(network, QuantSpec(weight_bits=4, activation_bits=4, **BLOCKS_ONLY))
    )
    blocks = [f"body.{block}.body.{layer}" for block in (0, 1) for layer in (0, 2)]
    assert placement.layers == dict.fromkeys(blocks, (4, 4))  # no first or last among them
    chosen = {name for name, why in placement.left_in_float.items() if "float_layers" in why}
    assert chosen == {"head.0", "body.2", "tail.0.0", "tail.0.2", "tail.1"}


def test_float_layers_that_there_are_not():
    network = build("edsr", width=8, blocks=2, scale=4)
    with pytest.raises(SparkirError, match=r"no layer is called 'body.3'; did you mean 'body.2'\?"):
        prepare(network, QuantSpec(float_layers=("head.*", "body.3")))
    with pytest.raises(
        SparkirError, match=r"no layer is called 'x\*'; layers: head.0, body.0.body.0"
    ):
        prepare(network, QuantSpec(float_layers=("x*",)))


class ChannelsLast(nn.LayerNorm):
    """As ConvNeXt has it."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WithArguments(Toy):
    def forward(self, x, mask=None, depth=2, strength=0.5, *more):
        x = self.head(x)
        for _ in range(depth):
            x = self.middle(x)
        if mask is not None:
            x = x * mask
        return self.tail(x * strength)


class DropsInTraining(Toy):
    def body(self, x):
        return F.dropout(self.middle(x), 0.1, self.training)


BROUGHT = {
    "a normalisation of its own": Written(lambda net, x: net.norm(x), norm=ChannelsLast(8)),
    "without weights": Written(
        lambda net, x: net.norm(x), norm=ChannelsLast(8, elementwise_affine=False)
    ),
    "in place, a function": Written(lambda net, x: F.leaky_relu_(x, 0.1) + net.middle(x)),
    "in place, another": Written(lambda net, x: F.elu_(net.middle(x))),
    "by the argument's name": Written(lambda net, x: torch.sigmoid(input=net.middle(x))),
    "more arguments": WithArguments(),
    "dropout": DropsInTraining(),
    "one tensor twice": Written(
        lambda net, x: net.wide(torch.cat([x, x], 1)), wide=convolution(16, 8)
    ),
    "an average over one pixel": Written(
        lambda net, x: x * torch.sigmoid(F.adaptive_avg_pool2d(net.middle(x), [1, 1]))
    ),
    "an average in NumPy's words": Written(
        lambda net, x: x * torch.sigmoid(net.middle(x).mean(axis=(2, 3), keepdims=True))
    ),
    "a factor, and read twice": Written(lambda net, x: (y := net.middle(x)) * 0.1 + y),
    "a factor, called twice": Written(lambda net, x: net.middle(F.relu(net.middle(x))) * 0.1),
    "a factor, reflecting": Written(
        lambda net, x: net.wide(x) * 0.1, wide=convolution(8, 8, padding_mode="reflect")
    ),
    "a factor in a buffer": Written(lambda net, x: net.middle(x) * net.factor),
    "a constant kernel with a bias": Written(
        lambda net, x: F.conv2d(x, net.kernel, net.middle.bias, padding=1, groups=8)
    ),
}
BROUGHT["a factor in a buffer"].register_buffer("factor", torch.rand(8, 1, 1))
BROUGHT["a constant kernel with a bias"].register_buffer("kernel", torch.full((8, 1, 3, 3), 1 / 9))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("equalizes", [False, True], ids=["", "equalized"])
@pytest.mark.parametrize("case", BROUGHT)
def test_what_users_bring_is_computed_as_it_was_written(case, equalizes, target):
    network = copy.deepcopy(BROUGHT[case]).train()
    x = images(network)
    student = prepare(network, QuantSpec(target=target))
    assert student.training
    if equalizes:
        equalize(student, [x])
    calibrate(student, [x])
    student.eval()
    with torch.no_grad():
        expected, found = network.eval()(x).clamp(0, 1), student(x)
    assert (found - expected).square().mean().log10() < -4  # 40 dB; wrong is 30
    frozen = freeze(student)
    assert torch.equal(frozen(x), found)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), found)


def test_a_learned_kernel_of_a_function_is_no_constant():
    """Even where its first values lie on a grid."""
    network = Written(lambda net, x: F.conv2d(x, net.kernel, padding=1, groups=8))
    network.kernel = nn.Parameter(torch.full((8, 1, 3, 3), 1 / 9))
    student = prepare(network, QuantSpec())
    assert student.kernel.requires_grad
    (reason,) = student.placement.left_in_float.values()
    assert "make it an nn.Conv2d" in reason


def test_a_subclass_says_itself_why_it_stays_in_float():
    own = type("Own", (nn.Conv2d,), {"stays_in_float": "it is delicate", "__module__": __name__})
    network = Written(lambda net, x: net.own(x), own=own(8, 8, 3, padding=1))
    assert prepare(network, QuantSpec()).placement.left_in_float == {"own": "it is delicate"}


@pytest.mark.parametrize("name", ["to_image", "quantizers", "operations", "taps", "rewritten"])
def test_names_that_prepared_networks_need(name):
    """Or a layer would be replaced without a word."""
    network = Written(lambda net, x: getattr(net, name)(x), **{name: convolution(8, 8)})
    with pytest.raises(SparkirError, match=rf"Written\.{name} has a name .* rename it"):
        prepare(network, QuantSpec())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normalise",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_weights_that_are_made_anew_for_every_call(normalise):
    network = Written(lambda net, x: net.wide(x), wide=normalise(convolution(8, 8)))
    with pytest.raises(SparkirError, match=r"the weight of wide is made anew.*first"):
        prepare(network, QuantSpec())
