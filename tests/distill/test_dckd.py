import copy
from functools import partial

import pytest
import torch
from tapped import Tapped, lq_images, quantized, seen, setting

from sparkir.distill import dckd
from sparkir.distill.dckd import DCKD, _noisy, _renewal_at, follow
from sparkir.distill.encoder import Encoded, Encoder
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError


class Identity(Encoder):
    """Five times the image itself; its latents are the image, its codes 0 and 1."""

    name = "the image itself"
    codebook = torch.tensor([[0.0, 0, 0], [1, 1, 1]])

    def forward(self, images):
        return Encoded([images] * 5, images)


IDENTITY = f"{__name__}:Identity"


class Gain(Tapped):
    """A network whose output is its input, times a number that can be trained."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__(scale=1, blocks=0)
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        for name in ("first", "last"):
            delattr(self, name)

    def forward(self, x):
        return self.gain * x


def flat(value: float, size: int = 2) -> torch.Tensor:
    return torch.full((1, 3, size, size), value)


class TestByHand:
    """S = 0.5, T = 0.6, and the history student gives 0.2 whatever it is shown."""

    def terms(self, monkeypatch, **options):
        monkeypatch.setattr(dckd, "_noisy", lambda lq: lq)
        method = DCKD(setting(Gain(), Gain()), encoder=IDENTITY, **options).eval()
        return method(seen(output=flat(0.5), teacher_output=flat(0.6), lq=flat(0.2)))

    def test_contrast(self, monkeypatch):
        """0.1 away from the teacher, 5 negatives 0.3 away each: 0.1 / 1.5 at each level."""
        contrast = [t for t in self.terms(monkeypatch) if t.name == "contrast"]
        one = torch.ones(1, 1, 2, 2)
        losses = [term.loss(one).item() for term in contrast]
        levels = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
        assert losses == pytest.approx([0.1 * w * 0.1 / 1.5 for w in levels], rel=1e-4)

    def test_distribution(self, monkeypatch):
        """Squared distances of S from the codes: 0.75 and 0.75; of T: 1.08 and 0.48."""
        (term,) = [t for t in self.terms(monkeypatch) if t.name == "distribution"]
        assert term.distance.shape == (1, 1, 2, 2)
        cross_entropy = torch.log(torch.tensor(2.0)).item()  # S cannot decide, whatever T says
        assert term.loss(torch.ones(1, 1, 2, 2)).item() == pytest.approx(0.001 * cross_entropy)

    def test_distribution_against_torch(self):
        method = DCKD(setting(Gain(), Gain()), encoder=IDENTITY).eval()
        output, teacher = torch.rand(2, 1, 3, 4, 4)
        *_, term = method(seen(output=output, teacher_output=teacher, lq=flat(0.2, 4)))
        distances = [
            (image.movedim(1, -1)[..., None, :] - Identity.codebook).square().sum(-1)
            for image in (output, teacher)
        ]
        goal = (-distances[1]).softmax(-1).movedim(-1, 1)
        expected = torch.nn.functional.cross_entropy(-distances[0].movedim(-1, 1), goal)
        torch.testing.assert_close(term.distance.mean(), expected)

    def test_the_factor_is_of_both(self, monkeypatch):
        plain, double = self.terms(monkeypatch), self.terms(monkeypatch, factor=0.2)
        assert [t.factor for t in double] == pytest.approx([2 * t.factor for t in plain])


class TestHistory:
    def test_starts_as_the_student_and_follows_it(self):
        student = Gain(1.0)
        method = DCKD(setting(student, Gain(), steps=250), encoder=IDENTITY).train()
        show = seen(output=flat(0.5), teacher_output=flat(0.6), lq=flat(0.2))
        found = []
        for step in range(3):  # every step of 250 is one of 1000 of 250,000
            with torch.no_grad():
                student.gain.fill_(1.0 + step)
            method(show)
            found.append(method.history.gain.item())
        assert found == pytest.approx([1.0, 0.1 * 1 + 0.9 * 2, 0.1 * 1.9 + 0.9 * 3])

    def test_stands_still_in_evaluation(self):
        student = Gain(1.0)
        method = DCKD(setting(student, Gain(), steps=1), encoder=IDENTITY).eval()
        with torch.no_grad():
            student.gain.fill_(2.0)
        for _ in range(3):
            method(seen())
        assert method.history.gain.item() == 1
        assert method.get_extra_state() == {"seen": 0}

    @pytest.mark.parametrize(
        ("step", "every"),
        [(1, 1000), (100_000, 1000), (100_001, 2000), (200_000, 2000), (200_001, 3000)],
    )
    def test_is_renewed_as_published(self, step, every):
        assert _renewal_at(step, 250_000) == every
        assert _renewal_at(step, 250_000) == 1000 * (1 + (step - 1) // 100_000)

    def test_of_a_short_training(self):
        assert [_renewal_at(step, 10) for step in (1, 4, 5, 9)] == [1, 1, 2, 3]

    def test_is_frozen_and_never_trains(self):
        method = DCKD(setting(Tapped(), Tapped())).train()
        assert not any(p.requires_grad for p in method.history.parameters())
        assert not any(module.training for module in method.history.modules())
        assert not any(m is method._encoder[0] for m in method.modules())
        assert not any(m is method._student[0] for m in method.modules())

    def test_of_a_quantized_student(self):
        """Its own copy: the student's steps move it only when it is renewed."""
        student, teacher = quantized(Tapped()), Tapped()
        method = DCKD(setting(student, teacher, steps=250))
        task = DistillationTask(student, teacher, method=method).train()
        before = copy.deepcopy(method.history.state_dict())
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            task(lq_images(), torch.rand(2, 3, 24, 24)).total().backward()
            optimizer.step()
            now = method.history.state_dict()
            assert any(not torch.equal(now[n], before[n]) for n in now) == (step > 0)

    def test_follow_takes_buffers_as_they_are(self):
        old, new = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
        with torch.no_grad():
            new.weight.fill_(3.0)
            new.running_mean.fill_(5.0)
        follow(old, new, decay=0.1)
        assert old.weight[0].item() == pytest.approx(0.1 + 2.7)
        assert old.running_mean[0].item() == 5


def test_noise():
    """1 to 30 levels per image; half of the images have one noise for all channels."""
    lq = torch.full((400, 3, 16, 16), 0.5)
    off = (_noisy(lq) - lq) * 255
    sigma = off.std(dim=(1, 2, 3))
    assert 0.8 < sigma.min() < 3 and 28 < sigma.max() < 33
    assert sigma.mean() == pytest.approx(15.5, abs=1.5)
    grey = (off[:, 0] == off[:, 1]).flatten(1).all(1)
    assert grey.float().mean() == pytest.approx(0.5, abs=0.1)
    assert _noisy(torch.ones(2, 3, 8, 8)).max() == 1


def test_weights_count_where_they_are():
    method = DCKD(setting(Gain(), Gain()), encoder=IDENTITY).eval()
    output = flat(0.5)
    teacher = output.clone()
    teacher[..., 0, 0] += 0.4
    weights = torch.tensor([[0.0, 1], [1, 1]]).view(1, 1, 2, 2)
    for term in method(seen(output=output, teacher_output=teacher, lq=flat(0.2)))[:5]:
        assert term.loss(weights).item() == 0
        assert term.loss(torch.ones(1, 1, 2, 2)).item() > 0


def test_says_which_encoder_it_used():
    made = DCKD(setting(Tapped(), Tapped())).describe()
    assert made == (
        "DCKD looks at images with fixed random convolutions of 5 levels (no VQGAN); "
        "codebook of 2, fitted to the teacher's outputs"
    )
    brought = DCKD(setting(Gain(), Gain()), encoder=IDENTITY).describe()
    assert brought == "DCKD looks at images with the image itself; codebook of 2, its own"


class Levels(Encoder):
    """So many levels, and latents of 9 channels."""

    name = "levels"

    def __init__(self, count: int, codes: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.count = count
        self.codebook = None if codes is None else torch.zeros(codes)

    def forward(self, images):
        return Encoded([images] * self.count, images.repeat(1, 3, 1, 1))


LEVELS = {
    "three": partial(Levels, 3),
    "six": partial(Levels, 6),
    "narrow": partial(Levels, 5, (32, 4)),
    "flat": partial(Levels, 5, (32,)),
}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("three", "compares 5 levels of features, and levels gives 3"),
        ("six", "compares 5 levels of features, and levels gives 6"),
        ("narrow", r"codes of levels are \(32, 4\), and its latents have 9 channels"),
        ("flat", r"codes of levels are \(32,\)"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_at_once(monkeypatch, made, says):
    monkeypatch.setattr(dckd, "encoder_of", lambda name: LEVELS[name]())
    with pytest.raises(SparkirError, match=says):
        DCKD(setting(Gain(), Gain()), encoder=made)
