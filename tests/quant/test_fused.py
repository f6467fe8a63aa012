"""Rounding in compiled passes against plain operations, and fake quantization in float64."""

import copy

import pytest
import torch
from slow_reference import FAKE_QUANTIZE
from torch import nn
from toys import CASES, images, in_turn, quantized

from sparkir import assemble
from sparkir.errors import SparkirError
from sparkir.quant import fused
from sparkir.quant.fused import (
    Grid,
    fused_rounding,
    has_compiler,
    require_compiler,
    round_grid,
    round_product,
    round_reals,
    round_sum,
    round_sums,
    round_weights,
    rounds_fused,
)
from sparkir.quant.spec import QuantSpec
from sparkir.recipe import from_values, load

LOW, HIGH = -7.0, 8.0


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-30, 30, shape).float()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


class TestAgainstFakeQuantization:
    """Values and every gradient, of both ways to learn a step."""

    @pytest.fixture(params=FAKE_QUANTIZE)
    def learned(self, request):
        return request.param

    def check(self, learned, values, steps, rounded, real):
        """`rounded(values, steps, grid)` is a grid's integers of `real(values, steps)`."""
        own = torch.tensor(0.7123, requires_grad=True)
        grid = Grid(own, LOW, HIGH, learned == "pams")
        ints = rounded(values, steps, grid)
        weight = torch.randn_like(ints)
        (ints * own.detach() * weight).sum().backward()  # as its readers do
        slow_values = [v.detach().double().requires_grad_() for v in values]
        slow_steps = [s.double() for s in steps]
        slow_own = torch.tensor(own.item(), dtype=torch.float64, requires_grad=True)
        x = real(slow_values, slow_steps)
        slow = FAKE_QUANTIZE[learned](x, slow_own, int(LOW), int(HIGH))
        (slow * weight).sum().backward()
        close(ints * own, slow)
        assert torch.equal(ints, ints.round())
        for fast, expected in zip([*values, own], [*slow_values, slow_own], strict=True):
            close(fast.grad, expected.grad)

    def test_reals(self, uncompiled, learned):
        values = [(torch.randn(2, 3, 6, 5) * 5).requires_grad_()]
        self.check(
            learned, values, [], lambda v, s, grid: round_reals(v[0], 0.0, grid), lambda v, s: v[0]
        )

    def test_another_grid(self, uncompiled, learned):
        values = [whole(2, 3, 6, 5).requires_grad_()]
        steps = [torch.tensor(0.31)]
        self.check(
            learned,
            values,
            steps,
            lambda v, s, grid: round_grid(v[0], s[0], grid),
            lambda v, s: v[0] * s[0],
        )

    def test_sums_of_a_layer(self, uncompiled, learned):
        values = [whole(2, 3, 6, 5).requires_grad_()]
        steps = [torch.tensor([0.2, 0.31, 0.17]).view(3, 1, 1)]
        self.check(
            learned,
            values,
            steps,
            lambda v, s, grid: round_sums(v[0], s[0], grid),
            lambda v, s: v[0] * s[0],
        )

    @pytest.mark.parametrize("shape", [(2, 3, 6, 5), (2, 3, 1, 1), (1, 1, 6, 5)], ids=str)
    def test_a_sum_and_a_product(self, uncompiled, learned, shape):
        for rounded, real in (
            (
                lambda v, s, grid: round_sum(*v, *s, grid),
                lambda v, s: v[0] * s[0] + v[1] * s[1],
            ),
            (
                lambda v, s, grid: round_product(*v, *s, grid),
                lambda v, s: v[0] * s[0] * v[1] * s[1],
            ),
        ):
            values = [whole(2, 3, 6, 5).requires_grad_(), whole(*shape).requires_grad_()]
            steps = [
                torch.tensor(0.113),
                torch.tensor(0.31, requires_grad=True),
            ]
            self.check(learned, values, steps, rounded, real)

    @pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3, 3)], ids=str)
    def test_weights(self, uncompiled, learned, shape):
        weight = torch.randn(shape).requires_grad_()
        step = torch.tensor([0.2, 0.31, 0.17], requires_grad=True)
        ints = round_weights(weight, step, low=-4.0, high=3.0, clip_only=learned == "pams")
        gradient = torch.randn(shape)
        per_channel = step.detach().view(-1, *[1] * (len(shape) - 1))
        (ints * per_channel * gradient).sum().backward()
        slow_weight = weight.detach().double().requires_grad_()
        slow_step = per_channel.double().requires_grad_()
        slow = FAKE_QUANTIZE[learned](slow_weight, slow_step, -4, 3)
        (slow * gradient).sum().backward()
        close(ints * per_channel, slow)
        close(weight.grad, slow_weight.grad)
        close(step.grad, slow_step.grad.flatten())


TARGETS = ("onnxruntime", "openvino")


@pytest.mark.parametrize(("case", "target", "learned"), in_turn(TARGETS, ("lsq", "pams", "none")))
def test_whole_networks_train_the_same(uncompiled, case, target, learned):
    """Forward bit for bit; gradients but for the order of sums that largely cancel out.

    Without biases: plain operations also pass to a step how a bias is rounded to int32, which
    is next to nothing, but not in PAMS, where all that is not clipped should be nothing.
    """
    network = CASES[case].network()
    x = images(network)
    spec = QuantSpec(weight_bits=4, activation_bits=4, learned=learned, target=target)
    assert torch.equal(*(output for output, _ in trained_both_ways(network, spec, x)))
    for module in network.modules():
        if isinstance(getattr(module, "bias", None), torch.Tensor):
            torch.nn.init.zeros_(module.bias)
    (_, expected), (_, found) = trained_both_ways(network, spec, x)
    assert found.keys() == expected.keys()
    steps = [name for name in expected if name.endswith("log_scale")]
    # What a normalisation sums, it sums in the order of memory, which is not the same.
    tolerance = 1e-5 if any(isinstance(m, nn.LayerNorm) for m in network.modules()) else 0.0
    for name in expected.keys() - steps:
        atol = tolerance * float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=atol)
    largest = max((float(expected[name].abs().max()) for name in steps), default=0.0)
    for name in steps:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * largest)


def trained_both_ways(network, spec, x):
    """Output and gradients of a backward pass: plain, then fused."""
    original = quantized(network, spec, x).train()
    # A copy takes the steps of its grids one by one; see `together`.
    for student, fuses in ((copy.deepcopy(original), False), (original, True)):
        with fused_rounding(fuses):
            assert rounds_fused() == fuses
            output = student(x)
        assert not rounds_fused()
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        yield output, gradients


@pytest.mark.parametrize("case", CASES)
def test_a_copy_takes_its_steps_one_by_one_and_learns_the_same(uncompiled, case):
    """Of steps taken together, every gradient is the same sum, times the same factor."""
    network = CASES[case].network()
    x = images(network)
    together = quantized(network, QuantSpec(weight_bits=4, activation_bits=4), x).train()
    found = []
    for student in (together, copy.deepcopy(together)):
        with fused_rounding(True):
            output = student(x)
        assert all(grid.given is None for grid in student.modules() if hasattr(grid, "given"))
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() >= found[1].keys()
    for name, gradient in found[0].items():
        expected = found[1].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-12)


def test_an_error_in_between_leaves_no_step_behind(uncompiled):
    network = CASES["residual"].network()
    student = quantized(network, QuantSpec(), images(network)).train()
    with fused_rounding(True), pytest.raises(RuntimeError):
        student(torch.zeros(1, 2, 12, 12))
    assert all(grid.given is None for grid in student.modules() if hasattr(grid, "given"))


def test_bounds_have_one_type():
    """Whole numbers and floats are equal keys of a cache, and were kernels of their own."""
    bounds = (
        *fused._bounds(-8, 7, torch.device("cpu")),
        *fused._bounds(-8.0, 0.0, torch.device("cpu")),
    )
    assert {bound.dtype for bound in bounds} == {torch.float32}


def test_without_a_compiler_it_says_what_to_do(monkeypatch):
    def fails(kernel):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nfound in g++")

    monkeypatch.setattr(fused, "_compiled", fails)
    with pytest.raises(SparkirError, match=r"g\+\+.*no working C\+\+.*train.compile = false"):
        require_compiler(torch.device("cpu"))


@pytest.mark.parametrize(
    ("steps", "quant", "chosen", "there", "expected"),
    [
        (2000, {}, "auto", True, True),
        (2000, {}, "auto", False, False),
        (1999, {}, "auto", True, False),
        (2000, None, "auto", True, False),
        (2000, None, True, True, False),
        (1, {}, True, False, True),  # and then the compiler is missed before the first step
        (2000, {}, False, True, False),
    ],
)
def test_long_runs_are_compiled_where_they_can_be(
    monkeypatch, steps, quant, chosen, there, expected
):
    monkeypatch.setattr(assemble, "has_compiler", lambda device: there)
    values = {
        "name": "a",
        "data": {"train": "-", "test": "-", "degradation": "noise", "sigma": 25},
        "student": {"model": "dncnn"},
        "train": {"steps": steps, "compile": chosen},
    }
    recipe = from_values(values | ({} if quant is None else {"quant": quant}), "a test")
    assert assemble.rounds_compiled(recipe, torch.device("cpu")) is expected


@pytest.mark.parametrize(
    ("settings", "there", "said"),
    [
        ([], False, True),
        ([], True, False),
        (["train.steps=1999"], False, False),
        (["train.compile=false"], False, False),
    ],
)
def test_a_long_run_without_a_compiler_is_told_so(monkeypatch, settings, there, said):
    monkeypatch.setattr(assemble, "has_compiler", lambda device: there)
    events: list[dict[str, object]] = []
    assemble.gather(load("demo", ["train.steps=2000", *settings]), events.append)
    doubts = [event for event in events if "nothing here compiles" in str(event.get("message"))]
    assert len(doubts) == said


def test_a_compiler_is_looked_for_by_compiling(monkeypatch):
    def fails(kernel):
        raise RuntimeError("no working C++ compiler")

    has_compiler.cache_clear()
    monkeypatch.setattr(fused, "_compiled", fails)
    assert not has_compiler(torch.device("cpu"))
    has_compiler.cache_clear()
    monkeypatch.setattr(fused, "_compiled", lambda kernel: kernel)
    assert has_compiler(torch.device("cpu"))
    has_compiler.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own code
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_compiler_keeps_the_meaning(kind):
    """On the processor, values bit for bit; with integers in bfloat16 as well."""
    network = CASES["residual"].network()
    x = images(network)
    student = quantized(network, QuantSpec(), x).train()
    plain = copy.deepcopy(student)
    outputs = []
    for trained in (plain, student):
        half = kind == torch.bfloat16
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=half),
            fused_rounding(trained is student),
        ):
            outputs.append(trained(x))
        assert outputs[-1].dtype == torch.float32
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    tolerance = 1e-3 if kind == torch.float32 else 0.05
    expected, found = (
        {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
        for trained in (plain, student)
    )
    # What bfloat16 rounds off the terms of a step's gradient is more than is left of them in plain
    # operations, where they cancel out; fused, they are never apart.
    names = [n for n in expected if kind == torch.float32 or not n.endswith("log_scale")]
    for name in names:
        scale = float(expected[name].abs().max())
        if name.endswith("log_scale"):
            scale = max(float(g.abs().max()) for n, g in expected.items() if "log_scale" in n)
        assert float((found[name] - expected[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own code
def test_sizes_of_1_and_layouts_are_compiled_however_many(caplog):
    torch._dynamo.reset()
    fused._compiled.cache_clear()
    sizes = [(8, 4, 3, 3), (8, 4, 1, 1), (8, 1, 3, 3), (1, 4, 3, 3), (1, 4, 1, 1), (8, 1, 1, 1)]
    weights = [torch.randn(size) for size in sizes]
    weights += [weight.to(memory_format=torch.channels_last) for weight in weights]
    for weight in [*weights, torch.randn(8, 4), torch.randn(1, 4)]:
        step = torch.rand(len(weight)) + 0.5
        ints = round_weights(weight, step, low=-8.0, high=7.0, clip_only=False)
        rows = step.view(-1, *[1] * (weight.dim() - 1))
        assert torch.equal(ints, (weight / rows).round().clamp(-8, 7))
    assert "recompile_limit" not in caplog.text
