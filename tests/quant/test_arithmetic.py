"""Integers in float32: against fake quantization, and against ONNX Runtime's own kernels."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from slow_reference import FAKE_QUANTIZE, rounded

from sparkir.quant import arithmetic
from sparkir.quant.arithmetic import (
    Accumulated,
    Average,
    Product,
    Quantized,
    Sum,
    exact_rounding,
    quantize,
    round_to_grid,
    rounds_exactly,
)


def grid(scale: float, zero: int) -> dict:
    return {"scale": torch.tensor(scale), "zero": torch.tensor(float(zero)), "zero_level": zero}


def on_grid(shape: tuple[int, ...], scale: float, zero: int, levels: int = 256) -> Quantized:
    stored = torch.randint(0, levels, shape).float()
    return Quantized(stored - zero, torch.tensor(scale), torch.tensor(float(zero)))


# -- rounding ------------------------------------------------------------------------------------


def test_half_rounds_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    expected = torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0])
    for divide in (False, True):
        found = round_to_grid(x, torch.tensor(1.0), low=-9, high=9, divide=divide)
        assert torch.equal(found, expected)


def test_real_values_are_divided_by_the_step_as_float32():
    x = torch.randn(10_000) * 3
    found = quantize(x, **grid(0.013, 100), levels=256, exact=True)
    expected = np.rint(x.numpy() / np.float32(0.013)).clip(-100, 155)
    np.testing.assert_array_equal(found.ints.numpy(), expected)


def test_sums_of_a_convolution_take_one_float32_multiplier():
    """clamp(rint(float32(sum) * float32(s_x * s_w / s_y))): QLinearConv's arithmetic."""
    sums = torch.randint(-(2**24), 2**24, (2, 5, 30, 30)).float()
    step = torch.rand(5, 1, 1) * 1e-7
    found = quantize(Accumulated(sums, step), **grid(0.013, 100), levels=256, exact=True)
    multiplier = step.numpy() / np.float32(0.013)
    assert multiplier.dtype == np.float32
    expected = np.rint(sums.numpy() * multiplier).clip(-100, 155)
    np.testing.assert_array_equal(found.ints.numpy(), expected)


@pytest.mark.parametrize("scale", [0.013, 0.1, 0.3, 0.7, 0.0041])
def test_the_multiplier_is_a_quotient(scale):
    """Not a product with the inverse of the step, which is no exact half here."""
    sums = torch.arange(-200.0, 200.0)
    half = torch.tensor(scale) * 0.5
    found = quantize(Accumulated(sums, half), **grid(scale, 128), levels=256, exact=True)
    assert torch.equal(found.ints, (sums * 0.5).round())


def test_what_is_on_the_grid_already_stays_untouched():
    value = on_grid((3, 3), 0.1, 7)
    found = quantize(
        value, scale=value.scale, zero=value.zero, zero_level=7, levels=256, exact=True
    )
    assert found is value


def test_an_equal_grid_keeps_every_value():
    value = on_grid((64, 64), 0.1, 7)
    found = quantize(value, **grid(0.1, 7), levels=256, exact=True)
    assert torch.equal(found.ints, value.ints)


def test_zero_padding_is_zero():
    """Zero is whole number 0 on every grid, so a convolution may pad with it."""
    for zero in (0, 13, 255):
        found = quantize(torch.zeros(4), **grid(0.37, zero), levels=256, exact=True)
        assert torch.equal(found.ints, torch.zeros(4))
        assert torch.equal(found.dequantize(), torch.zeros(4))


def large_values():
    """One of each kind, of more rows than a piece has, and of shapes that broadcast."""
    a, b = on_grid((2, 3, 40, 7), 0.02, 100), on_grid((2, 3, 40, 7), 0.03, 20)
    step = torch.tensor([0.01, 0.02, 0.03]).view(3, 1, 1)
    yield torch.randn(2, 3, 40, 7)
    yield a
    yield Accumulated(torch.randint(-999, 999, (2, 3, 40, 7)).float(), step)
    yield Accumulated(torch.randint(-999, 999, (2, 40, 3)).float(), step.flatten())
    for kind in (Sum, Product):
        yield kind(a, b)
        yield kind(on_grid((2, 3, 1, 1), 0.02, 100), b)
        yield kind(a, on_grid((1, 1, 40, 7), 0.03, 20))
    yield Average(*a, pixels=280)


@pytest.mark.parametrize("piece", [1, 100, 239])
def test_pieces_of_a_large_value_are_the_whole(monkeypatch, piece):
    torch.manual_seed(0)
    for value in large_values():
        for levels, shift_reals in ((256, False), (16, True)):
            options = {**grid(0.017, 7), "levels": levels, "shift_reals": shift_reals}
            whole = quantize(value, exact=True, **options)
            pieces = Mock(wraps=arithmetic._with)
            with monkeypatch.context() as patch:
                patch.setattr(arithmetic, "_PIECE", piece)
                patch.setattr(arithmetic, "_with", pieces)
                assert torch.equal(quantize(value, exact=True, **options).ints, whole.ints)
            assert (pieces.call_count > 1) != isinstance(value, Average)


def test_gradients_pass_pieces(monkeypatch):
    """Whoever restores with a student in evaluation may ask for them."""
    torch.manual_seed(0)
    found = []
    for piece in (2**17, 100):
        monkeypatch.setattr(arithmetic, "_PIECE", piece)
        x = torch.linspace(-3, 3, 2 * 3 * 40 * 7).view(2, 3, 40, 7).requires_grad_()
        options = grid(0.017, 7) | {"levels": 256}
        options["scale"] = options["scale"].clone().requires_grad_()
        quantize(x, exact=True, **options).ints.square().sum().backward()
        found.append((x.grad, options["scale"].grad))
    torch.testing.assert_close(found[1], found[0])


def test_exact_rounding_can_be_left_and_comes_back():
    assert rounds_exactly()
    with exact_rounding(False):
        assert not rounds_exactly()
    assert rounds_exactly()


# -- ONNX Runtime's own additions and multiplications --------------------------------------------


def cpu_flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else ""


# Kernels add with fused multiply-adds where the processor has them; elsewhere near-ties differ.
LARGEST_SHARE = 0.0 if " fma " in cpu_flags() else 1e-5

OPERATIONS = {"QLinearAdd": Sum, "QLinearMul": Product}


@pytest.fixture(scope="module", params=OPERATIONS)
def kernel(request):
    """(Sum or Product, a session of the runtime's kernel with every grid an input)."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = [name + part for name in "aby" for part in ("", "_scale", "_zero")][:6]
    inputs += ["y_scale", "y_zero"]
    types = {"": onnx.TensorProto.UINT8, "_scale": onnx.TensorProto.FLOAT}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(request.param, inputs, ["y"], domain="com.microsoft")],
        "kernel",
        [
            onnx.helper.make_tensor_value_info(
                name,
                types.get(name[1:], onnx.TensorProto.UINT8),
                ["n"] if len(name) == 1 else [],
            )
            for name in inputs
        ],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, ["n"])],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return OPERATIONS[request.param], session


def draw_scales(rng: np.random.Generator, make: type, *, ties: bool) -> np.ndarray:
    """(scale of a, of b, of y), float32. With `ties`, many results lie halfway between levels."""
    if not ties:
        return rng.uniform(0.002, 0.1, 3).astype(np.float32) * np.float32([1, 1, 5])
    unit = rng.uniform(0.002, 0.01)
    a, b = (rng.integers(1, 8, 2) * unit).astype(np.float32)
    y = 2 * rng.integers(1, 8) * unit if make is Sum else a * b * rng.choice([50, 100, 200, 254])
    return np.array([a, b, y], np.float32)


def every_pair_of_bytes(session, scales: np.ndarray, zeros: np.ndarray):
    """The runtime's bytes for all 65536 pairs, the two operands, and the grid of the result."""
    stored = [m.ravel().astype(np.uint8) for m in np.mgrid[:256, :256]]
    feeds = dict(zip("ab", stored, strict=True))
    for name, scale, zero in zip("aby", scales, zeros, strict=True):
        feeds |= {f"{name}_scale": np.asarray(scale), f"{name}_zero": np.asarray(np.uint8(zero))}
    (expected,) = session.run(None, feeds)
    operands = [
        Quantized(
            torch.from_numpy(one).float() - zero, torch.tensor(scale), torch.tensor(float(zero))
        )
        for one, scale, zero in zip(stored, scales, (int(z) for z in zeros), strict=False)
    ]
    return torch.from_numpy(expected).float(), operands, grid(float(scales[2]), int(zeros[2]))


def compare_with_runtime(kernel, seed: int, *, ties: bool) -> tuple[float, torch.Tensor]:
    """(share of values that differ from the runtime's, training's distance from exact)."""
    make, session = kernel
    rng = np.random.default_rng(seed)
    scales = draw_scales(rng, make, ties=ties)
    zeros = rng.choice([0, 3, 77, 128, 200, 255], 3)
    zeros[2] = rng.integers(60, 190)
    expected, operands, y_grid = every_pair_of_bytes(session, scales, zeros)
    assert expected.unique().numel() > 5
    exact, in_training = (
        quantize(make(*operands), **y_grid, levels=256, exact=exact).ints for exact in (True, False)
    )
    differing = exact + y_grid["zero"] != expected
    return float(differing.float().mean()), (in_training - exact).abs()


@pytest.mark.parametrize("seed", range(8))
def test_additions_and_products_are_the_runtimes_for_every_pair_of_bytes(kernel, seed):
    differing, levels_in_training = compare_with_runtime(kernel, seed, ties=False)
    assert differing <= LARGEST_SHARE
    assert levels_in_training.max() <= 1
    assert (levels_in_training > 0).float().mean() <= 1e-4


@pytest.mark.skipif(LARGEST_SHARE > 0, reason="the processor has no fused multiply-adds")
def test_results_halfway_between_levels_fall_as_the_runtimes(kernel):
    """Where every rounding on the way decides: any other order of operations fails here."""
    found = [compare_with_runtime(kernel, seed, ties=True) for seed in range(16)]
    assert max(differing for differing, _ in found) <= LARGEST_SHARE
    assert max(float(levels.max()) for _, levels in found) == 1
    assert sum(int(levels.sum()) for _, levels in found) > 100  # training, for comparison


@pytest.mark.parametrize("make", [Sum, Product])
def test_fewer_levels_are_the_runtimes_result_clipped(make):
    """A narrower grid is a QuantizeLinear to bytes and a Clip behind it."""
    a, b = on_grid((64, 64), 0.05, 100), on_grid((64, 64), 0.02, 30)
    wide, narrow = (
        quantize(make(a, b), **grid(0.4, 5), levels=levels, exact=True) for levels in (256, 16)
    )
    assert wide.ints.max() > 10
    assert torch.equal(narrow.ints, wide.ints.clamp(-5, 10))


# -- gradients: the whole chain against fake quantization ----------------------------------------


def steps(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, requires_grad=True) for value in values]


def compare_gradients(found_output, found_leaves, expected_output, expected_leaves):
    torch.testing.assert_close(found_output.double(), expected_output, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(expected_output)
    found = torch.autograd.grad(found_output, found_leaves, weight.float())
    expected = torch.autograd.grad(expected_output, expected_leaves, weight)
    for name, one, other in zip("abcdefg", found, expected, strict=False):
        scale = max(float(other.abs().max()), 0.1)
        torch.testing.assert_close(
            one.double(), other, rtol=1e-3, atol=2e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def as_float64(leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("learned", FAKE_QUANTIZE)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_through_a_convolution_are_fake_quantizations(learned, bits):
    """Tensor -> grid -> convolution with integer weights and bias -> grid, clipping everywhere."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    zero = top // 3
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    weight = (torch.randn(4, 3, 3, 3) * 0.2).requires_grad_()
    bias = torch.randn(4, requires_grad=True)
    x_step, y_step = steps(2.5 / top, 3.0 / top)
    w_step = (torch.rand(4) * 0.2 / half + 0.2 / half).requires_grad_()
    leaves = [x, weight, bias, x_step, w_step, y_step]

    clip_only = learned == "pams"
    on_x = quantize(
        x,
        scale=x_step,
        zero=torch.tensor(float(zero)),
        zero_level=zero,
        levels=top + 1,
        exact=False,
        clip_only=clip_only,
    )
    per_channel = w_step.view(-1, 1, 1, 1)
    ints = round_to_grid(
        weight,
        per_channel.detach() if clip_only else per_channel,
        low=-half,
        high=half - 1,
        divide=True,
        own=per_channel if clip_only else None,
    )
    sum_step = x_step * w_step
    sums = F.conv2d(on_x.ints, ints, rounded(bias / sum_step))
    on_y = quantize(
        Accumulated(sums, sum_step.view(-1, 1, 1)),
        scale=y_step,
        zero=torch.tensor(float(zero)),
        zero_level=zero,
        levels=top + 1,
        exact=False,
        clip_only=clip_only,
    )

    fake = FAKE_QUANTIZE[learned]
    exact = as_float64(leaves)
    x, weight, bias, x_step, w_step, y_step = exact
    sum_step = x_step * w_step
    y = F.conv2d(
        fake(x, x_step, -zero, top - zero),
        fake(weight, w_step.view(-1, 1, 1, 1), -half, half - 1),
        rounded(bias / sum_step) * sum_step,
    )
    compare_gradients(on_y.dequantize(), leaves, fake(y, y_step, -zero, top - zero), exact)


@pytest.mark.parametrize("learned", FAKE_QUANTIZE)
@pytest.mark.parametrize(
    ("make", "operation"), [(Sum, torch.add), (Product, torch.mul)], ids=["sum", "product"]
)
def test_gradients_through_additions_and_products_are_fake_quantizations(learned, make, operation):
    """With a (B, C, 1, 1) operand, as in channel attention."""
    a, b = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)
    leaves = [a, b, *steps(0.15, 0.11, 0.2)]

    def on_grid_of(value, step):
        return quantize(
            value,
            scale=step,
            zero=torch.tensor(7.0),
            zero_level=7,
            levels=16,
            exact=False,
            clip_only=learned == "pams",
        )

    a, b, a_step, b_step, y_step = leaves
    found = on_grid_of(make(on_grid_of(a, a_step), on_grid_of(b, b_step)), y_step)
    fake = FAKE_QUANTIZE[learned]
    exact = as_float64(leaves)
    a, b, a_step, b_step, y_step = exact
    y = operation(fake(a, a_step, -7, 8), fake(b, b_step, -7, 8))
    compare_gradients(found.dequantize(), leaves, fake(y, y_step, -7, 8), exact)


@pytest.mark.parametrize("learned", FAKE_QUANTIZE)
def test_gradients_through_a_second_rounding_are_fake_quantizations(learned):
    """A tensor carried at 8 bits, rounded again to 4 for a convolution."""
    leaves = [torch.randn(500, requires_grad=True), *steps(0.015, 0.3)]

    def on_grid_of(value, step, zero, levels):
        return quantize(
            value,
            scale=step,
            zero=torch.tensor(float(zero)),
            zero_level=zero,
            levels=levels,
            exact=False,
            clip_only=learned == "pams",
        )

    x, first, second = leaves
    found = on_grid_of(on_grid_of(x, first, 128, 256), second, 4, 16)
    fake = FAKE_QUANTIZE[learned]
    exact = as_float64(leaves)
    x, first, second = exact
    y = fake(fake(x, first, -128, 127), second, -4, 11)
    compare_gradients(found.dequantize(), leaves, y, exact)


def test_a_mean_over_a_large_image_counts_every_whole_number():
    """Where float32 would skip some."""
    ints = torch.randint(128, 256, (1, 1, 1000, 1000)).float()
    average = Average(ints, torch.tensor(1.0), torch.tensor(0.0), pixels=10**6)
    assert torch.equal(average.sums(), ints.double().sum((2, 3), keepdim=True).float())
