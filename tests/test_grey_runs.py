"""Networks of one channel, trained: on grey images, and on the luma of colour ones."""

import re

import numpy as np
import pytest
import torch

from helpers import IN_FLOAT, call, photo, write_recipe
from sparkir import recipe
from sparkir.assemble import gather, open_pairs
from sparkir.data.grey import to_grey
from sparkir.deploy.runtime import RuntimeNetwork
from sparkir.distill.methods import methods, published
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import evaluate, mean
from sparkir.evaluate.metrics import Convention
from sparkir.models.checkpoint import save_weights
from sparkir.models.registry import build
from sparkir.recipe import Data
from sparkir.run import train_student
from sparkir.tools import evaluation_setup, open_model

pytest_plugins = ["helpers"]

DNCNN = {"depth": 3, "width": 8, "channels": 1}
GREY = {
    "metric": "grey",
    "data.degradation": "noise",
    "data.scale": 1,
    "data.channels": 1,
    "data.sigma": [1.0, 55.0],
    "data.test_sigma": 25.0,
    "student.model": "dncnn",
    "student.options": DNCNN,
    "teacher.model": "dncnn",
    "teacher.options": DNCNN,
    "teacher.weights": "grey.safetensors",
}
LUMA = {
    "data.degradation": "bicubic",
    "data.scale": 2,
    "student.model": "srcnn",
    "student.options": {"scale": 2, "channels": 1},
    "student.weights": "",
}


def mean_db(said):
    """The PSNR that `evaluate` printed."""
    return float(re.search(r"mean\D+([\d.]+)", said.text)[1])


@pytest.fixture
def grey(project):
    torch.manual_seed(1)
    save_weights(build("dncnn", **DNCNN), project / "grey.safetensors", {})
    changes = GREY | {"train.steps": 4}
    write_recipe(project / "grey.toml", changes)
    return project


def test_a_grey_denoiser_is_trained_measured_and_exported(grey):
    said = call("distill", "grey.toml", "--out", "run")
    assert said.code == 0, said
    assert "PSNR-grey, uint8, no crop" in said.text
    opened = open_model("run")
    assert isinstance(opened.network, RuntimeNetwork)
    pairs, convention = evaluation_setup(opened, "test", None, lambda event: None)
    assert convention == Convention(space="grey", crop_px=0)
    found = mean(evaluate(opened.network, pairs, convention)).psnr_db
    report = (grey / "run/report.md").read_text("utf-8")
    assert f"| runtime | {found:.3f} |" in report
    rgb = Convention(space="rgb", crop_px=0)  # of three equal channels: the same figure
    assert mean(evaluate(opened.network, pairs, rgb)).psnr_db == pytest.approx(found)


def test_the_noise_is_grey_and_of_the_level_that_is_stated(grey):
    made = recipe.load("grey.toml")
    pairs = open_pairs(made.data, "test")
    lq, gt = (image.astype(float) for image in pairs.pair(0))
    assert (lq == lq[..., :1]).all()
    inner = (gt > 100) & (gt < 155)  # where nothing is clipped
    assert (lq - gt)[inner].std() == pytest.approx(25, rel=0.05)
    drawn = open_pairs(made.data, "test", split="train").pair(0)[0]
    assert not np.array_equal(drawn, lq)


def test_another_level_is_measured_with_set(grey):
    call("distill", "grey.toml", "--out", "run", "--set", "train.steps=1")
    figures = {}
    for sigma in (5, 25, 50):
        said = call("evaluate", "run", "--data", "test", "--set", f"data.test_sigma={sigma}")
        assert said.code == 0, said
        figures[sigma] = mean_db(said)
    assert figures[5] > figures[25] > figures[50]
    plain = call("evaluate", "run", "--data", "test")
    assert mean_db(plain) == figures[25]


def test_training_and_evaluation_read_the_same_grey(grey):
    materials = gather(recipe.load("grey.toml"))
    for crop in materials.crops:
        assert torch.equal(crop[:, 0], crop[:, 1])
    _, gt = materials.test.pair(0)
    np.testing.assert_array_equal(gt, to_grey(photo(64, 80, 2)))


@pytest.mark.parametrize(
    ("teacher", "source"), [(None, "uniform"), (3, "spark-paper"), (1, "spark")]
)
def test_luma_super_resolution_is_trained_under_any_teacher(project, teacher, source):
    """As SRCNN's paper has it: on Y of studio range, here of images in colour."""
    changes = LUMA | {"train.steps": 3, "weighting.name": source, "weighting.options": {}}
    if teacher is not None:
        options = {"scale": 2, "channels": teacher}
        save_weights(build("srcnn", **options), project / "srcnn.safetensors", {})
        changes |= {
            "teacher.model": "srcnn",
            "teacher.options": options,
            "teacher.weights": "srcnn.safetensors",
        }
    if teacher is None:
        changes = {key: value for key, value in changes.items() if "weighting" not in key}
    write_recipe(project / "y.toml", changes, without=() if teacher else IN_FLOAT)
    said = call("distill", "y.toml", "--out", "run")
    assert said.code == 0, said
    assert "PSNR-Y studio range, uint8, crop 2 px" in said.text
    assert (project / "run/comparison.png").is_file()


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("teacher_channels", [1, 3])
def test_every_method_distils_a_student_of_one_channel(project, name, teacher_channels):
    """Under a teacher of its kind, and under one in colour, whose output becomes luma."""
    if name == "blocks" and teacher_channels == 3:
        pytest.skip("blocks compares a student with its float self")
    options = {"scale": 2, "channels": teacher_channels}
    save_weights(build("srcnn", **options), project / "srcnn.safetensors", {})
    changes = LUMA | {
        "data.patch_px": 24,
        "teacher.model": "srcnn",
        "teacher.options": options,
        "teacher.weights": "srcnn.safetensors",
        "distill": published(name),
        "train.steps": 2,
    }
    write_recipe(project / "method.toml", changes)
    chosen = recipe.load("method.toml")
    events = []
    train_student(chosen, gather(chosen), project / "method", report=events.append)
    steps = [event for event in events if event["kind"] == "step"]
    assert len(steps) == 2
    assert all(np.isfinite(step["loss"]) and step["distillation"] > 0 for step in steps)


MISTAKES = {
    "rgb student on grey images": (
        {"student.options.channels": 3, "student.weights": ""},
        ["data.channels = 1", "student dncnn restores RGB", "student.options.channels = 1"],
    ),
    "coloured noise for a grey student": (
        {"data.channels": 3, "metric": "rgb"},
        ["luma of coloured noise", "set data.channels = 1"],
    ),
    "metric": ({"metric": "rgb"}, ['metric = "grey" and data.channels = 1 belong together']),
    "metric of colour": ({"data.channels": 3}, ['metric = "grey" and data.channels = 1']),
    "teacher of another luma": (
        {
            "teacher.model": "srcnn",
            "teacher.options": {"scale": 1, "channels": 1},
            "teacher.weights": "srcnn.safetensors",
            "student.weights": "",
        },
        ["teacher srcnn restores luma of studio range", "student dncnn does not"],
    ),
    "channels": ({"data.channels": 2}, ["data.channels = 2"]),
    "test_sigma of another degradation": (
        {"data.degradation": "jpeg", "data.sigma": 25.0},
        ['data.test_sigma is for data.degradation = "noise"'],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_channels(grey, mistake):
    save_weights(build("srcnn", scale=1, channels=1), grey / "srcnn.safetensors", {})
    changes, says = MISTAKES[mistake]
    overrides = [f"--set={key}={value}".replace("'", '"') for key, value in changes.items()]
    if mistake == "teacher of another luma":
        overrides = [o for o in overrides if "options" not in o]
        overrides += ["--set=teacher.options.scale=1", "--set=teacher.options.channels=1"]
        write_recipe(grey / "grey.toml", GREY | {"teacher.options": {}, "data.sigma": 25.0})
    said = call("distill", "grey.toml", "--out", "run", *overrides)
    assert said.code == 1
    for words in says:
        assert words in said.err
    assert not (grey / "run").exists()


def test_a_teacher_of_one_channel_for_a_student_of_three(project):
    save_weights(build("dncnn", **DNCNN), project / "grey.safetensors", {})
    changes = GREY | {
        "metric": "rgb",
        "data.channels": 3,
        "data.sigma": 25.0,
        "student.options": DNCNN | {"channels": 3},
        "student.weights": "",
    }
    write_recipe(project / "mixed.toml", changes)
    with pytest.raises(SparkirError, match=r"teacher dncnn restores luma of full range"):
        gather(recipe.load("mixed.toml"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=5", ["changes nothing that is evaluated", "data.test_sigma=50"]),
        ("data.patch_px=16", ["'data.patch_px' changes nothing that is evaluated"]),
        ("data.test=other", ["'data.test' changes nothing that is evaluated", "--data"]),
        ("data.test_sgima=5", ["unknown key 'data.test_sgima'", "'data.test_sigma'"]),
        ("data.test_sigma=loud", ["--set: data.test_sigma = 'loud'"]),
        ("data.test_quality=5", ['data.test_quality is for data.degradation = "jpeg"']),
    ],
)
def test_a_mistake_in_what_to_evaluate(override, says):
    data = Data(train="a", test="b", degradation="noise")
    with pytest.raises(SparkirError) as caught:
        recipe.with_overrides(data, [override])
    for words in says:
        assert words in str(caught.value)
