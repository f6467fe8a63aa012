"""The mobile path: the program is really executed by XNNPACK, and compared grid by grid."""

import copy
import json
import math
import sys
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import NETWORKS, images
from torch import Tensor, nn

from sparkir.deploy import executorch as executorch_module
from sparkir.deploy.card import read_card
from sparkir.deploy.executorch import (
    ExecuTorchSession,
    MobileProgram,
    require_executorch,
    to_executorch,
    write_program,
)
from sparkir.deploy.mobile_parity import (
    MobileParity,
    check_mobile_parity,
    require_mobile_parity,
)
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.quant.arithmetic import Quantized, Sum, quantize
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import carry_facts, placement_of, prepare
from sparkir.quant.quantizer import activation_quantizers
from sparkir.quant.reference import IntegerLayer, freeze
from sparkir.quant.spec import QuantSpec
from sparkir.quant.targets import TargetName

with executorch_module._quiet():  # importing it warns of its own deprecations
    pytest.importorskip("executorch.exir", reason='needs ExecuTorch: pip install "sparkir[mobile]"')

LARGEST_PX = (40, 32)
OPEN = ("dncnn",)
"""Networks exported with their sizes left open; the rest take images of LARGEST_PX alone, because
exporting them takes half the time."""
CASES = [
    ("dncnn", 8, 8),
    pytest.param("edsr", 4, 4, marks=pytest.mark.slow),
    ("mixed", 4, 8),
]


class Mixed(nn.Module):
    """The operations that the small networks lack."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="mixed", scale=1, channels=3, value_range=1.0, taps=("head",), halo_px=9
        )
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.tail = nn.Conv2d(12, 3, 3, padding=1)
        nn.init.constant_(self.tail.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.head(x)
        branch = F.leaky_relu(self.narrow(wide), 0.1)
        gated = F.max_pool2d(wide * torch.sigmoid(self.gate(F.relu(wide + wide * 1.5))), 3, 1, 1)
        return self.tail(torch.cat([branch, gated], dim=1))


@cache
def frozen_network(
    name: str, weight_bits: int, activation_bits: int, target: TargetName = "onnxruntime"
):
    torch.manual_seed(0)
    network = (Mixed() if name == "mixed" else NETWORKS[name]()).eval()
    spec = QuantSpec(weight_bits=weight_bits, activation_bits=activation_bits, target=target)
    student = prepare(network, spec)
    calibrate(student, [images(network.facts, 2, 32, 24)])
    return freeze(student)


@cache
def exported(name: str, weight_bits: int, activation_bits: int) -> MobileProgram:
    frozen = frozen_network(name, weight_bits, activation_bits)
    return to_executorch(frozen, largest_px=LARGEST_PX, fixed_size=name not in OPEN)


def parity_of(frozen, program: MobileProgram) -> MobileParity:
    torch.manual_seed(1)
    sizes = [(40, 32), (21, 27) if frozen.facts.name in OPEN else (40, 32)]
    return check_mobile_parity(program, frozen, [images(frozen.facts, 1, *size) for size in sizes])


@pytest.mark.parametrize(("name", "weight_bits", "activation_bits"), CASES)
def test_layers_are_exact(name, weight_bits, activation_bits):
    frozen = frozen_network(name, weight_bits, activation_bits)
    parity = parity_of(frozen, exported(name, weight_bits, activation_bits))
    assert parity.failures == []
    require_mobile_parity(parity)
    layers = [grid for grid in parity.grids if grid.is_layer]
    assert len(layers) == len(placement_of(frozen).layers)
    assert all(grid.differing == 0 for grid in layers)
    assert f"{sum(g.differing == 0 for g in parity.grids)} of {len(parity.grids)} grids" in (
        parity.summary()
    )


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("dncnn", (8, 8)),
        ("edsr", (4, 4)),
        ("srcnn", (4, 8)),
        pytest.param("rfdn", (8, 8), marks=pytest.mark.slow),
    ],
)
def test_every_quantized_layer_runs_on_int8(name, bits):
    placement = placement_of(frozen_network(name, *bits))
    delegation = exported(name, *bits).delegation
    assert {n for n, where in delegation.layers.items() if where == "int8"} == set(placement.layers)
    assert delegation.float_layers == (("upscale",) if name == "srcnn" else ())
    assert f"{len(placement.layers)} of {len(delegation.layers)} layers" in delegation.summary()


@pytest.mark.slow
def test_what_runs_on_int8_and_what_does_not():
    found = exported("rfdn", 8, 8).delegation
    assert {"XNNConv2d", "XNNAdd", "XNNMultiply", "XNNConcatenate4", "XNNMaxPooling2d"} <= set(
        found.int8
    )
    assert {"XNNLeakyReLU", "XNNSigmoid"} <= set(found.float)
    assert found.float["XNNLeakyReLU"] == 8
    assert exported("srcnn", 4, 8).delegation.portable["aten.index.Tensor"] == 2  # its padding


def test_a_fixed_size_is_one_piece_and_refuses_others():
    program = exported("edsr", 4, 4)
    assert len(program.delegation.pieces) == 1
    assert not program.delegation.portable
    session = ExecuTorchSession(program.content)
    with pytest.raises(SparkirError, match=r"exactly 40 x 32 px, but got 40 x 31"):
        session.run(np.zeros((1, 3, 40, 31), np.float32))


def test_an_open_size_takes_batches_of_any_smaller_one():
    frozen, session = (
        frozen_network("dncnn", 8, 8),
        ExecuTorchSession(exported("dncnn", 8, 8).content),
    )
    for shape in ((1, 5, 32), (3, 40, 7)):
        x = images(frozen.facts, *shape)
        torch.testing.assert_close(torch.from_numpy(session.run(x.numpy())[0]), frozen(x))
    with pytest.raises(SparkirError, match=r"at most 40 x 32 px, but got 41 x 32"):
        session.run(np.zeros((1, 1, 41, 32), np.float32))


class FloatLayer(nn.Module):
    """A layer that lost its quantization: real weights, real input."""

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.apply_weights = layer.apply_weights
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        self.register_buffer("weight", layer.weight.float() * layer.weight_scale.view(shape))
        self.register_buffer("bias", layer.bias * layer.sum_scale)

    def forward(self, x: Quantized | Tensor) -> Tensor:
        real = x if isinstance(x, Tensor) else x.dequantize()
        return self.apply_weights(real, self.weight, self.bias)


def test_a_layer_without_quantization_is_noticed():
    frozen = copy.deepcopy(frozen_network("dncnn", 8, 8))
    carry_facts(frozen_network("dncnn", 8, 8), frozen)
    frozen.set_submodule("model.2", FloatLayer(frozen.get_submodule("model.2")))
    delegation = to_executorch(frozen, largest_px=LARGEST_PX, fixed_size=True).delegation
    assert delegation.float_layers == ("model.2",)
    assert "3 of 4 layers" in delegation.summary()


@torch.no_grad()
def with_powers_of_two(name: str):
    """Activation steps rounded to powers of two, zero points as they are."""
    network = NETWORKS[name]().eval()
    student = prepare(network, QuantSpec())
    calibrate(student, [images(network.facts, 2, 32, 24)])
    frozen = freeze(student)
    powers = {
        name: torch.exp2(q.scale().log2().round())
        for name, q in activation_quantizers(student).items()
        if q.image_step is None
    }
    for grid_name, scale in powers.items():
        frozen.get_submodule(grid_name).scale.copy_(scale)
    for node in frozen.graph.nodes:
        layer = frozen.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, IntegerLayer):
            source = frozen.get_submodule(str(node.args[0].target))
            layer.sum_scale.copy_(source.scale * layer.weight_scale)
    return frozen


@pytest.mark.slow
def test_powers_of_two_make_additions_differ_and_are_refused():
    """Half-way cases are common then; XNNPACK rounds them up, the integer network to even."""
    torch.manual_seed(0)
    frozen = with_powers_of_two("edsr")
    program = to_executorch(frozen, largest_px=LARGEST_PX, fixed_size=True)
    parity = parity_of(frozen, program)
    assert all(grid.differing == 0 for grid in parity.grids if grid.is_layer)
    differing = [grid for grid in parity.grids if grid.differing]
    assert differing
    assert all(grid.name.startswith("quantizers_add") for grid in differing)
    assert any(grid.differing > 0.05 * grid.total for grid in differing)
    assert all(grid.largest == 1 for grid in differing)
    with pytest.raises(
        SparkirError, match=f"does not match the integer network: {differing[0].name}"
    ):
        require_mobile_parity(parity)


def fixed_point_addition(a, b, scales, zeros) -> np.ndarray:
    """XNNPACK's qs8 addition: two 20-bit multipliers, one shift, half-way cases up."""
    ratio_a, ratio_b = (np.float32(scale) / np.float32(scales[2]) for scale in scales[:2])
    shift = 20 - (math.frexp(max(ratio_a, ratio_b))[1] - 1)
    times_a, times_b = (int(np.rint(np.ldexp(ratio, shift))) for ratio in (ratio_a, ratio_b))
    sums = (1 << (shift - 1)) + times_a * (a - zeros[0]) + times_b * (b - zeros[1])
    return np.clip((sums >> shift) + zeros[2], 0, 255)


class OneAddition(nn.Module):
    def __init__(self, scales, zeros) -> None:
        super().__init__()
        self.grids = [
            (scale, zero - 128, -128, 127, torch.int8)
            for scale, zero in zip(scales, zeros, strict=True)
        ]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        operations = torch.ops.quantized_decomposed
        a, b = (
            operations.dequantize_per_tensor(operations.quantize_per_tensor(x, *grid), *grid)
            for x, grid in zip((a, b), self.grids[:2], strict=True)
        )
        return operations.quantize_per_tensor(a + b, *self.grids[2])


@pytest.mark.parametrize(
    ("scales", "differs"),
    [
        ((0.0337, 0.0111, 0.0193), False),
        ((2**-6, 2**-7, 2**-5), True),  # a quarter of all sums lies half-way
        ((2**-6, 2**-5, 2**-6), False),  # a step no wider than its inputs': nothing to round
        ((2**-6, 2**-7, 2**-5 * 129 / 128), False),  # an odd fraction: never half-way
    ],
)
def test_how_xnnpack_adds(scales, differs):
    """All 65,536 pairs of bytes: what explains where additions differ, and where they cannot."""
    scales = [float(np.float32(scale)) for scale in scales]
    zeros = (120, 37, 101)
    a, b = (x.reshape(1, 1, 256, 256) for x in np.meshgrid(np.arange(256), np.arange(256)))
    ints = [torch.from_numpy(x).float() - zero for x, zero in zip((a, b), zeros, strict=False)]
    with executorch_module._quiet():
        real = tuple(x * scale for x, scale in zip(ints, scales, strict=False))
        program = executorch_module._lower(
            torch.export.export(OneAddition(scales, zeros), real), {}
        )
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(program.to_executorch().buffer).load_method("forward")
        (stored,) = method.execute(real)
    found = stored.int().numpy() + 128
    np.testing.assert_array_equal(found, fixed_point_addition(a, b, scales, zeros))
    pairs = (Quantized(x, torch.tensor(s), torch.tensor(float(z)))
             for x, s, z in zip(ints, scales, zeros, strict=False))  # fmt: skip
    expected = quantize(
        Sum(*pairs),
        scale=torch.tensor(scales[2]),
        zero=torch.tensor(float(zeros[2])),
        zero_level=zeros[2],
        levels=256,
        exact=True,
    )
    differing = (expected.ints.numpy() + zeros[2] != found).sum()
    assert (differing > 1000) if differs else (differing == 0)


def test_the_program_says_what_it_is(tmp_path):
    frozen, program = frozen_network("edsr", 4, 4), exported("edsr", 4, 4)
    path = tmp_path / "new" / "model.pte"
    write_program(program, path)
    assert [p.name for p in path.parent.iterdir()] == ["model.pte"]
    session = ExecuTorchSession(path)
    card = read_card(session.metadata, "it")
    assert (card.facts, card.quantization) == (frozen.facts, "W4A4")
    assert json.loads(session.metadata["sizes"])["largest_px"] == list(LARGEST_PX)
    assert session.runtime == "executorch"


def test_exporting_is_silent_and_keeps_the_network(capfd):
    frozen = frozen_network("dncnn", 8, 8)
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    program = to_executorch(frozen, {"note": "second"}, largest_px=(24, 16), fixed_size=True)
    assert capfd.readouterr().out == ""
    assert ExecuTorchSession(program.content).metadata["note"] == "second"
    after = dict(frozen.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(SparkirError, match=r"rfdn cannot take images of 8 x 40 px.*at least 15"):
        to_executorch(frozen_network("rfdn", 8, 8), largest_px=(8, 40))


def test_a_network_placed_for_a_runtime_that_fuses_is_refused():
    placed = frozen_network("edsr", 8, 8, "openvino")
    with pytest.raises(SparkirError, match=r"placed for OpenVINO.*quant\.target"):
        to_executorch(placed, largest_px=LARGEST_PX)


def test_what_is_no_program_is_refused(tmp_path):
    cut = tmp_path / "cut.pte"
    cut.write_bytes(exported("dncnn", 8, 8).content[:2000])
    for program, name in ((b"no program", "the exported"), (cut, "cut"), (tmp_path / "x", "x")):
        with pytest.raises(SparkirError, match=rf"cannot open .*{name}"):
            ExecuTorchSession(program)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    for use in (require_executorch, lambda: ExecuTorchSession(b"")):
        with pytest.raises(SparkirError, match=r'executorch.*pip install "sparkir\[mobile\]"'):
            use()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nafnet", "swinir"])
def test_what_is_computed_from_integers_is_so_here(name):
    """Normalisations and attention, which XNNPACK leaves to the portable kernels."""
    frozen = frozen_network(name, 8, 8)
    session = ExecuTorchSession(to_executorch(frozen, largest_px=(32, 32), fixed_size=True).content)
    x = images(frozen.facts, 1, 32, 32)
    with torch.no_grad():
        expected = frozen(x)
    levels = (torch.from_numpy(session.run(x.numpy())[0]) - expected) * 255
    assert int(levels.round().count_nonzero()) <= 1e-3 * levels.numel()
