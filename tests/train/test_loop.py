import copy
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_run as small_run_module
import torch
from small_run import KILLED, Run, assert_same, small_run
from torch import nn

from sparkir.errors import SparkirError
from sparkir.spark.reward import reward
from sparkir.train.loop import Interrupted

KINDS = {
    "float": {},
    "float, several of everything": {
        "optimizer": "adamw",
        "schedule": "step",
        "warmup": 3,
        "clip_norm": 0.1,
        "ema": 0.5,
    },
    "no teacher": {"distill": False, "bits": 8},
    "w4a4 spark": {
        "source": "spark-paper",
        "bits": 4,
        "ema": 0.9,
        "options": {"reward_every": 2},
    },
    "float spark, bfloat16": {
        "source": "spark-paper",
        "bfloat16": True,
        "options": {"reward_every": 3},
    },
    "w4a4 random": {"source": "random", "bits": 4},
    "fitnet": {"name": "fitnet", "ema": 0.5},
    "w4a4 dckd": {"name": "dckd", "bits": 4, "ema": 0.5},
    "dckd, spark": {"name": "dckd", "source": "spark-paper", "options": {"reward_every": 3}},
    "slkd": {"name": "slkd"},
    "w4a4 fakd, spark": {
        "name": "fakd",
        "source": "spark",
        "bits": 4,
        "options": {"reward_every": 3},
    },
    "w4a4 fitnet, spark": {
        "name": "fitnet",
        "source": "spark-paper",
        "bits": 4,
        "clip_norm": 0.1,
        "options": {"reward_every": 2},
    },
}


def stop_after(steps):
    """A request to stop that comes once so many steps were taken."""
    calls = iter(range(1, 10_000))
    return lambda: next(calls) == steps


class TestResume:
    @pytest.mark.parametrize("kind", KINDS)
    def test_n_and_n_more_are_2n(self, tmp_path, kind):
        """Weights, grids, policy, optimizers, average, data and every later random number."""
        whole = small_run(tmp_path / "whole", **KINDS[kind]).train().values()
        first = small_run(tmp_path / "parts", **KINDS[kind])
        with pytest.raises(Interrupted):
            first.train(stop_after(6))
        second = small_run(tmp_path / "parts", **KINDS[kind], seed=99)  # all of it is replaced
        second.resume()
        assert second.state.step == 6
        assert_same(second.train().values(), whole)

    def test_events_go_on_where_they_stopped(self, tmp_path):
        options = KINDS["w4a4 spark"] | {"log_every": 1, "evaluate_every": 3}
        whole = small_run(tmp_path / "whole", **options).train()
        first = small_run(tmp_path / "parts", **options)
        with pytest.raises(Interrupted):
            first.train(stop_after(5))
        second = small_run(tmp_path / "parts", **options).resume().train()
        for kind in ("step", "policy", "evaluation"):
            parts = first.of_kind(kind) + second.of_kind(kind)
            assert list(map(untimed, parts)) == list(map(untimed, whole.of_kind(kind)))

    def test_stopping_saves_first(self, tmp_path):
        run = small_run(tmp_path, checkpoint_every=1000)
        with pytest.raises(Interrupted):
            run.train(stop_after(5))
        assert run.events[-1] == {"kind": "checkpoint", "step": 5, "path": "last.pt"}
        saved = torch.load(run.checkpoint, weights_only=True)
        assert saved["step"] == run.state.step == 5

    def test_stopping_at_the_last_step_is_finishing(self, tmp_path):
        run = small_run(tmp_path, steps=4).train(stop_after(4))
        assert run.state.step == 4
        assert run.of_kind("evaluation")

    def test_a_finished_run_is_left_alone(self, tmp_path):
        small_run(tmp_path, steps=4).train()
        again = small_run(tmp_path, steps=4).resume()
        before = again.state.state_dict()
        again.train()
        assert again.events == []
        assert_same(again.state.state_dict(), before)

    def test_killed_at_any_moment(self, tmp_path):
        """SIGKILL while it saves after each step; what is on the disk goes on to the same end."""
        script = Path(small_run_module.__file__)
        command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "killed")]
        child = subprocess.Popen(command)
        try:
            wait_for(tmp_path / "killed" / "last.pt", child)
            delay_s = random.SystemRandom().uniform(0, 0.4)
            time.sleep(delay_s)
        finally:
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, "it ended before it was killed"
        never_saved = KILLED | {"checkpoint_every": 1000}
        whole = small_run(tmp_path / "whole", **never_saved).train().values()
        resumed = small_run(tmp_path / "killed", **never_saved, seed=99).resume()
        assert 1 <= resumed.state.step < KILLED["steps"], delay_s
        found = resumed.train().values()
        for values in (found, whole):  # the type checker, which the child does without, draws some
            del values["random"]["python"], values["next"]["python"]
        assert_same(found, whole)


def untimed(event: dict) -> dict:
    return {key: value for key, value in event.items() if key not in ("step_s", "data_share")}


def wait_for(path: Path, child: subprocess.Popen) -> None:
    for _ in range(6000):
        if path.exists():
            return
        assert child.poll() is None, "the training process failed"
        time.sleep(0.01)
    raise AssertionError(f"{path} did not appear")


class TestAgainstPlainLoops:
    def test_uniform_distillation_written_out(self, tmp_path):
        run = small_run(tmp_path, schedule="cosine", warmup=2, steps=6)
        plain = small_run(tmp_path, steps=6)
        student, teacher = plain.task.student.train(), plain.task.teacher
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, weight_decay=1e-4)
        for step in range(6):
            lq, gt = (x.float() / 255 for x in plain.state.sampler.next())
            rise = min(1, (step + 1) / 3)
            cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step / 6)))
            optimizer.param_groups[0]["lr"] = 1e-3 * (rise * cosine)
            output = student(lq * 255) / 255
            target = (teacher(lq * 255) / 255).detach()
            loss = (output - gt).abs().mean() + (output - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.train()
        assert_same(run.state.student.state_dict(), student.state_dict())

    def test_gradients_are_clipped(self, tmp_path):
        """One step of plain gradient descent is as long as the limit."""
        run = small_run(tmp_path, steps=1, clip_norm=1e-3, log_every=1)
        run.state.optimizer = torch.optim.SGD(run.task.student.parameters(), lr=1.0)
        run.state.optimizer.param_groups[0]["initial_lr"] = 1.0
        before = torch.cat([p.detach().flatten().clone() for p in run.task.student.parameters()])
        run.train()
        after = torch.cat([p.detach().flatten() for p in run.task.student.parameters()])
        assert run.events[0]["gradient_norm"] > 1e-2  # as it was before
        assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


class TestLookAhead:
    """The counterfactual step is a real one, and leaves no trace."""

    @pytest.mark.parametrize("source", ["spark-paper", "spark"])
    @pytest.mark.parametrize("bits", [None, 4])
    def test_student_does_not_feel_it(self, tmp_path, source, bits):
        """With a policy that does not learn, rewards or none give the same run bit for bit.

        The look-ahead draws no random numbers, so that all later W coincide.
        """
        finals = {}
        for every in (4, 10_000):
            options = {"learning_rate": 0.0, "reward_every": every}
            run = small_run(
                tmp_path / str(every), source=source, bits=bits, options=options, ema=0.5
            ).train()
            finals[every] = run.values()
            del finals[every]["weighting"]["_extra_state"]  # its steps
            for drawn in ("random", "next"):  # what checks annotations draws from Python's
                del finals[every][drawn]["python"]
            assert len(run.of_kind("policy")) == (3 if every == 4 else 1)
        assert_same(finals[4], finals[10_000])

    @pytest.mark.parametrize("source", ["spark-paper", "spark"])
    @pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.Dropout(0.5)], ids=["norm", "dropout"])
    def test_student_with_memory_or_chance_does_not_feel_it(self, tmp_path, layer, source):
        """A network of the user's own may update statistics in a forward pass, or draw."""
        finals = []
        for every in (4, 10_000):
            options = {"learning_rate": 0.0, "reward_every": every}
            run = small_run(tmp_path / str(every), source=source, options=options)
            run.task.student.tail.append(copy.deepcopy(layer))
            finals.append(run.train().state.student.state_dict())
        assert_same(*finals)

    @pytest.mark.parametrize("clip_norm", [0.0, 0.05])
    def test_reward_is_that_of_two_separate_runs(self, tmp_path, clip_norm):
        """One goes on with W, the other with each image's mean of W, from the same checkpoint."""
        options = {
            "source": "spark-paper",
            "options": {"reward_every": 4, "alpha": 0.7, "beta": 5.0},
            "clip_norm": clip_norm,
            "schedule": "constant",
        }

        def after_four_steps() -> Run:
            return small_run(tmp_path, **options, steps=5).resume()

        with pytest.raises(Interrupted):
            small_run(tmp_path, **options, steps=5).train(stop_after(4))
        run = after_four_steps()
        run.checkpoint = tmp_path / "other.pt"  # the others start where it did
        run.train()
        (event,) = run.of_kind("policy")

        outputs = []
        for spatial in (True, False):
            other = after_four_steps()
            task, optimizer = other.task.train(), other.state.optimizer
            lq, gt = (x.float() / 255 for x in other.state.sampler.next())
            losses = task(lq, gt)
            weights = losses.weights
            if not spatial:
                weights = weights.mean((2, 3), keepdim=True).expand_as(weights)
            gap = (losses.output - losses.teacher).square()
            loss = (losses.output - gt).abs().mean() + (weights * gap).mean()
            optimizer.zero_grad()
            loss.backward()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(task.student.parameters(), clip_norm)
            optimizer.step()
            outputs.append(task.run_student(lq).detach())
        assert (outputs[0] - outputs[1]).abs().max() > 1e-6
        expected = reward(*outputs, gt, alpha=0.7, beta=5.0)
        assert expected.abs().min() > 0
        assert event["reward"] == pytest.approx(expected.mean().item(), rel=0.02)
        assert event["reward_deviation"] == pytest.approx(
            expected.std(correction=0).item(), rel=0.02
        )

    @pytest.mark.parametrize("source", ["spark-paper", "spark"])
    def test_policy_changes_when_it_learns(self, tmp_path, source):
        options = {"reward_every": 2, "learning_rate": 1e-2, "entropy_bonus": 0.0}
        run = small_run(tmp_path, source=source, options=options).train()
        policy = run.task.weighting.policy
        maps = torch.rand(1, policy.body[0].in_channels, 8, 8)
        start = 0.5 if source == "spark-paper" else 0.0
        assert (policy(maps)[0] - start).abs().max() > 1e-3

    def test_without_a_teacher_there_is_nothing_to_learn(self, tmp_path):
        run = small_run(tmp_path, source="spark-paper", distill=False).train()
        assert run.of_kind("policy") == []


class TestDivergence:
    def poison(self, run: Run, at_step: int, spoil) -> None:
        """Spoil the run right after `at_step` steps were taken."""

        class Events(list):
            def append(self, event):
                super().append(event)
                if event["kind"] == "step" and event["step"] == at_step:
                    spoil(run.task.student)

        run.events = Events()

    def assert_stops_with_a_good_checkpoint(self, run: Run, *, step: int, saved: int) -> None:
        with pytest.raises(
            SparkirError, match=rf"at step {step}; the last saved state is .*last\.pt"
        ):
            run.train()
        again = Run(run.task, run.state, run.settings, run.checkpoint).resume()
        assert again.state.step == saved
        assert_finite(again.state.state_dict())

    def test_loss_is_nan(self, tmp_path):
        run = small_run(tmp_path, **KINDS["w4a4 spark"], log_every=1, checkpoint_every=3)
        self.poison(run, 7, lambda s: next(s.parameters()).data.fill_(math.nan))
        self.assert_stops_with_a_good_checkpoint(run, step=7, saved=6)

    def test_only_a_gradient_is_infinite(self, tmp_path):
        run = small_run(tmp_path, log_every=1, checkpoint_every=2)
        self.poison(run, 3, lambda s: next(s.parameters()).register_hook(lambda g: g / 0))
        self.assert_stops_with_a_good_checkpoint(run, step=3, saved=2)

    def test_in_a_step_that_would_reward(self, tmp_path):
        options = {"reward_every": 1}
        run = small_run(
            tmp_path, source="spark-paper", options=options, log_every=1, checkpoint_every=2
        )
        self.poison(run, 3, lambda s: next(s.parameters()).data.fill_(math.inf))
        self.assert_stops_with_a_good_checkpoint(run, step=3, saved=2)

    def test_rate_far_too_high(self, tmp_path):
        """The first step goes to where nothing can be computed: no reward, no checkpoint of it."""
        run = small_run(
            tmp_path,
            source="spark-paper",
            options={"reward_every": 1},
            learning_rate=1e30,
            checkpoint_every=1,
        )
        with pytest.raises(SparkirError, match=r"train\.learning_rate"):
            run.train()
        if run.checkpoint.exists():
            assert_finite(torch.load(run.checkpoint, weights_only=True))

    def test_says_so_when_nothing_was_saved(self, tmp_path):
        run = small_run(tmp_path, log_every=1)
        self.poison(run, 2, lambda s: next(s.parameters()).data.fill_(math.nan))
        with pytest.raises(SparkirError, match=r"nan .*nothing was saved.*train\.learning_rate"):
            run.train()
        assert list(tmp_path.iterdir()) == []


def assert_finite(values) -> None:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            assert_finite(value)
    elif torch.is_tensor(values):
        assert values.isfinite().all()
    elif isinstance(values, float):
        assert math.isfinite(values)


class TestEvents:
    def test_kinds_and_fields(self, tmp_path):
        run = small_run(
            tmp_path,
            source="spark-paper",
            bits=4,
            options={"reward_every": 4},
            log_every=3,
            evaluate_every=5,
            checkpoint_every=6,
        ).train()
        steps = {kind: [e["step"] for e in run.of_kind(kind)] for kind in EVENTS}
        assert steps == {
            "step": [3, 6, 9, 12],
            "policy": [0, 4, 8],
            "evaluation": [5, 10, 12],
            "checkpoint": [6, 12],
        }
        assert {event["kind"] for event in run.events} == EVENTS.keys()
        for event in run.events:
            assert event.keys() >= EVENTS[event["kind"]]
            json.dumps(event, allow_nan=False)

    def test_what_a_step_says(self, tmp_path):
        run = small_run(tmp_path, source="constant", options={"value": 0.3}, log_every=1, warmup=1)
        event = run.train().of_kind("step")[0]
        assert event["loss"] == pytest.approx(event["reconstruction"] + event["distillation"])
        assert event["learning_rate"] == pytest.approx(0.5e-3)
        assert event["mean_weight"] == pytest.approx(0.3)
        assert event["weight_deviation"] == pytest.approx(0, abs=1e-6)
        assert event["gradient_norm"] > 0

    def test_without_a_teacher_there_is_no_weight(self, tmp_path):
        event = small_run(tmp_path, distill=False).train().of_kind("step")[0]
        assert event["distillation"] == 0
        assert "mean_weight" not in event

    def test_last_step_reports_evaluates_and_saves_whatever_the_intervals(self, tmp_path):
        run = small_run(tmp_path, steps=5, log_every=100, evaluate_every=0, checkpoint_every=100)
        kinds = [(e["kind"], e["step"]) for e in run.train().events]
        assert kinds == [("step", 5), ("evaluation", 5), ("checkpoint", 5)]


EVENTS = {
    "step": {"loss", "reconstruction", "distillation", "learning_rate", "mean_weight"},
    "policy": {"reward", "reward_deviation", "advantage_max", "entropy", "sigma"},
    "evaluation": {"psnr_db", "best"},
    "checkpoint": {"path"},
}


class TestEvaluation:
    def test_best_is_kept(self, tmp_path):
        scores = iter([20.0, 22.0, 21.0, math.nan, 22.0, 23.0])
        run = small_run(tmp_path, evaluate_every=2)
        run.evaluate = lambda network: next(scores)
        best_files = []

        class Events(list):
            def append(self, event):
                super().append(event)
                if event["kind"] == "evaluation":
                    best = torch.load(tmp_path / "best.pt", weights_only=True)
                    best_files.append((best["step"], best["best"]["psnr_db"]))

        run.events = Events()
        run.train()
        assert [e["best"] for e in run.of_kind("evaluation")] == [True, True] + [False] * 3 + [True]
        assert best_files == [(2, 20)] + [(4, 22)] * 4 + [(12, 23)]
        assert run.state.best == {"step": 12.0, "psnr_db": 23.0}

    def test_best_is_remembered_over_a_stop(self, tmp_path):
        run = small_run(tmp_path, evaluate_every=2)
        run.evaluate = lambda network: 30.0
        with pytest.raises(Interrupted):
            run.train(stop_after(3))
        again = small_run(tmp_path, evaluate_every=2).resume()
        again.evaluate = lambda network: 29.0
        again.train()
        assert not any(e["best"] for e in again.of_kind("evaluation"))
        assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 2

    @pytest.mark.parametrize("ema", [0.0, 0.5])
    def test_of_the_average_where_one_is_kept(self, tmp_path, ema):
        run = small_run(tmp_path, ema=ema, steps=2)
        seen = []
        run.evaluate = lambda network: seen.append(network) or 1.0
        run.train()
        (network,) = seen
        assert network is (run.state.average.module if ema else run.state.student)

    def test_does_not_disturb_training(self, tmp_path):
        from sparkir.evaluate.infer import restore_image

        options = KINDS["w4a4 spark"]
        plain = small_run(tmp_path / "plain", **options).train().values()
        run = small_run(tmp_path / "evaluated", **options, evaluate_every=1)
        image = run.state.sampler._pairs.pair(0)[0]
        run.evaluate = lambda network: float(restore_image(network, image).mean())
        found = run.train().values()
        assert all(m.training for m in run.task.student.modules())
        for values in (plain, found):
            del values["best"]
        assert_same(found, plain)


def test_a_source_learns_from_student_teacher_and_truth_in_this_order(tmp_path, monkeypatch):
    run = small_run(tmp_path, source="spark", steps=1)
    made, given = [], []
    forward, learn = type(run.task).forward, run.task.weighting.learn_from
    monkeypatch.setattr(type(run.task), "forward", lambda *x: made.append(forward(*x)) or made[-1])
    monkeypatch.setattr(run.task.weighting, "learn_from", lambda *x: given.append(x) or learn(*x))
    run.train()
    (losses,), ((student, teacher, truth),) = made, given
    assert torch.equal(student, losses.output)
    assert torch.equal(teacher, losses.teacher)
    assert torch.equal(truth, losses.gt)
    assert not torch.equal(teacher, truth)


def test_the_deviation_that_is_logged_is_that_of_every_pixels_weight(tmp_path, monkeypatch):
    """And not of the images' means: what a random control is matched to."""
    run = small_run(tmp_path, source="constant", steps=1)

    def halves(student, teacher, target):
        weights = torch.zeros(len(student), 1, *student.shape[-2:])
        weights[..., ::2] = 1
        return weights

    monkeypatch.setattr(run.task.weighting, "forward", halves)
    (step,) = run.train().of_kind("step")
    assert step["mean_weight"] == pytest.approx(0.5)
    assert step["weight_deviation"] == pytest.approx(0.5, rel=0.01)
