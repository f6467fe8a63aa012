import copy
import inspect
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn, optim

from sparkir import Spark, SparkirError
from sparkir.spark.counterfactual import Seen, steps_of_the_output
from sparkir.spark.distance import MAPS, shared_maps
from sparkir.spark.reward import reward
from sparkir.spark.trust import Trust
from sparkir.spark.weighting import SparkPaper


class Student(nn.Module):
    """Everything that a look at the next step could disturb: statistics, dropout, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(8, 3, 3, padding=1),
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return x + self.body(x)


class Recorder(SparkPaper):
    """Remembers what it is rewarded with."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.rewards: list[torch.Tensor] = []

    def learn(self, reward):
        self.rewards.append(reward)
        return super().learn(reward)


def published(**options) -> Spark:
    return Spark("spark-paper", **{"distance": "mse"} | options)


def recording(**options) -> Spark:
    spark = published(**options)
    spark.weighting = Recorder(reward_every=1)
    return spark


@pytest.fixture
def batch():
    """(lq, teacher, gt)"""
    gt = torch.rand(4, 3, 16, 16)
    return gt + 0.1 * torch.randn_like(gt), gt + 0.05 * torch.randn_like(gt), gt


def l1(a, b):
    return (a - b).abs().mean()


class CountedSGD(optim.SGD):
    """Keeps a count in its group, as optimizers without a schedule do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.05 / group["count"]
        super().step(closure)


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "counted": lambda p: CountedSGD(p, lr=0.05, momentum=0.9),
}


class TestWeigh:
    def test_uniform_is_plain_distillation_bit_for_bit(self, images):
        student, teacher, target = images
        for name, distance in MAPS.items():
            spark = Spark("uniform", distance=name, strength=2.0)
            kd, weights = spark.weigh(student, teacher, target)
            assert torch.equal(kd, 2.0 * distance(student, teacher).mean())
            assert weights.shape == (4, 1, 32, 32)
            assert (weights == 1).all()

    def test_knows_the_distances_that_recipes_know(self):
        for name in MAPS:
            Spark(distance=name)

    def test_loss_is_the_weighted_mean(self, images):
        student, teacher, target = images
        kd, weights = published().weigh(student, teacher, target)
        torch.testing.assert_close(kd, (weights * (student - teacher).square()).mean())
        assert 0 <= weights.min() < weights.max() <= 1

    def test_gradient_flows_to_the_student_alone(self, images):
        student, teacher, target = (image.requires_grad_() for image in images)
        kd, weights = published().weigh(student, teacher, target)
        kd.backward()
        assert not weights.requires_grad
        assert teacher.grad is target.grad is None
        expected = weights * 2 * (student - teacher) / student.numel()
        torch.testing.assert_close(student.grad, expected.detach())

    def test_255(self, images):
        plain = published().weigh(*images)
        bytes_ = published(value_range=255.0).weigh(*(255 * image for image in images))
        torch.testing.assert_close(bytes_, plain)

    def test_half_precision_is_computed_in_single(self, images):
        student, teacher, target = (image.bfloat16() for image in images)
        with torch.autocast("cpu", torch.bfloat16):
            kd, weights = published().weigh(student, teacher, target)
        assert kd.dtype == weights.dtype == torch.float32
        expected = (weights * (student.float() - teacher.float()).square()).mean()
        assert torch.equal(kd, expected)

    def test_a_distance_of_your_own_of_another_size(self, images):
        def coarse(student, teacher):
            return nn.functional.avg_pool2d((student - teacher).abs(), 4)

        kd, weights = published(distance=coarse).weigh(*images)
        pooled = nn.functional.avg_pool2d(weights, 4)
        torch.testing.assert_close(kd, (pooled * coarse(*images[:2])).mean())

    def test_evaluation_shows_the_mean(self, images):
        spark = published().eval()
        weights = [spark.weigh(*images)[1] for _ in range(2)]
        assert torch.equal(*weights)
        assert (weights[0] == 0.5).all()


class TestRandomness:
    def test_yours_is_left_alone(self, images):
        torch.manual_seed(3)
        expected = torch.rand(5)
        torch.manual_seed(3)
        spark = published()
        torch.manual_seed(3)
        spark.weigh(*images)
        spark.learn()
        assert torch.equal(torch.rand(5), expected)

    def test_making_one_draws_nothing_of_yours(self):
        torch.manual_seed(5)
        first = published(seed=3).state_dict()
        drawn = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), drawn)
        torch.manual_seed(6)  # its policy begins by its own seed
        again, other = published(seed=3).state_dict(), published(seed=4).state_dict()
        name = "weighting.policy.body.0.weight"
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])

    def test_draws_differ_from_call_to_call_and_by_seed(self, images):
        """And those of a seed are not its neighbour's, a step later."""
        maps = [
            spark.weigh(*images)[1]
            for spark in (Spark("random", distance="l1", seed=seed) for seed in (0, 1, 2))
            for _ in range(3)
        ]
        assert len({tuple(one.flatten().tolist()) for one in maps}) == 9

    @pytest.mark.parametrize("make", [Spark, published], ids=["spark", "spark-paper"])
    @pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
    def test_a_look_without_gradients_teaches_nothing(self, images, make, without):
        """Between `weigh` and `learn`, at another size, as a validation would be."""
        looked, other = make(), make()
        for spark in (looked, other):
            for step in range(3):
                student = images[0].clone().requires_grad_()
                kd, _ = spark.weigh(student, *images[1:])
                if spark is looked:
                    with without():
                        spark.weigh(*(image[:1, :, :8, :8] for image in images))
                kd.backward()
                told = spark.learn()
                assert (told is not None) == (step == 0)
        for name, value in other.weighting.named_parameters():
            assert torch.equal(value, looked.weighting.get_parameter(name))
        for name, value in other.weighting.named_buffers():
            assert torch.equal(value, looked.weighting.get_buffer(name))

    @pytest.mark.parametrize("make", [Spark, published], ids=["spark", "spark-paper"])
    def test_stays_in_single_precision_in_a_module_that_does_not(self, images, make):
        for change in ("half", "bfloat16", "double"):
            spark = make()
            before = spark.state_dict()
            getattr(nn.ModuleDict({"spark": spark}), change)()
            spark.weigh(*images)
            assert spark.learn() is not None
            assert {v.dtype for v in before.values() if isinstance(v, Tensor)} == {torch.float32}
            assert all(p.dtype == torch.float32 for p in spark.parameters())

    def test_of_two_outputs_the_last_is_judged_by_its_own_factor(self, images):
        spark = published()
        student = images[0].clone().requires_grad_()
        first, _ = spark.weigh(student, *images[1:])
        last, _ = spark.weigh(student, *images[1:])
        (0.1 * first + 2 * last).backward()
        assert float(spark._factor) == 2


def train(student, optimizer, spark, batch, *, steps, learn):
    lq, teacher, gt = batch
    for _ in range(steps):
        output = student(lq)
        kd, _ = spark.weigh(output, teacher, gt)
        optimizer.zero_grad()
        (l1(output, gt) + kd).backward()
        learn()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestLookAhead:
    def reference(self, student, optimizer, spark, batch, weights):
        """The same, with copies: one takes the step that is due, one the step without places."""
        lq, teacher, gt = batch
        mean = weights.mean((2, 3), keepdim=True)
        outputs = []
        for chosen in (weights, mean):
            copied = copy.deepcopy((student, optimizer))
            with torch.random.fork_rng():
                output = copied[0](lq)
            copied[1].zero_grad()
            kd = spark.strength * (chosen * (output - teacher).square()).mean()
            (l1(output, gt) + kd).backward()
            copied[1].step()
            with torch.no_grad(), torch.random.fork_rng():
                outputs.append(copied[0](lq))
        return reward(*outputs, gt, alpha=1.0, beta=10.0)

    def test_against_copies_that_really_step(self, name, batch):
        student = Student()
        student.body[3].p = 0.0  # the reference cannot draw the same channels
        optimizer = OPTIMIZERS[name](student.parameters())
        spark, expected = recording(strength=20.0), []
        lq, teacher, gt = batch
        for _ in range(3):
            before = copy.deepcopy((student, optimizer))
            output = student(lq)
            kd, weights = spark.weigh(output, teacher, gt)
            expected.append(self.reference(*before, spark, batch, weights))
            optimizer.zero_grad()
            (l1(output, gt) + kd).backward()
            assert spark.learn(optimizer, student, lq) is not None
            optimizer.step()
        for found, wanted in zip(spark.weighting.rewards, expected, strict=True):
            assert wanted.abs().max() > 1e-5
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-6)

    def test_the_training_is_what_it_would_have_been(self, name, batch):
        """The student, its buffers, its optimizer, the gradients and the random numbers."""
        torch.manual_seed(5)
        students, ends = [Student() for _ in range(2)], []
        students[1].load_state_dict(students[0].state_dict())
        for student, looks in zip(students, (True, False), strict=True):
            torch.manual_seed(6)
            optimizer, spark = OPTIMIZERS[name](student.parameters()), Spark("random")
            if looks:
                spark.weighting.learns_at = lambda step: step % 2 == 0
                spark.weighting.learn = lambda gain: {}

            def learn(spark=spark, optimizer=optimizer, student=student):
                spark.learn(optimizer, student, batch[0])

            train(student, optimizer, spark, batch, steps=4, learn=learn)
            state = [*student.state_dict().values(), *(p.grad for p in student.parameters())]
            ends.append([*state, torch.rand(3)])
        for looked, plain in zip(*ends, strict=True):
            assert torch.equal(looked, plain)


class TestLoops:
    """Everything that people do between the loss and the step."""

    def rewards(self, batch, loop) -> list[torch.Tensor]:
        torch.manual_seed(0)
        student = nn.Conv2d(3, 3, 3, padding=1)
        optimizer, spark = optim.SGD(student.parameters(), lr=0.1), recording(strength=20.0)
        loop(student, optimizer, spark, *batch)
        return spark.weighting.rewards

    @staticmethod
    def plain(student, optimizer, spark, lq, teacher, gt):
        output = student(lq)
        kd, _ = spark.weigh(output, teacher, gt)
        (l1(output, gt) + kd).backward()
        spark.learn(optimizer, student, lq)
        optimizer.step()

    def assert_as_plain(self, batch, loop, **tolerance):
        (found,), (expected,) = (self.rewards(batch, one) for one in (loop, self.plain))
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(found, expected, **{"rtol": 1e-3, "atol": 1e-7} | tolerance)

    def test_gradient_scaling(self, batch):
        def loop(student, optimizer, spark, lq, teacher, gt):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            output = student(lq)
            kd, _ = spark.weigh(output, teacher, gt)
            scaler.scale(l1(output, gt) + kd).backward()
            scaler.unscale_(optimizer)
            spark.learn(optimizer, student, lq, unscaled_by=scaler.get_scale())
            scaler.step(optimizer)

        self.assert_as_plain(batch, loop)

    def test_a_gradient_that_overflowed_teaches_nothing(self, batch):
        def loop(student, optimizer, spark, lq, teacher, gt):
            output = student(lq)
            kd, _ = spark.weigh(output, teacher, gt)
            (l1(output, gt) + kd).backward()
            student.weight.grad[0, 0, 0, 0] = torch.inf
            assert spark.learn(optimizer, student, lq) is None

        assert self.rewards(batch, loop) == []

    def test_gradient_accumulation(self, batch):
        """Two micro-batches, of which the last one's W is judged."""

        def loop(student, optimizer, spark, lq, teacher, gt):
            other = lq.flip(0), teacher.flip(0), gt.flip(0)
            for x, t, g in (other, (lq, teacher, gt)):
                output = student(x)
                kd, weights = spark.weigh(output, t, g)
                ((l1(output, g) + kd) / 2).backward()
            expected = reference(student, weights, lq, teacher, gt)
            spark.learn(optimizer, student, lq)
            torch.testing.assert_close(spark.weighting.rewards[0], expected, rtol=1e-2, atol=1e-6)

        def reference(student, weights, lq, teacher, gt):
            mean, outputs = weights.mean((2, 3), keepdim=True), []
            for chosen in (weights, mean):
                moved = copy.deepcopy(student)
                moved.zero_grad()
                shift = 20.0 * ((chosen - weights) * (moved(lq) - teacher).square()).mean() / 2
                shift.backward()
                with torch.no_grad():
                    for parameter, own in zip(
                        moved.parameters(), student.parameters(), strict=True
                    ):
                        parameter -= 0.1 * (own.grad + parameter.grad)
                    outputs.append(moved(lq))
            return reward(*outputs, gt, alpha=1.0, beta=10.0)

        assert len(self.rewards(batch, loop)) == 1

    def test_clipping_in_a_step_of_your_own(self, batch):
        def loop(student, optimizer, spark, lq, teacher, gt):
            def step():
                nn.utils.clip_grad_norm_(student.parameters(), 0.01)
                optimizer.step()

            output = student(lq)
            kd, _ = spark.weigh(output, teacher, gt)
            (l1(output, gt) + kd).backward()
            spark.learn(optimizer, student, lq, step=step)
            step()

        (clipped,), (plain,) = (self.rewards(batch, one) for one in (loop, self.plain))
        assert 0 < clipped.abs().max() < 0.5 * plain.abs().max()

    def test_a_closure_instead_of_a_module(self, batch):
        def loop(student, optimizer, spark, lq, teacher, gt):
            output = student(lq)
            kd, _ = spark.weigh(output, teacher, gt)
            (l1(output, gt) + kd).backward()
            spark.learn(optimizer, lambda: student(lq))

        self.assert_as_plain(batch, loop)

    def test_autocast(self, batch):
        """In the same region, where half-precision copies of the weights are kept."""

        def loop(student, optimizer, spark, lq, teacher, gt):
            with torch.autocast("cpu", torch.bfloat16):
                output = student(lq)
                kd, _ = spark.weigh(output, teacher, gt)
                (l1(output, gt) + kd).backward()
                spark.learn(optimizer, student, lq)
                assert spark.weighting.rewards[-1].abs().max() > 0
                optimizer.step()
                assert torch.equal(student(lq), copy.deepcopy(student)(lq))

        self.rewards(batch, loop)

    def test_autocast_for_the_loss_alone(self, batch):
        def loop(student, optimizer, spark, lq, teacher, gt):
            with torch.autocast("cpu", torch.bfloat16):
                output = student(lq)
                kd, _ = spark.weigh(output, teacher, gt)
                loss = l1(output, gt) + kd
            loss.backward()
            spark.learn(optimizer, student, lq)

        (found,), (expected,) = (self.rewards(batch, one) for one in (loop, self.plain))
        assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.95

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
    @pytest.mark.parametrize("whole", [False, True])
    def test_compiled(self, batch, whole, monkeypatch):
        """The student alone, or the whole step."""
        # Without the checks of types that tests add, which cannot be compiled.
        monkeypatch.setattr(Spark, "weigh", inspect.unwrap(Spark.weigh))

        def loop(student, optimizer, spark, lq, teacher, gt):
            compiled = torch.compile(student, backend="eager")

            def losses(lq, teacher, gt):
                output = compiled(lq)
                kd, _ = spark.weigh(output, teacher, gt)
                return l1(output, gt) + kd

            run = torch.compile(losses, backend="eager") if whole else losses
            run(lq, teacher, gt).backward()
            spark.learn(optimizer, compiled, lq)

        self.assert_as_plain(batch, loop)


class TestLead:
    """The preset that learns from what it has seen, and asks nothing of the student."""

    def step(self, spark, student, batch, *, look):
        lq, teacher, gt = batch
        optimizer = optim.SGD(student.parameters(), lr=0.1)
        output = student(lq)
        kd, _ = spark.weigh(output, teacher, gt)
        (l1(output, gt) + kd).backward()
        return look(optimizer, student, lq)

    def test_the_trust_is_of_the_outputs(self, batch):
        lq, teacher, gt = batch
        student, spark, trust = nn.Conv2d(3, 3, 3, padding=1), Spark(), Trust()
        told = self.step(spark, student, batch, look=spark.learn)
        trust.follow(student(lq).detach(), teacher, gt)
        assert told["trust"] == trust.value.item() < 1

    @pytest.mark.parametrize("distance", [*MAPS, "own"])
    def test_what_w_leaves_pulls_to_the_truth(self, images, distance):
        """The loss of `distill.target = "both"`, at ten times the distance."""
        student, teacher, gt = images
        own = {"distance": lambda a, b: (a - b).pow(4)} if distance == "own" else {}
        kd, weights = Spark(**{"distance": distance} | own).weigh(student, teacher, gt)
        assert 0 < weights.mean() < 1
        if own:
            to_teacher, to_truth = (student - teacher).pow(4), (student - gt).pow(4)
        else:
            to_teacher, to_truth = shared_maps(MAPS[distance], student, teacher, gt)
        expected = 10 * (weights * to_teacher + (1 - weights) * to_truth).mean()
        torch.testing.assert_close(kd, expected)

    def test_others_leave_the_truth_to_your_loss(self, images):
        student, teacher, target = images
        kd, weights = Spark("confidence", distance="l1").weigh(student, teacher, target)
        torch.testing.assert_close(kd, (weights * (student - teacher).abs()).mean())

    def test_with_and_without_the_student_alike(self, batch):
        student, start, told = Student().eval(), Spark().parameters(), []
        for arguments in (slice(None), slice(0)):
            spark = Spark()
            look = lambda *given: spark.learn(*given[arguments])  # noqa: B023, E731
            told.append(self.step(spark, student, batch, look=look))
        moved = [not torch.equal(a, b) for a, b in zip(start, spark.parameters(), strict=True)]
        assert any(moved)
        assert told[0] == told[1]

    def test_the_student_is_not_run(self, batch):
        student, spark = Student(), Spark()

        def look(optimizer, student, lq):
            calls = int(student.calls)
            spark.learn(optimizer, student, lq)
            assert student.calls == calls

        self.step(spark, student, batch, look=look)

    def test_a_student_that_diverged(self, batch):
        """The first time it may be half precision that overflowed."""
        lq, teacher, gt = batch
        spark = Spark(reward_every=1)
        spark.weigh(lq * float("nan"), teacher, gt)
        assert spark.learn() is None
        spark.weigh(lq * float("nan"), teacher, gt)
        with pytest.raises(SparkirError, match="student's output is nan: the training has div"):
            spark.learn()


@pytest.mark.parametrize("make", [Spark, lambda: published(reward_every=1)])
def test_an_overflow_leaves_nothing_behind(make, batch):
    """A GradScaler skips that step, and must not have to skip all others."""
    lq, teacher, gt = batch
    spark, other = make(), make()
    for one, overflows in ((spark, True), (other, False)):
        one.weigh(lq, teacher, gt)
        one.learn()
        if overflows:
            one.weigh(lq * float("inf"), teacher, gt)
            assert one.learn() is None
        one.weigh(lq, teacher, gt)
        one.learn()
    for (name, found), expected in zip(spark.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert spark.weigh(lq, teacher, gt)[1].isfinite().all()


def test_a_policy_is_no_part_of_the_module_that_holds_it(images):
    """A wrapper for several processes waits for the gradients of all that ask for one."""
    for spark in (Spark(), published()):
        assert not any(p.requires_grad for p in spark.parameters())
        student = images[0].clone().requires_grad_()
        loss, _ = spark.weigh(student, *images[1:])
        loss.backward()
        spark.learn()
        assert all(p.grad is None and not p.requires_grad for p in spark.parameters())


class TestState:
    def test_a_resumed_training_goes_on_as_it_would_have(self, batch):
        def run(student, optimizer, spark, steps):
            def learn():
                spark.learn(optimizer, student, batch[0])

            train(student, optimizer, spark, batch, steps=steps, learn=learn)

        student = nn.Conv2d(3, 3, 3, padding=1)
        optimizer, spark = optim.SGD(student.parameters(), lr=0.1), published(reward_every=3)
        run(student, optimizer, spark, 4)
        resumed = published(reward_every=3)
        resumed.load_state_dict(copy.deepcopy(spark.state_dict()))
        others = copy.deepcopy((student, optimizer))
        run(student, optimizer, spark, 4)
        run(*others, resumed, 4)
        for a, b in zip(student.parameters(), others[0].parameters(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(spark.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_saved_as_plain_tensors(self, tmp_path, images):
        spark = published()
        spark.weigh(*images)
        spark.learn()
        torch.save(spark.state_dict(), tmp_path / "spark.pt")
        other = published()
        other.load_state_dict(torch.load(tmp_path / "spark.pt", weights_only=True))
        assert torch.equal(other.weigh(*images)[1], spark.weigh(*images)[1])


class TestLearns:
    """A task whose best allocation is known: the teacher is right on the left alone."""

    STEPS = 60

    def teacher(self, gt):
        wrong = torch.zeros_like(gt)
        wrong[..., 16:] = 0.2 * torch.sign(gt[..., 16:] - 0.5)
        return gt + wrong

    def drawn(self):
        gt = torch.rand(16, 3, 32, 32)
        return (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1), self.teacher(gt), gt

    def fresh(self):
        options = {"grid": 2, "reward_every": 1, "learning_rate": 3e-3, "entropy_bonus": 0.0}
        return published(strength=5.0, **options)

    task, spark = pytest.fixture(drawn), pytest.fixture(fresh)

    def preference(self, spark, task) -> float:
        """Weight on the left above that on the right."""
        weights = spark.eval().weigh(*task)[1]
        spark.train()
        return float((weights[..., :16] - weights[..., 16:]).mean())

    def test_by_looking_ahead(self, spark, task):
        """The student is a picture whose every pixel is a parameter."""
        lq, teacher, gt = task
        assert self.preference(spark, task) == 0
        for _ in range(self.STEPS):
            picture = nn.Parameter(lq.clone())
            optimizer = optim.SGD([picture], lr=400.0)
            kd, _ = spark.weigh(picture, teacher, gt)
            (l1(picture, gt) + kd).backward()
            spark.learn(optimizer, lambda picture=picture: picture)
        assert self.preference(spark, task) > 0.2

    def test_from_the_images_alone(self, spark, task):
        assert self.preference(spark, task) == 0
        for _ in range(self.STEPS):
            spark.weigh(*task)
            assert spark.learn() is not None
        assert self.preference(spark, task) > 0.2

    def test_prefers_nothing_where_nothing_is_to_prefer(self):
        """The teacher is equally right everywhere: a policy leans to either side, by chance."""
        found = []
        for _ in range(8):
            spark, (lq, _, gt) = self.fresh(), self.drawn()
            for _ in range(self.STEPS):
                spark.weigh(lq, gt, gt)
                spark.learn()
            found.append(self.preference(spark, (lq, gt, gt)))
        assert abs(statistics.fmean(found)) < 0.1


def test_the_step_of_the_output_is_a_tenth_of_the_error(images):
    """Of each image, so that a reward is of one size however near the student is."""
    student, teacher, target = images
    seen = Seen(student, teacher, target, torch.rand(len(student), 1, 16, 16))
    moved = steps_of_the_output(seen, MAPS["mse"]).without - student
    size, error = (x.abs().mean((1, 2, 3)) for x in (moved, target - student))
    torch.testing.assert_close(size, 0.1 * error)


class TestMistakes:
    def test_unknown_preset(self):
        with pytest.raises(SparkirError, match="did you mean 'spark-paper'"):
            Spark("spark-papr")

    def test_unknown_option(self):
        with pytest.raises(SparkirError, match="'spark-paper' does not take these options"):
            published(reward_evry=3)

    def test_unknown_distance(self):
        with pytest.raises(SparkirError, match="no distance 'l2'; known: l1, mse, matched"):
            Spark(distance="l2")

    def test_shapes(self, images):
        student, teacher, target = images
        with pytest.raises(SparkirError, match="one shape"):
            Spark().weigh(student[..., 1:], teacher, target)

    def test_white_level(self, images):
        with pytest.raises(SparkirError, match=r"target's .* white is 1; say Spark\(value_range"):
            Spark().weigh(*(255 * image for image in images))
        with pytest.raises(SparkirError, match="the teacher's output's values reach from"):
            Spark().weigh(images[0], 255 * images[1], images[2])
        with pytest.raises(SparkirError, match="white is 255; say"):
            Spark(value_range=255.0).weigh(*images)

    def test_one_image_without_a_batch(self, images):
        with pytest.raises(SparkirError, match=r"batch of images .* got 3 dim.* image\[None\]"):
            Spark().weigh(*(image[0] for image in images))

    @pytest.mark.parametrize(
        "options", [{"grid": 0}, {"reward_every": 0}, {"sigma": 0.0}, {"learning_rate": -1.0}]
    )
    def test_options_out_of_range(self, options):
        with pytest.raises(SparkirError, match="does not take these options"):
            Spark("spark-paper", **options)

    def test_any_number_of_channels(self, images):
        packed = [torch.cat([image, image[:, :1]], 1) for image in images]
        for spark in (Spark(), published()):
            assert spark.weigh(*packed)[1].isfinite().all()

    def test_learn_without_weigh(self):
        with pytest.raises(SparkirError, match=r"call spark.weigh before it"):
            Spark().learn()

    def test_learn_before_backward(self, images):
        student = images[0].requires_grad_()
        spark = published()
        spark.weigh(*images)
        with pytest.raises(SparkirError, match=r"behind loss\.backward"):
            spark.learn(optim.SGD([student], lr=1.0), lambda: student)

    def test_diverged(self, images):
        student = images[0].clone().requires_grad_()
        spark = published()
        kd, _ = spark.weigh(student, *images[1:])
        kd.backward()
        with pytest.raises(SparkirError, match="the training has diverged"):
            spark.learn(optim.SGD([student], lr=1.0), lambda: student * float("nan"))

    def test_learn_after_the_gradients_are_gone(self, images):
        student = images[0].clone().requires_grad_()
        optimizer = optim.SGD([student], lr=1.0)
        spark = published()
        kd, _ = spark.weigh(student, *images[1:])
        kd.backward()
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(SparkirError, match="finds no gradients in its optimizer"):
            spark.learn(optimizer, lambda: student)

    def test_a_batch_of_one_with_nothing_to_compare(self, images):
        spark = published(distance="l1")
        spark.weigh(*(image[:1] for image in images))
        with pytest.raises(SparkirError, match="make batches of two or more"):
            spark.learn()

    def test_an_empty_batch(self, images):
        with pytest.raises(SparkirError, match="empty batch"):
            Spark().weigh(*(image[:0] for image in images))

    def test_a_distance_that_is_no_map(self, images):
        with pytest.raises(SparkirError, match="must return a map"):
            Spark("uniform", distance=nn.L1Loss()).weigh(*images)

    @pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
    def test_strength(self, strength):
        with pytest.raises(SparkirError, match="give a number >= 0"):
            Spark(strength=strength)

    def test_learn_is_forgotten(self, images):
        spark, control = Spark(), Spark("uniform")
        with pytest.warns(UserWarning, match=r"spark.learn\(\) is to be called once a step"):
            for _ in range(120):
                spark.weigh(*images)
                control.weigh(*images)

    def test_controls_have_nothing_to_learn(self, images):
        spark = Spark("constant", value=0.5)
        spark.weigh(*images)
        assert spark.learn() is None


RANKS = Path(__file__).with_name("two_ranks.py")


@pytest.mark.parametrize("preset", [pytest.param("spark-paper", marks=pytest.mark.slow), "spark"])
def test_two_processes_have_one_policy(tmp_path, preset):
    """DDP over gloo: after training, students and policies are the same bits in both."""
    command = [sys.executable, str(RANKS), str(tmp_path), preset]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name])
        assert same != name.startswith("own."), name
    assert first["moved.policy"] > 0
    assert first["steps.without"].tolist() == [1, 2, 3, 5]  # at 2, one of the two has overflowed
