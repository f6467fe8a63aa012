"""Steps in floating point before rounding begins: `train.float_steps`."""

from pathlib import Path

import pytest
import torch

from helpers import call, one_order_of_sums, write_recipe
from sparkir import run
from sparkir.assemble import gather, task_of
from sparkir.quant.quantizer import activation_quantizers
from sparkir.recipe import load
from sparkir.run import train_student
from sparkir.train.loop import Interrupted

pytest_plugins = ["helpers"]

FRESH = {
    "student": {"model": "edsr", "options": {"width": 8, "blocks": 1, "scale": 2}},
    "train.steps": 12,
    "train.float_steps": 6,
    "train.ema": 0.5,
    "train.learning_rate": 1e-2,
    "quant.weight_bits": 8,
    "quant.activation_bits": 8,
    "quant.equalize": True,
}
IN_FLOAT = {key: value for key, value in FRESH.items() if not key.startswith("quant")}


def recipe(path: Path, **changes):
    return load(str(write_recipe(path, FRESH | changes, without=["weighting", "distill"])))


def trained(recipe, folder, *, stop_after=None):
    """The student and the losses of its steps."""
    losses: dict[int, float] = {}

    def report(event):
        if event["kind"] == "step":
            losses[event["step"]] = event["loss"]

    stop = (lambda: max(losses, default=0) >= stop_after) if stop_after else lambda: False
    result = train_student(recipe, gather(recipe), folder, report=report, stop_requested=stop)
    return result.student, losses


def test_until_then_it_trains_as_in_floating_point(project):
    made = recipe(project / "fresh.toml")
    _, losses = trained(made, Path("quantized"))
    path = write_recipe(
        project / "float.toml",
        IN_FLOAT | {"train.float_steps": 0},
        without=["weighting", "distill", "quant"],
    )
    _, in_float = trained(load(str(path)), Path("float"))
    for step in range(1, 7):
        assert losses[step] == pytest.approx(in_float[step], rel=1e-4)
    assert abs(losses[7] / in_float[7] - 1) > 1e-4  # rounded, 8 bits


def test_the_grids_are_set_to_what_the_student_has_become(project):
    """Those of its fresh weights would hold a fraction of what it computes later."""
    longer = {"train.steps": 60, "train.float_steps": 50}
    student, losses = trained(recipe(project / "fresh.toml", **longer), Path("with"))
    grids = activation_quantizers(student)
    assert all(grid.observer is None for grid in grids.values())
    never = recipe(project / "fresh.toml", **longer | {"train.float_steps": 0})
    _, without = trained(never, Path("none"))
    assert losses[60] < 0.7 * without[60]


def test_what_a_method_remembers_of_the_student_is_rounded_too(project, monkeypatch):
    made = []
    monkeypatch.setattr(run, "task_of", lambda *given: made.append(task_of(*given)) or made[-1])
    changes = {"distill": {"method": "dckd", "norm": "l1"}, "train.evaluate_every": 3}
    path = write_recipe(project / "fresh.toml", FRESH | changes, without=["weighting"])
    trained(load(str(path)), Path("run"))
    history = made[0].method.history
    grids = activation_quantizers(history).values()
    assert all(grid.observer is None and grid.scale().isfinite() for grid in grids)
    assert {grid.zero_level for grid in grids} != {0}
    assert all(parameter.isfinite().all() for parameter in history.parameters())


def test_the_best_is_one_that_rounds(project):
    made = recipe(project / "fresh.toml", **{"train.evaluate_every": 3, "quant.weight_bits": 2})
    trained(made, Path("run"))
    state = torch.load("run/best.pt", weights_only=True)
    assert state["step"] > 6


@pytest.mark.parametrize(("equalize", "steps"), [(True, 6), (False, 12)])
def test_averages_of_gradients_begin_again_where_weights_are_scaled(project, equalize, steps):
    trained(recipe(project / "fresh.toml", **{"quant.equalize": equalize}), Path("run"))
    saved = torch.load("run/last.pt", weights_only=True)
    assert max(int(one["step"]) for one in saved["optimizer"]["state"].values()) == steps


@one_order_of_sums
@pytest.mark.parametrize("stop_after", [3, 6, 9])
def test_resumes_bit_for_bit(project, stop_after):
    made = recipe(project / "fresh.toml")
    once, losses = trained(made, Path("once"))
    with pytest.raises(Interrupted):
        trained(made, Path("twice"), stop_after=stop_after)
    twice, rest = trained(made, Path("twice"))
    assert rest == {step: loss for step, loss in losses.items() if step > stop_after}
    expected = once.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in twice.state_dict().items())


def test_fresh_students_without_it_are_warned_of(project):
    write_recipe(project / "fresh.toml", FRESH | {"train.float_steps": 0, "train.steps": 1})
    assert "grids are set to what those compute" in call("distill", "fresh.toml").err.replace(
        "\n", " "
    )
    write_recipe(project / "warm.toml", FRESH | {"train.steps": 2, "train.float_steps": 1})
    assert "fresh weights" not in call("distill", "warm.toml").err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": {"method": "fitnet"}}, "compares features, and train.float_steps would"),
        ({"train.float_steps": 12}, "train.float_steps must be fewer than train.steps"),
        ({"train.float_steps": -1}, "greater than or equal to 0"),
    ],
)
def test_mistakes(project, changes, words):
    write_recipe(project / "wrong.toml", FRESH | changes)
    for command in ("check", "distill"):
        said = call(command, "wrong.toml")
        assert said.code == 1
        assert words in " ".join(said.err.split())


def test_nothing_to_begin_without_quantization(project):
    without = ["quant", "distill", "weighting", "baselines"]
    write_recipe(project / "wrong.toml", IN_FLOAT, without=without)
    assert "add a [quant]" in " ".join(call("distill", "wrong.toml").err.split())
