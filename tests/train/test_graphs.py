"""Recorded passes; what they compute needs a GPU, what happens without one does not."""

import copy
from functools import partial

import pytest
import torch
from small_run import small_run
from torch import nn

from sparkir.models.edsr import EDSR
from sparkir.models.facts import facts_of, restore
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.spec import QuantSpec
from sparkir.train.graphs import Recorded, _restored_with

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def student(device: str, bits: int | None = 4) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = EDSR(scale=2, width=8, blocks=2)
    if bits is not None:
        network = prepare(network, QuantSpec(weight_bits=bits, activation_bits=bits))
        calibrate(network, [torch.rand(4, 3, 12, 12)])
    return network.to(device).train()


def batch(device: str, seed: int = 0, images: int = 2) -> torch.Tensor:
    return torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)


class Follows(nn.Module):
    """A network that changes in every forward pass of training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.facts = facts_of(EDSR(scale=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(self.norm(self.body(x)), scale_factor=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is refused on a GPU")
def test_what_cannot_be_recorded_runs_as_ever():
    refused: list[str] = []
    network, lq = student("cpu"), batch("cpu")
    recorded = Recorded(network, refused=refused.append)
    for _ in range(2):
        assert torch.equal(recorded(lq), restore(network, lq))
    with torch.no_grad():
        assert torch.equal(recorded(lq), restore(network, lq))
    assert len(refused) == 1


def test_a_network_that_follows_its_batches_is_not_recorded():
    refused: list[str] = []
    network, lq = Follows().train(), batch("cpu")
    recorded = Recorded(network, refused=refused.append)
    assert torch.equal(recorded(lq), restore(copy.deepcopy(network), lq))
    assert refused == ["it follows statistics of its batches"]
    assert not recorded.replays
    assert network.norm.num_batches_tracked == 1  # not by the trial


class Replaying:
    """Stands for a recording: it must find the buffers that it was made with."""

    replays = True

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.buffers = list(network.buffers())

    def __call__(self, lq: torch.Tensor) -> torch.Tensor:
        assert all(a is b for a, b in zip(self.network.buffers(), self.buffers, strict=True))
        return restore(self.network, lq).float()


def test_a_look_ahead_is_not_recorded_with_copies_of_the_buffers(tmp_path):
    options = {"reward_every": 2}
    make = partial(small_run, source="spark-paper", bits=4, options=options, log_every=1)
    plain = make(tmp_path / "plain").train()
    run = make(tmp_path)
    run.task.record(Replaying)
    run.train()
    assert [e["loss"] for e in run.of_kind("step")] == [e["loss"] for e in plain.of_kind("step")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is refused on a GPU")
def test_a_training_says_so_and_goes_on(tmp_path):
    run = small_run(tmp_path, bits=4, recorded=True).train()
    plain = small_run(tmp_path / "plain", bits=4).train()
    warnings = run.of_kind("warning")
    assert [e["loss"] for e in run.of_kind("step")] == [e["loss"] for e in plain.of_kind("step")]
    assert len(warnings) == 2  # student and teacher
    assert "cannot be recorded" in warnings[0]["message"]


@needs_gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def refuse_nothing(self):
        self.refused: list[str] = []
        yield
        assert self.refused == []

    def recorded(self, network: nn.Module) -> Recorded:
        return Recorded(network, refused=self.refused.append)

    def gradients(self, output: torch.Tensor, network: nn.Module, **options) -> list[torch.Tensor]:
        parameters = [p for p in network.parameters() if p.requires_grad]
        target = torch.linspace(0, 1, output.numel(), device=output.device).view_as(output)
        return list(torch.autograd.grad((output - target).square().sum(), parameters, **options))

    @pytest.mark.parametrize("bits", [None, 4, 8])
    @pytest.mark.parametrize("bfloat16", [False, True])
    def test_output_and_gradients_are_the_networks(self, bits, bfloat16):
        network = student("cuda", bits)
        recorded = self.recorded(network)
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            for seed in range(3):
                lq = batch("cuda", seed)
                output, expected = recorded(lq), restore(network, lq).float()
                torch.testing.assert_close(output, expected, **CLOSE)
                for found, plain in zip(
                    self.gradients(output, network), self.gradients(expected, network), strict=True
                ):
                    size = plain.abs().max().clamp_min(1e-6)
                    assert (found - plain).abs().max() / size < (0.05 if bfloat16 else 1e-3)

    def test_it_follows_the_parameters(self):
        network = student("cuda")
        recorded, lq = self.recorded(network), batch("cuda")
        before = recorded(lq).detach()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        assert not torch.equal(recorded(lq), before)
        torch.testing.assert_close(recorded(lq), restore(network, lq), **CLOSE)

    def test_two_backward_passes_have_their_own_gradients(self):
        network, lq = student("cuda"), batch("cuda")
        output = self.recorded(network)(lq)
        parameters = [p for p in network.parameters() if p.requires_grad]
        once = torch.autograd.grad(output.sum(), parameters, retain_graph=True)
        kept = [g.clone() for g in once]
        twice = torch.autograd.grad(2 * output.sum(), parameters)
        for first, still, second in zip(once, kept, twice, strict=True):
            assert torch.equal(first, still)
            torch.testing.assert_close(second, 2 * first, rtol=1e-3, atol=1e-4)

    def test_a_look_leaves_the_backward_pass_alone(self):
        network, lq = student("cuda"), batch("cuda")
        recorded = self.recorded(network)
        plain = self.gradients(recorded(lq), network)
        output = recorded(lq)
        with torch.no_grad():
            recorded(batch("cuda", 5))
            recorded(batch("cuda", 6, images=1))
        for found, expected in zip(self.gradients(output, network), plain, strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)

    def test_gradients_lie_as_their_parameters_do(self):
        network = student("cuda").to(memory_format=torch.channels_last)
        self.recorded(network)(batch("cuda")).sum().backward()
        for parameter in network.parameters():
            if parameter.grad is not None:
                assert parameter.grad.stride() == parameter.stride()

    @pytest.mark.parametrize("source", ["uniform", "spark-paper", "spark"])
    def test_a_training_learns_what_it_would(self, tmp_path, source):
        options = {} if source == "uniform" else {"reward_every": 3}
        make = partial(
            small_run, source=source, bits=4, device="cuda", options=options, ema=0.5, log_every=1
        )
        plain = make(tmp_path / "plain").train()
        found = make(tmp_path / "recorded", recorded=True).train()
        assert not found.of_kind("warning")
        for a, b in zip(plain.of_kind("step"), found.of_kind("step"), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=0.1)

    def test_a_training_can_be_resumed(self, tmp_path):
        run = small_run(tmp_path, bits=4, device="cuda", recorded=True, checkpoint_every=4)
        run.train()
        again = small_run(tmp_path, bits=4, device="cuda", recorded=True, steps=16).resume()
        assert again.train().state.step == 16

    def test_fused_rounding_is_recorded(self, tmp_path):
        plain = small_run(tmp_path / "plain", bits=4, device="cuda", log_every=1).train()
        found = small_run(
            tmp_path, bits=4, device="cuda", recorded=True, compiled=True, log_every=1
        ).train()
        assert not found.of_kind("warning")
        first, fused = plain.of_kind("step")[0], found.of_kind("step")[0]
        assert fused["loss"] == pytest.approx(first["loss"], rel=1e-3)


@pytest.mark.parametrize("bits", [None, 4])
def test_stand_ins_take_the_gradients_of_their_parameters(bits):
    """What is recorded; the rest of a recording needs a GPU."""
    network, lq = student("cpu", bits), batch("cpu")
    trained = [p for p in network.parameters() if p.requires_grad]
    stand_ins = [p.detach().requires_grad_() for p in trained]
    output, expected = _restored_with(network, trained, stand_ins, lq), restore(network, lq)
    assert torch.equal(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), stand_ins)
    assert all(
        torch.equal(found, plain)
        for found, plain in zip(
            gradients, torch.autograd.grad(expected.square().sum(), trained), strict=True
        )
    )
    assert not any(p is s for p, s in zip(network.parameters(), stand_ins, strict=False))
