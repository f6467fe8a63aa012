import copy
import io
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from sparkir.errors import SparkirError
from sparkir.spark.difficulty import FEATURES, Standardize, difficulty_maps, rightness, to_cells
from sparkir.spark.trust import Trust
from sparkir.spark.weighting import (
    Confidence,
    Constant,
    Fixed,
    Random,
    Spark,
    SparkPaper,
    Weighting,
    to_pixels,
    weighting,
    weightings,
)


@pytest.fixture
def on_the_grid(monkeypatch):
    """Maps are left on the 8 x 8 grid, to be compared cell by cell."""
    monkeypatch.setattr("sparkir.spark.weighting.to_pixels", lambda weights, size: weights)


class TestEverySource:
    @pytest.mark.parametrize("name", weightings())
    @pytest.mark.parametrize("size", [(32, 32), (37, 50)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_is_a_detached_map_in_the_unit_range(self, name, size, channels):
        student, teacher, target = torch.rand(3, 2, channels, *size, requires_grad=True)
        source = weighting(name).train()
        for _ in range(2):
            weights = source(student, teacher, target)
            assert weights.shape == (2, 1, *size)
            assert weights.dtype == torch.float32
            assert not weights.requires_grad
            assert weights.min() >= 0
            assert weights.max() <= 1

    @pytest.mark.parametrize("name", weightings())
    def test_survives_flat_images(self, name):
        flat = torch.full((2, 3, 32, 32), 1 / 3)
        assert weighting(name).train()(flat, flat, flat).isfinite().all()

    @pytest.mark.parametrize("name", weightings())
    def test_only_the_policy_learns(self, name):
        source = weighting(name)
        assert any(map(source.learns_at, range(20))) == (name == "spark-paper")
        assert any(map(source.compares_at, range(20))) == (name == "spark")
        assert bool(list(source.parameters())) == name.startswith("spark")

    def test_names(self):
        fixed = {f"fixed:{name}" for name in FEATURES}
        plain = {"uniform", "constant", "random", "confidence", "spark-paper", "spark"}
        assert set(weightings()) >= fixed | plain
        for index, name in enumerate(FEATURES):
            source = weighting(f"fixed:{name}", mean=0.25)
            assert isinstance(source, Fixed)
            assert (source.index, source.mean) == (index, 0.25)

    def test_unknown_name_or_option(self):
        with pytest.raises(KeyError, match="magic"):
            weighting("magic")
        with pytest.raises(TypeError, match="colour"):
            weighting("random", colour=1.0)

    def test_base_class_is_only_a_protocol(self, images):
        with pytest.raises(NotImplementedError):
            Weighting()(*images)
        with pytest.raises(NotImplementedError):
            Weighting().learn(torch.zeros(4))
        with pytest.raises(NotImplementedError):
            Weighting().learn_from(*images)


@pytest.mark.parametrize(("side", "grid"), [(20, 8), (50, 8), (48, 8), (16, 64), (37, 8)])
def test_pixels_lie_in_the_cells_that_were_made_of_them(side, grid):
    """Where G does not divide a side, cells reach beyond it."""
    per_cell = -(-side // grid)
    for row in (0, side // 2, side - 1):
        image = torch.zeros(1, 1, side, side)
        image[:, :, row] = 1
        cells = to_cells(image, grid).mean(-1)
        weights = to_pixels((cells > 0).float(), (side, side))
        assert weights.shape == (1, 1, side, side)
        own = torch.arange(side) // per_cell == row // per_cell
        brightest = weights[0, 0, :, 0] > 0.9 * weights.max()
        assert own[brightest].all()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("constant", "value"),
        ("random", "mean"),
        ("random", "sigma"),
        ("fixed:student_error", "sigma"),
        ("spark-paper", "sigma"),
        ("spark-paper", "learning_rate"),
        ("spark", "learning_rate"),
    ],
)
def test_numbers_are_numbers(name, option, images):
    assert weighting(name, **{option: 1})(*images).is_floating_point()
    for value in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{option} = {value}: give a number >= 0"):
            weighting(name, **{option: value})


def test_to_pixels_is_bilinear_between_the_centres_of_cells():
    weights = torch.tensor([[0.0, 1.0], [0.4, 0.6]]).view(1, 1, 2, 2)
    row = [0.0, 0.25, 0.75, 1.0]
    expected = [row, [0.1, 0.3, 0.7, 0.9], [0.3, 0.4, 0.6, 0.7], [0.4, 0.45, 0.55, 0.6]]
    torch.testing.assert_close(to_pixels(weights, (4, 4))[0, 0], torch.tensor(expected))


class TestConstant:
    def test_value_everywhere(self, images):
        assert (Constant()(*images) == 1).all()
        assert (weighting("uniform")(*images) == 1).all()
        assert (weighting("constant", value=0.3)(*images) == 0.3).all()


class TestRandom:
    def test_mean_and_deviation(self, on_the_grid):
        image = torch.rand(500, 1, 8, 8)
        for mean, sigma in ((0.5, 0.1), (0.4, 0.05)):
            weights = Random(mean=mean, sigma=sigma)(image, image, image).numpy()
            error = sigma / math.sqrt(weights.size)
            assert weights.mean() == pytest.approx(mean, abs=5 * error)
            assert weights.std() == pytest.approx(sigma, abs=5 * error)

    def test_is_clamped(self, on_the_grid, images):
        weights = Random(sigma=5.0)(*images)
        assert weights.min() == 0
        assert weights.max() == 1

    def test_no_two_maps_are_alike(self, images):
        source = Random()
        first, second = source(*images), source(*images)
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])


class TestFixed:
    @pytest.mark.parametrize("index", range(4))
    def test_ranks_the_cells_by_its_feature(self, index, on_the_grid, images):
        source = weighting(f"fixed:{FEATURES[index]}", sigma=0.01).train()
        weights, maps = source(*images), difficulty_maps(*images)
        for other in range(4):
            same = torch.equal(weights.flatten().argsort(), maps[:, other].flatten().argsort())
            assert same == (other == index)

    @pytest.mark.parametrize("index", range(4))
    def test_formula(self, index, images):
        source = weighting(f"fixed:{FEATURES[index]}", mean=0.4, sigma=0.3, grid=4).train()
        standard = Standardize().train()(difficulty_maps(*images, grid=4))[:, index, None]
        expected = to_pixels((0.4 + 0.3 * standard).clamp(0, 1), (32, 32))
        assert torch.equal(source(*images), expected)

    def test_has_mean_and_deviation_of_the_policy_it_controls(self, on_the_grid, images):
        weights = weighting("fixed:student_error", sigma=0.1).train()(*images)
        assert weights.mean().item() == pytest.approx(0.5, abs=0.01)
        assert weights.std().item() == pytest.approx(0.1, abs=0.01)


class TestConfidence:
    def test_by_hand(self):
        target = torch.full((1, 3, 1, 4), 0.5)
        teacher = target.clone()
        teacher[0, :, 0, 1] -= 0.1  # exp(-1)
        teacher[0, 0, 0, 2] += 0.3  # in one of three channels: the same
        teacher[0, :, 0, 3] += 0.4  # exp(-4), below the least
        weights = Confidence()(torch.rand(1, 3, 1, 4), teacher, target)
        assert weights.flatten().tolist() == pytest.approx(
            [0.75, math.exp(-1), math.exp(-1), 0.1], rel=1e-5
        )


QUADRANTS = torch.zeros(4, 1, 8, 8)
for _i in range(4):
    QUADRANTS[_i, 0, _i // 2 * 4 :, _i % 2 * 4 :][:4, :4] = 1


def images_wrong_in(quadrant):
    """(student, teacher, target) of 16 x 16 px, the student wrong in one quadrant of each."""
    mask = QUADRANTS[quadrant].repeat_interleave(2, 2).repeat_interleave(2, 3)
    target = 0.4 + 0.2 * torch.rand(len(quadrant), 3, 16, 16)
    noise = 0.01 * torch.randn(2, *target.shape)
    return target + 0.1 * mask + noise[0], target + noise[1], target


def with_teacher(sign, quadrant):
    """As `images_wrong_in`; there the teacher is right, or farther off than the student."""
    student, teacher, target = images_wrong_in(quadrant)
    misled = (student - target).abs() > 0.05
    if sign < 0:
        teacher = torch.where(misled, target + 3 * (student - target), teacher)
    return student, teacher, target


def contrast(weights, quadrant):
    """(b,), mean weight inside the quadrant less the mean outside."""
    inside = QUADRANTS[quadrant]
    return (weights * inside).sum((1, 2, 3)) / 16 - (weights * (1 - inside)).sum((1, 2, 3)) / 48


@pytest.mark.usefixtures("on_the_grid")
class TestPolicyLearns:
    """Toy problems whose reward is read off the drawn weights themselves."""

    def after(self, steps, quadrants, reward_of):
        """Train a policy; `quadrants` says where each image's student is wrong."""
        spark = SparkPaper().train()
        for _ in range(steps):
            quadrant = quadrants(16)
            weights = spark(*images_wrong_in(quadrant))
            spark.learn(reward_of(weights, quadrant))
        return spark.eval()

    def test_a_quadrant_that_is_always_the_one(self):
        always = lambda n: torch.zeros(n, dtype=torch.long)  # noqa: E731
        spark = self.after(150, always, contrast)
        weights = spark(*images_wrong_in(always(16)))
        others = [contrast(weights, torch.full((16,), i)).mean() for i in range(1, 4)]
        assert contrast(weights, always(16)).mean() > 0.5 > 0 > max(others)

    def test_a_quadrant_that_only_the_features_show(self):
        quadrant = torch.arange(16) % 4
        spark = self.after(200, lambda n: torch.randint(4, (n,)), contrast)
        assert contrast(spark(*images_wrong_in(quadrant)), quadrant).min() > 0.5

    def test_the_other_way_round(self):
        """Nothing favours difficult places but the reward."""
        quadrant = torch.arange(16) % 4
        spark = self.after(200, lambda n: torch.randint(4, (n,)), lambda *drawn: -contrast(*drawn))
        assert contrast(spark(*images_wrong_in(quadrant)), quadrant).max() < -0.5

    @pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
    def test_nothing_from_a_constant_reward(self, value):
        """The mean of sixteen float32 0.1 is not 0.1, and dividing by ~0 made that a signal."""
        quadrant = torch.arange(16) % 4
        spark = self.after(
            150, lambda n: torch.randint(4, (n,)), lambda w, _: torch.full((len(w),), value)
        )
        weights = spark(*images_wrong_in(quadrant))
        assert (weights - 0.5).abs().max() < 1e-3


def gradients_of(spark: SparkPaper | Spark) -> list[torch.Tensor]:
    """Of its policy, as its optimizer got them in the last step."""
    found = []

    def note(optimizer, *_):
        found[:] = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

    spark.optimizer.register_step_pre_hook(note)
    return found


class TestSparkPaper:
    def test_draws_in_training_and_takes_the_mean_in_evaluation(self, on_the_grid, images):
        spark = SparkPaper().train()
        first, second = spark(*images), spark(*images)
        assert not torch.equal(first, second)
        assert (first.mean() - 0.5).abs() < 0.1
        assert 0.1 < first.std() < 0.3
        before = copy.deepcopy(spark.state_dict())
        spark.eval()
        assert (spark(*images) == 0.5).all()
        assert_equal(spark.state_dict(), before)

    def test_map_is_the_drawn_one_and_is_what_is_learned_from(self, on_the_grid, images):
        """Evaluation in between does not change which draw the reward is for."""
        spark = SparkPaper(learning_rate=0.1).train()
        weights = spark(*images)
        spark.eval()(*images)
        spark.train().learn(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # the second image was good
        mu = spark.eval()(*images)
        moved_to_it = (mu[1] - 0.5) * (weights[1] - 0.5)
        assert moved_to_it.sum() > 0

    def test_learns_every_kth_step(self):
        spark = SparkPaper(reward_every=3)
        assert [spark.learns_at(step) for step in range(7)] == [True, False, False] * 2 + [True]

    def test_one_reinforce_step_against_a_slow_reference(self, images):
        spark = SparkPaper(entropy_bonus=0.05).train()
        with torch.no_grad():
            for parameter in spark.policy.body.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected_policy = copy.deepcopy(spark.policy).requires_grad_(True)
        gradients = gradients_of(spark)
        expected_optimizer = torch.optim.Adam(expected_policy.parameters(), lr=1e-3)
        for _ in range(3):
            spark(*images)
            reward = torch.randn(4) * 1e-3 + 5
            action = spark._action
            log = spark.learn(reward)

            advantage = (reward.numpy().astype(float) - reward.numpy().astype(float).mean()) / (
                reward.numpy().astype(float).std() + 1e-8
            )
            loss = torch.zeros(())
            for image in range(4):
                mu, sigma = expected_policy(action.features[image : image + 1])
                for row in range(8):
                    for column in range(8):
                        cell = Normal(mu[0, 0, row, column], sigma)
                        drawn = action.sample[image, 0, row, column]
                        gain = advantage[image] * cell.log_prob(drawn) + 0.05 * cell.entropy()
                        loss = loss - gain / (4 * 64)
            expected_optimizer.zero_grad()
            loss.backward()
            for a, b in zip(gradients, expected_policy.parameters(), strict=True):
                torch.testing.assert_close(a, b.grad, rtol=2e-3, atol=2e-5)
            expected_policy.load_state_dict(spark.policy.state_dict())
            assert log["policy_loss"] == pytest.approx(loss.item(), abs=1e-4)

    def test_what_it_logs(self, images):
        spark = SparkPaper(entropy_bonus=0.0).train()
        spark(*images)
        sample = spark._action.sample
        log = spark.learn(torch.tensor([1.0, 2.0, 3.0, 6.0]))
        assert all(isinstance(value, float) and math.isfinite(value) for value in log.values())
        assert log["reward"] == pytest.approx(3)
        assert log["reward_deviation"] == pytest.approx(math.sqrt(3.5))
        assert log["advantage_max"] == pytest.approx(3 / math.sqrt(3.5))
        expected = Normal(0.5, 0.2).log_prob(sample).sum((1, 2, 3)).mean().item()
        assert log["log_probability"] == pytest.approx(expected, rel=1e-4)
        assert log["sigma"] == pytest.approx(0.2, rel=0.01)
        assert log["entropy"] == pytest.approx(
            0.5 * math.log(2 * math.pi * math.e * 0.04), abs=0.01
        )

    def test_scale_of_the_reward_does_not_matter(self, images):
        """It is standardised: what counts is which image did better."""
        one, other = SparkPaper().train(), SparkPaper().train()
        other.load_state_dict(one.state_dict())
        for source, factor, shift in ((one, 1.0, 0.0), (other, 1e-3, -7.0)):
            torch.manual_seed(5)
            source(*images)
            source.learn(factor * torch.tensor([1.0, 2.0, 4.0, -1.0]) + shift)
        for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_entropy_bonus_keeps_it_random(self, images):
        sigmas = {}
        for bonus in (0.0, 0.01, -0.01):
            spark = SparkPaper(entropy_bonus=bonus).train()
            for _ in range(10):
                spark(*images)
                sigmas[bonus] = spark.learn(torch.zeros(4))["sigma"]
        assert sigmas[0.0] == pytest.approx(0.2)
        assert sigmas[-0.01] < 0.199 < 0.201 < sigmas[0.01]

    def test_its_mean_is_kept_to_the_range_too(self, images):
        spark = SparkPaper().eval()
        for bias, weight in ((1.5, 1.0), (-1.5, 0.0)):
            torch.nn.init.constant_(spark.policy.body[-1].bias, bias)
            assert (spark(*images) == weight).all()

    def test_one_image_has_nothing_to_be_compared_with(self, images):
        spark = SparkPaper().train()
        spark(*(x[:1] for x in images))
        with pytest.raises(SparkirError, match="there is only one; make batches of two or more"):
            spark.learn(torch.tensor([0.3]))

    def test_equal_rewards_give_no_advantage_and_no_nan(self, images):
        spark = SparkPaper().train()
        spark(*(x[:2] for x in images))
        assert spark.learn(torch.tensor([0.3, 0.3]))["advantage_max"] == 0
        assert (spark.eval()(*images) == 0.5).all()

    def test_learning_before_a_draw_is_a_programming_error(self):
        with pytest.raises(AssertionError, match="forward"):
            SparkPaper().learn(torch.zeros(4))

    def test_state_dict_round_trip_goes_on_identically(self, images):
        def advance(spark, steps):
            for _ in range(steps):
                spark(*images)
                spark.learn(torch.randn(4))

        original = SparkPaper().train()
        advance(original, 5)
        file = io.BytesIO()
        torch.save(original.state_dict(), file)
        file.seek(0)
        restored = SparkPaper().train()
        restored.load_state_dict(torch.load(file, weights_only=True))
        for spark in (original, restored):
            torch.manual_seed(3)
            advance(spark, 5)
        assert_equal(original.state_dict(), restored.state_dict())
        assert not np.allclose(original.eval()(*images), 0.5)

    def test_options_are_used(self, images):
        spark = SparkPaper(grid=4, sigma=1.0, learning_rate=0.5, alpha=2.0, beta=3.0).train()
        spark(*images)
        assert spark._action.sample.shape == (4, 1, 4, 4)
        assert spark._action.sample.std() > 0.8
        assert (spark.alpha, spark.beta) == (2, 3)
        assert spark.optimizer.param_groups[0]["lr"] == 0.5


def assert_equal(a, b):
    """Two nested states, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b


TRUST = 0.01


@pytest.fixture
def small_trust(monkeypatch):
    """A trust under which no allocation reaches the bound of 1."""
    monkeypatch.setattr("sparkir.spark.trust.Trust.value", torch.tensor(TRUST))


@pytest.mark.usefixtures("on_the_grid")
class TestSpark:
    def test_starts_uniform(self, images):
        spark = Spark()
        assert (spark.eval()(*images) == 1).all()
        weights = spark.train()(*images)
        assert (weights == spark.trust.value).all()

    def test_w_is_a_share(self, images):
        """However uneven the allocation, no cell is given more than all of it."""
        spark = Spark()
        with torch.no_grad():
            for parameter in spark.policy.body.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        weights = spark.eval()(*images)
        assert weights.std() > 0
        assert 0 <= weights.min() < weights.max() <= 1

    def test_the_policy_sees_four_signals_and_the_teachers_error(self, images, monkeypatch):
        seen = []
        spark = Spark().train()
        monkeypatch.setattr(
            spark.standardize, "forward", lambda maps: seen.append(maps) or torch.zeros_like(maps)
        )
        spark(*images)
        student, teacher, target = images
        error = to_cells((teacher - target).abs().mean(1, keepdim=True), 8).mean(-1)
        expected = torch.cat([difficulty_maps(student, teacher, target), error], 1)
        assert torch.equal(seen[0], expected)

    def test_the_trust_follows_every_batch_of_training(self, images):
        spark, trust = Spark().train(), Trust()
        for shown in (images, [image.square() for image in images]):
            spark(*shown)
            trust.follow(*shown)
        spark.eval()(*images)
        assert torch.equal(spark.trust.means, trust.means)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_follows_the_rightness_that_only_the_features_show(self, small_trust, sign):
        """The teacher is right where the student is wrong, or far more wrong there than it."""
        spark = Spark(entropy_bonus=0.25).train()
        for _ in range(200):
            quadrant = torch.randint(4, (16,))
            spark(*with_teacher(sign, quadrant))
            spark.learn_from(*with_teacher(sign, quadrant))
        quadrant = torch.arange(16) % 4
        weights = spark.eval()(*with_teacher(sign, quadrant)) / TRUST
        assert (sign * contrast(weights, quadrant)).min() > 0.5
        torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(16))

    def test_stays_uniform_where_rightness_is_noise(self, small_trust, monkeypatch):
        noise = lambda *images, grid: torch.rand(16, 1, grid, grid)  # noqa: E731
        monkeypatch.setattr("sparkir.spark.weighting.rightness", noise)
        spark = Spark(entropy_bonus=0.25).train()
        for _ in range(200):
            images = images_wrong_in(torch.randint(4, (16,)))
            spark(*images)
            spark.learn_from(*images)
        weights = spark.eval()(*images_wrong_in(torch.arange(16) % 4)) / TRUST
        assert (weights - 1).abs().mean() < 0.15

    def test_a_teacher_that_is_equally_right_everywhere_is_no_step_away(self, small_trust):
        student, teacher = torch.rand(2, 4, 3, 32, 32)
        images = student, teacher, student + 0.7 * (teacher - student)
        spark = Spark().train()
        for _ in range(50):
            spark(*images)
            spark.learn_from(*images)
        weights = spark.eval()(*images) / TRUST
        assert (weights - 1).abs().max() < 0.02

    def test_a_teacher_that_is_its_student_is_no_step_away(self, images):
        spark = Spark().train()
        same = images[0], images[0], images[2]
        spark(*same)
        log = spark.learn_from(*same)
        assert all(math.isfinite(value) for value in log.values())
        assert (spark.eval()(*same) == 1).all()

    def test_what_is_logged(self, images):
        spark = Spark().train()
        spark(*images)
        told = spark.learn_from(*images)
        assert told["trust"] == spark.trust.value.item() < 1
        assert told["correlation"] == spark.trust.correlation.item()

    def test_one_step_against_a_slow_reference(self, images):
        """The gradient of mean(W * rightness) - bonus * mean(W log W), W written out as softmax."""
        spark = Spark(entropy_bonus=0.1).train()
        with torch.no_grad():
            for parameter in spark.policy.body.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = copy.deepcopy(spark.policy).requires_grad_(True)
        gradients = gradients_of(spark)
        spark(*images)
        features = spark._features
        log = spark.learn_from(*images)
        right = rightness(*images).flatten(1)
        wish = 1.5 * torch.tanh(expected(features)[0] / 1.5)
        weights = torch.softmax(wish.flatten(1), 1) * 64
        standard = right - right.mean(1, keepdim=True)
        standard = standard / standard.square().mean().sqrt()
        loss = 0.1 * (weights * weights.log()).mean() - (weights * standard).mean()
        loss.backward()
        assert log["policy_loss"] == pytest.approx(loss.item(), abs=1e-5)
        for a, b in zip(gradients, expected.body.parameters(), strict=True):
            torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-6)

    def test_a_batch_of_one_is_enough(self, images):
        spark, one = Spark().train(), [image[:1] for image in images]
        spark(*one)
        assert all(math.isfinite(value) for value in spark.learn_from(*one).values())

    def test_state_dict_round_trip_goes_on_identically(self, images):
        def advance(spark, steps):
            for _ in range(steps):
                shown = [image + 0.01 * torch.randn_like(image) for image in images]
                spark(*shown)
                spark.learn_from(*shown)

        original, restored = Spark().train(), Spark().train()
        advance(original, 5)
        file = io.BytesIO()
        torch.save(original.state_dict(), file)
        file.seek(0)
        restored.load_state_dict(torch.load(file, weights_only=True))
        for spark in (original, restored):
            torch.manual_seed(3)
            advance(spark, 5)
        assert_equal(original.state_dict(), restored.state_dict())
