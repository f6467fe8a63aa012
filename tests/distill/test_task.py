import copy

import pytest
import torch
from torch import nn

from sparkir.distill.method import Setting
from sparkir.distill.methods import method, methods
from sparkir.distill.task import DistillationTask
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import build
from sparkir.spark.weighting import (
    Confidence,
    Constant,
    SparkPaper,
    Weighting,
    weighting,
    weightings,
)


class Affine(nn.Module):
    """A network whose output can be written down: gain * x + offset, in [0, value_range]."""

    def __init__(self, gain: float, offset: float = 0.0, *, value_range: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.offset = nn.Parameter(torch.tensor(offset * value_range))
        self.facts = ModelFacts(
            name="affine", scale=1, channels=3, value_range=value_range, taps=(), halo_px=0
        )

    def forward(self, x):
        return self.gain * x + self.offset


class Convolutions(nn.Module):
    """A real, small network: x2, two convolutions."""

    def __init__(self, *, value_range: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)
        )
        self.shuffle = nn.PixelShuffle(2)
        self.facts = ModelFacts(
            name="small", scale=2, channels=3, value_range=value_range, taps=(), halo_px=2
        )

    def forward(self, x):
        return self.shuffle(self.body(x))


class Given(Weighting):
    """A map that is known beforehand."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, student, teacher, target):
        return self.weights


@pytest.fixture
def batch():
    """(lq, gt) for x2."""
    return torch.rand(3, 3, 16, 16), torch.rand(3, 3, 32, 32)


HALF = torch.tensor([[1.0, 0.0], [0.5, 0.0]]).view(1, 1, 2, 2)  # mean 3/8


class TestByHand:
    """On lq = 0.5 the student gives 0.6, the teacher 0.8, and the truth is 0.9."""

    lq = torch.full((1, 3, 2, 2), 0.5)
    gt = torch.full((1, 3, 2, 2), 0.9)

    def losses(self, **options):
        return DistillationTask(Affine(1.2), Affine(1.6), **options)(self.lq, self.gt)

    def test_plain_distillation(self):
        losses = self.losses()
        assert losses.reconstruction.item() == pytest.approx(0.3, abs=1e-6)  # eq. 2
        assert losses.distillation().item() == pytest.approx(0.04, abs=1e-6)  # eq. 3
        assert losses.total().item() == pytest.approx(0.34, abs=1e-6)  # eq. 4

    def test_weights(self):
        losses = self.losses(weighting=Given(HALF))
        assert losses.distillation().item() == pytest.approx(0.04 * 3 / 8, abs=1e-6)
        assert losses.total().item() == pytest.approx(0.3 + 0.04 * 3 / 8, abs=1e-6)
        assert torch.equal(losses.weights, HALF)

    def test_weights_count_where_they_are(self):
        lq = self.lq.clone()
        lq[..., 0, 0] = 0  # student and teacher agree where W is 1, so only 0.5 / 4 counts
        losses = DistillationTask(Affine(1.2), Affine(1.6), weighting=Given(HALF))(lq, self.gt)
        assert losses.distillation().item() == pytest.approx(0.04 * 0.5 / 4, abs=1e-6)

    def test_other_weights_than_the_own(self):
        losses = self.losses(weighting=Given(HALF))
        other = torch.full((1, 1, 2, 2), 2.0)
        assert losses.distillation(other).item() == pytest.approx(0.08, abs=1e-6)

    def test_strength(self):
        losses = self.losses(strength=20.0, weighting=Given(HALF))
        assert losses.distillation().item() == pytest.approx(20 * 0.04 * 3 / 8, abs=1e-5)
        assert losses.reconstruction.item() == pytest.approx(0.3, abs=1e-6)

    def test_norm(self):
        assert self.losses(norm="l1").total().item() == pytest.approx(0.3 + 0.2, abs=1e-6)

    def test_truth_as_target(self):
        """The control: the same loss, pulled to 0.9 instead of the teacher's 0.8."""
        losses = self.losses(target="truth", strength=2.0)
        assert losses.distillation().item() == pytest.approx(2 * 0.09, abs=1e-6)
        assert torch.allclose(losses.teacher, torch.tensor(0.8))

    def test_truth_as_target_still_weights_by_the_teacher(self):
        """The control differs from the method in nothing but what is imitated."""
        weights = [
            self.losses(target=target, weighting=Confidence()).weights
            for target in ("teacher", "truth")
        ]
        assert torch.equal(*weights)
        assert weights[0].flatten()[0].item() == pytest.approx(0.36788, abs=1e-4)

    def test_both_as_target(self):
        """W of 0.04 to the teacher's 0.8, and what it leaves of 0.09 to the truth's 0.9."""
        losses = self.losses(target="both", strength=2.0, weighting=Given(HALF))
        parts = {name: part.item() for name, part in losses.parts().items()}
        expected = {"output": 2 * 0.04 * 3 / 8, "truth": 2 * 0.09 * 5 / 8}
        assert parts == pytest.approx(expected, abs=1e-6)
        assert losses.distillation().item() == pytest.approx(sum(expected.values()), abs=1e-6)

    def test_both_in_one_unit(self):
        """`matched` divides by twice the gap to the truth, 0.3, for both."""
        losses = self.losses(target="both", norm="matched", weighting=Given(HALF))
        expected = {"output": 0.04 * 3 / 8 / 0.6, "truth": 0.09 * 5 / 8 / 0.6}
        parts = {name: part.item() for name, part in losses.parts().items()}
        assert parts == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("norm", ["l1", "mse"])
    def test_both_under_full_weights_is_the_teacher(self, norm):
        both, teacher = (self.losses(target=goal, norm=norm) for goal in ("both", "teacher"))
        assert torch.equal(both.distillation(), teacher.distillation())

    def test_more_than_full_weights_push_nobody_away_from_the_truth(self):
        losses = self.losses(target="both", weighting=Given(torch.full((1, 1, 2, 2), 3.0)))
        assert losses.parts()["truth"] == 0

    def test_no_teacher_is_plain_l1(self):
        losses = DistillationTask(Affine(1.2), strength=5.0)(self.lq, self.gt)
        assert losses.total().item() == pytest.approx(0.3, abs=1e-6)
        assert losses.distillation().item() == 0
        assert losses.teacher is losses.weights is None
        assert losses.terms == ()

    @pytest.mark.parametrize("student_range", [1.0, 255.0])
    @pytest.mark.parametrize("teacher_range", [1.0, 255.0])
    def test_value_ranges_are_the_networks_own(self, student_range, teacher_range):
        task = DistillationTask(
            Affine(1.0, 0.1, value_range=student_range),
            Affine(1.0, 0.3, value_range=teacher_range),
        )
        losses = task(self.lq, self.gt)
        assert losses.total().item() == pytest.approx(0.34, abs=1e-5)
        assert torch.allclose(losses.output, torch.tensor(0.6))
        assert torch.allclose(losses.teacher, torch.tensor(0.8))


class TestAllocation:
    def test_without_it_each_image_has_its_mean(self, batch):
        weights = torch.rand(3, 1, 32, 32) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
        task = DistillationTask(Convolutions(), Convolutions(), weighting=Given(weights))
        losses = task(*batch)
        expected = (
            losses.reconstruction
            + sum(weights[i].mean() * losses.terms[0].distance[i].mean() for i in range(3)) / 3
        )
        torch.testing.assert_close(losses.total_without_allocation(), expected)
        assert not torch.allclose(losses.total(), expected, rtol=1e-6)

    def test_is_nothing_when_each_map_is_flat(self, batch):
        flat = torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 32, 32)
        task = DistillationTask(Convolutions(), Convolutions(), weighting=Given(flat))
        losses = task(*batch)
        assert torch.equal(losses.total_without_allocation(), losses.total())

    def test_needs_a_teacher(self, batch):
        with pytest.raises(AssertionError):
            DistillationTask(Convolutions())(*batch).total_without_allocation()


class TestUniformIsPlainDistillation:
    """Loss and gradients bit for bit as written without any of this package's classes."""

    @pytest.mark.parametrize("norm", ["l1", "mse"])
    @pytest.mark.parametrize("strength", [1.0, 0.3, 20.0])
    def test_loss_and_gradients(self, batch, norm, strength):
        student, teacher, (lq, gt) = Convolutions(), Convolutions(), batch
        task = DistillationTask(
            student, teacher, weighting=weighting("uniform"), norm=norm, strength=strength
        )
        loss = task(lq, gt).total()
        parameters = list(student.parameters())
        found = torch.autograd.grad(loss, parameters)

        output = student(lq)
        gap = output - teacher(lq).detach()
        distance = gap.abs() if norm == "l1" else gap.square()
        plain = (output - gt).abs().mean() + strength * distance.mean()
        expected = torch.autograd.grad(plain, parameters)
        assert torch.equal(loss, plain)
        for a, b in zip(found, expected, strict=True):
            assert a.abs().max() > 0
            assert torch.equal(a, b)

    def test_is_the_default(self, batch):
        task = DistillationTask(Convolutions(), Convolutions())
        assert isinstance(task.weighting, Constant)
        assert (task(*batch).weights == 1).all()

    def test_constant_matches_a_mean(self, batch):
        """The control for a policy whose W has mean 0.3: as much weight, nowhere special."""
        student, teacher = Convolutions(), Convolutions()
        weights = torch.rand(3, 1, 32, 32).clamp(0.1, 0.9)
        weights = weights - weights.mean((1, 2, 3), keepdim=True) + 0.3
        spatial = DistillationTask(student, teacher, weighting=Given(weights))(*batch)
        constant = DistillationTask(student, teacher, weighting=weighting("constant", value=0.3))(
            *batch
        )
        torch.testing.assert_close(constant.total(), spatial.total_without_allocation())
        uniform = DistillationTask(student, teacher)(*batch)
        torch.testing.assert_close(constant.distillation(), 0.3 * uniform.distillation())


class TestGradients:
    @pytest.mark.parametrize("name", weightings())
    def test_none_through_the_weights_or_features(self, name, batch):
        """The gradient is the one with W taken as a given number."""
        student, teacher = Convolutions(), Convolutions()
        task = DistillationTask(student, teacher, weighting=weighting(name)).train()
        losses = task(*batch)
        parameters = list(student.parameters())
        found = torch.autograd.grad(losses.total(), parameters)
        assert losses.weights.std() > 0 or name in ("uniform", "constant", "spark")

        frozen = losses.weights.clone()
        expected = torch.autograd.grad(
            DistillationTask(student, teacher, weighting=Given(frozen))(*batch).total(), parameters
        )
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    def test_none_through_a_source_that_forgets_to_detach(self, batch):
        class Leaky(Weighting):
            def forward(self, student, teacher, target):
                return (student - target).abs().mean(1, keepdim=True)

        task = DistillationTask(Convolutions(), Convolutions(), weighting=Leaky())
        assert not task(*batch).weights.requires_grad

    def test_none_to_the_policy(self, batch):
        task = DistillationTask(Convolutions(), Convolutions(), weighting=SparkPaper()).train()
        task(*batch).total().backward()
        assert all(p.grad is None for p in task.weighting.parameters())

    def test_none_to_the_teacher(self, batch):
        teacher = Convolutions()
        task = DistillationTask(Convolutions(), teacher)
        losses = task(*batch)
        assert not losses.teacher.requires_grad
        losses.total().backward()
        assert all(p.grad is None for p in teacher.parameters())


class TestTeacher:
    def test_is_frozen_and_no_submodule(self, batch):
        student, teacher = Convolutions().train(), Convolutions().train()
        task = DistillationTask(student, teacher, weighting=SparkPaper())
        assert task.teacher is teacher
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not any(m is teacher for m in task.modules())
        assert {name.split(".")[0] for name in task.state_dict()} == {"student", "weighting"}
        expected = {id(p) for part in (student, task.weighting) for p in part.parameters()}
        assert {id(p) for p in task.parameters()} == expected
        task.train()
        assert not any(m.training for m in teacher.modules())

    def test_stays_as_it_was(self, batch):
        teacher = Convolutions()
        before = copy.deepcopy(teacher.state_dict())
        task = DistillationTask(Convolutions(), teacher).train()
        optimizer = torch.optim.Adam(task.parameters(), lr=0.1)
        for _ in range(2):
            task(*batch).total().backward()
            optimizer.step()
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, before[name])

    def test_a_student_that_is_its_copy_starts_without_distance(self, batch):
        teacher = Convolutions()
        losses = DistillationTask(copy.deepcopy(teacher), teacher)(*batch)
        assert losses.distillation().item() == 0


def test_losses_and_weights_are_float32_under_autocast(batch):
    task = DistillationTask(Convolutions(), Convolutions(), weighting=SparkPaper()).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(*batch)
        assert losses.output.dtype == losses.teacher.dtype == torch.float32
    assert losses.terms[0].distance.dtype == losses.total().dtype == torch.float32
    assert losses.weights.dtype == torch.float32
    assert task.weighting._action.sample.dtype == torch.float32


class Luma(nn.Module):
    """gain * luma, a network of one channel."""

    def __init__(self, gain: float, *, luma_range: str = "full") -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.facts = ModelFacts(
            name="luma",
            scale=1,
            channels=1,
            value_range=1.0,
            taps=(),
            halo_px=0,
            luma_range=luma_range,
        )

    def forward(self, x):
        assert x.shape[1] == 1
        return self.gain * x


class TestOneChannel:
    """On colours (0.2, 0.4, 0.6), whose full-range luma is 0.363; the truth is twice as bright."""

    lq = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    luma = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6

    @pytest.mark.parametrize("teacher", [Luma(1.5), Affine(1.5)])
    def test_luma_is_compared_whatever_the_teacher_restores(self, teacher):
        losses = DistillationTask(Luma(1.0), teacher, norm="l1")(self.lq, 2 * self.lq)
        assert losses.output.shape == losses.gt.shape == losses.teacher.shape == (1, 1, 4, 4)
        assert losses.reconstruction.item() == pytest.approx(self.luma, abs=1e-6)
        assert losses.distillation().item() == pytest.approx(self.luma / 2, abs=1e-6)
        assert losses.weights.shape == (1, 1, 4, 4)

    def test_studio_range(self):
        losses = DistillationTask(Luma(1.0, luma_range="studio"))(self.lq, 2 * self.lq)
        assert losses.output[0, 0, 0, 0].item() == pytest.approx(
            (16 + 219 * self.luma) / 255, abs=1e-4
        )
        assert losses.reconstruction.item() == pytest.approx(self.luma * 219 / 255, abs=1e-4)

    @pytest.mark.parametrize("name", weightings())
    def test_every_weighting(self, name):
        lq, gt = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
        losses = DistillationTask(Luma(0.9), Luma(1.1), weighting=weighting(name))(lq, gt)
        assert losses.weights.shape == (2, 1, 16, 16)
        losses.total().backward()

    @pytest.mark.parametrize("name", methods())
    @pytest.mark.parametrize("channels", [1, 3])
    def test_every_method(self, name, channels):
        student = build("dncnn", depth=4, width=8, channels=1)
        teacher = build("dncnn", depth=4, width=8, channels=channels)
        lq, gt = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
        setting = Setting(student=student, teacher=teacher, examples=[lq], steps=2)
        task = DistillationTask(student, teacher, method=method(name, setting))
        task(lq, gt).total().backward()
        assert all(p.grad is not None for p in student.parameters())
