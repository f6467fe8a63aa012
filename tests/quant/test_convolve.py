"""Convolutions in products of 8 bits: the sums and gradients that floating point gives."""

import pytest
import torch
from torch import Tensor
from toys import CASES, images, quantized

from sparkir.quant import convolve
from sparkir.quant.convolve import Geometry, byte_products, convolve_integers, has_byte_products
from sparkir.quant.fused import fused_rounding
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec

PRODUCTS = pytest.mark.skipif(
    not has_byte_products(), reason="a processor without products of 8 bits"
)
GEOMETRIES = {
    "plain": Geometry((1, 1), (1, 1), (1, 1), 1),
    "no border": Geometry((1, 1), (0, 0), (1, 1), 1),
    "strides": Geometry((2, 1), (1, 1), (1, 1), 1),
    "border": Geometry((1, 1), (2, 0), (1, 1), 1),
    "dilated": Geometry((1, 1), (2, 2), (2, 2), 1),
    "groups": Geometry((1, 1), (1, 1), (1, 1), 4),
    "each channel alone": Geometry((1, 1), (1, 1), (1, 1), 8),
}


@pytest.fixture
def always(monkeypatch):
    """However small."""
    monkeypatch.setattr(convolve, "_WORTH_IT", {torch.float32: 0, torch.bfloat16: 0})


def made(geometry: Geometry, *, zero: int = 37, kind: torch.dtype = torch.float32, outputs=16):
    """Whole numbers of every size in channels_last, their zero, weights and a bias."""
    draw = torch.Generator().manual_seed(0)
    ints = torch.randint(256, (2, 8, 9, 7), generator=draw) - zero
    weight = torch.randint(-128, 128, (outputs, 8 // geometry.groups, 3, 3), generator=draw)
    bias = torch.randint(-1000, 1000, (outputs,), generator=draw)
    last = [x.to(kind).to(memory_format=torch.channels_last) for x in (ints, weight)]
    return last[0], torch.tensor(float(zero)), last[1], bias.to(kind)


@PRODUCTS
@pytest.mark.parametrize("zero", [0, 1, 37, 128, 255])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_sums_are_exact(always, geometry, zero):
    ints, offset, weight, bias = made(geometry, zero=zero)
    expected = geometry.convolve(ints.double(), weight.double(), bias.double())
    for biases, shift in ((bias, 0), (None, bias.view(-1, 1, 1))):
        sums = convolve_integers(ints, offset, weight, biases, geometry)
        assert sums.dtype == torch.float32
        assert torch.equal(sums.double() + shift, expected)
    plain = ints.contiguous(), weight.contiguous()
    assert torch.equal(convolve_integers(plain[0], offset, plain[1], bias, geometry), expected)


@PRODUCTS
@pytest.mark.parametrize("outputs", [3, 16])
def test_bfloat16_rounds_each_sum_once(always, outputs):
    geometry = GEOMETRIES["plain"]
    ints, zero, weight, bias = made(geometry, kind=torch.bfloat16, outputs=outputs)
    exact = geometry.convolve(ints.double(), weight.double(), bias.double())
    sums = convolve_integers(ints, zero, weight, bias, geometry)
    assert torch.equal(sums, exact.bfloat16())


@PRODUCTS
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gradients_are_those_of_floating_point(always, geometry, kind):
    def gradients(multiply) -> tuple[Tensor, ...]:
        ints, zero, weight, bias = made(geometry, kind=kind)
        taken = [x.requires_grad_() for x in (ints, weight, bias)]
        sums = multiply(ints, zero, weight, bias)
        toward = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1)).to(kind)
        return torch.autograd.grad(sums, taken, toward.to(memory_format=torch.channels_last))

    here = gradients(lambda x, zero, w, b: convolve_integers(x, zero, w, b, geometry))
    there = gradients(lambda x, zero, w, b: geometry.convolve(x, w, b))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@PRODUCTS
def test_constant_weights_and_no_bias_get_no_gradient(always):
    geometry = GEOMETRIES["plain"]
    ints, zero, weight, _ = made(geometry)
    convolve_integers(ints.requires_grad_(), zero, weight, None, geometry).sum().backward()
    assert ints.grad is not None
    assert weight.grad is None


@PRODUCTS
@pytest.mark.parametrize("which", ["ints", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_lost_in_a_byte(always, which, value):
    geometry = GEOMETRIES["plain"]
    ints, zero, weight, bias = made(geometry)
    spoiled = {"ints": ints, "weight": weight, "bias": bias}[which]
    spoiled[(0,) * spoiled.dim()] = value
    sums = convolve_integers(ints, zero, weight, bias, geometry)
    assert not sums.isfinite().all()
    if which != "bias":
        assert convolve_integers(ints, zero, weight, None, geometry).isnan().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own code
@PRODUCTS
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_bytes_made_in_one_pass_are_the_same(always, kind):
    geometry = GEOMETRIES["plain"]
    operands = made(geometry, kind=kind)
    expected = convolve_integers(*operands, geometry)
    with fused_rounding(on=True):
        assert torch.equal(convolve_integers(*operands, geometry), expected)


@PRODUCTS
def test_who_trains_in_another_layout_keeps_it(always, monkeypatch):
    def never(*operands):
        raise AssertionError

    monkeypatch.setattr(convolve, "_sums", never)
    geometry = GEOMETRIES["plain"]
    ints, zero, weight, bias = made(geometry)
    plain = ints.contiguous().requires_grad_()
    sums = convolve_integers(plain, zero, weight.contiguous(), bias, geometry)
    assert sums.is_contiguous()
    with pytest.raises(AssertionError):
        convolve_integers(ints.requires_grad_(), zero, weight, bias, geometry)


@PRODUCTS
@pytest.mark.parametrize("case", CASES)
def test_whole_networks_are_the_same(always, case):
    """In training, in evaluation and frozen; every sum here is below 2**24."""
    network = CASES[case].network()
    x = images(network).to(memory_format=torch.channels_last)
    student = quantized(network, QuantSpec(weight_bits=8, activation_bits=8), x)
    student.to(memory_format=torch.channels_last)
    frozen = freeze(student)
    found = []
    for on in (True, False):
        with byte_products(on):
            student.train().zero_grad()
            trained = student(x)
            trained.square().mean().backward()
            gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
            found.append([trained, student.eval()(x), frozen(x), *gradients])
    assert len(found[0]) > 3
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "aarch64", "avx512_vnni": True}, False),
        ({"architecture": "x86_64", "avx512_vnni": True, "saturates": True}, False),
        ({"architecture": "x86_64", "avx512_vnni": True, "changed": True}, False),
        ({"architecture": "x86_64", "avx512_vnni": True}, True),
        ({"architecture": "x86_64", "avx_vnni": True}, True),
        ({"architecture": "x86_64", "amx_int8": True}, True),
    ],
)
def test_they_are_taken_where_they_are_and_are_right(monkeypatch, there, expected):
    def sums(ints, zero, weight, bias, geometry):
        if "changed" in there:
            raise TypeError
        added = geometry.convolve(ints, weight, bias)
        return added.clamp_min(-(2.0**15)) if "saturates" in there else added

    monkeypatch.setattr(convolve, "get_capabilities", lambda: there)
    monkeypatch.setattr(convolve, "_sums", sums)
    has_byte_products.cache_clear()
    try:
        assert has_byte_products() is expected
    finally:
        has_byte_products.cache_clear()


@PRODUCTS
def test_they_are_found_by_a_training_in_bfloat16():
    has_byte_products.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert has_byte_products()
