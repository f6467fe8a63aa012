"""Teacher and student of different conventions: their facts reconcile them, and no hand does."""

import json

import numpy as np
import pytest
import torch

from helpers import assert_refused, call, load_image, photo, save_image, write_recipe
from sparkir import recipe
from sparkir.assemble import gather
from sparkir.distill.methods import methods, published
from sparkir.models.checkpoint import save_weights
from sparkir.models.registry import build
from sparkir.run import train_student

pytest_plugins = ["helpers"]

THEIRS = '''
"""Networks of conventions of their own, each the same function of an image."""

import torch.nn.functional as F
from torch import nn

from sparkir.models.facts import ModelFacts


class Blocks(nn.Module):
    """Works on blocks of 4 x 4 pixels, and cannot take half of one."""

    def __init__(self, value_range):
        super().__init__()
        self.inside = nn.Conv2d(3 * 16, 3 * 16, 3, padding=1)
        self.out = nn.Conv2d(3 * 16, 3 * 64, 1)
        self.facts = ModelFacts(
            name="blocks", scale=2, channels=3, value_range=value_range, size_multiple=4,
            taps=("inside",), halo_px=8,
        )

    def forward(self, x):
        white = self.facts.value_range
        inside = F.relu(self.inside(F.pixel_unshuffle(x, 4) / white) * white)
        return F.pixel_shuffle(self.out(inside / white), 8) * white


class Halved(nn.Module):
    """Works at half the size, so that sides have to be even."""

    def __init__(self, value_range):
        super().__init__()
        self.down = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.up = nn.Conv2d(12, 3 * 16, 3, padding=1)
        self.shuffle = nn.PixelShuffle(4)
        self.facts = ModelFacts(
            name="halved", scale=2, channels=3, value_range=value_range, size_multiple=2,
            taps=("relu",), halo_px=4,
        )

    def forward(self, x):
        return self.shuffle(self.up(self.relu(self.down(x))))


def blocks(value_range=1.0):
    return Blocks(value_range)


def halved(value_range=1.0):
    return Halved(value_range)
'''
RFDN = {"width": 8, "blocks": 1, "scale": 2}


@pytest.fixture
def theirs(project, monkeypatch):
    """The project with networks of the user's own, and weights for them."""
    (project / "their_restorers.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(project))
    torch.manual_seed(3)
    save_weights(build("their_restorers:blocks"), project / "blocks.safetensors", {})
    torch.manual_seed(3)
    save_weights(build("rfdn", **RFDN), project / "rfdn.safetensors", {})
    return project


def teacher_of(model, weights, **options):
    return {"teacher": {"model": model, "weights": weights, "options": options}}


def student_of(model, **options):
    return {"student": {"model": model, "options": options}}


BLOCKS = ("their_restorers:blocks", "blocks.safetensors")
HALVED = student_of("their_restorers:halved")


def steps_of(project, changes, **without):
    """What a short training logs of each step."""
    changes = {"train.steps": 3, "data.patch_px": 17, "distill.norm": "mse"} | changes
    chosen = recipe.load(write_recipe(project / "mixed.toml", changes, **without))
    events = []
    materials = gather(chosen)
    train_student(chosen, materials, project / "training", report=events.append)
    (project / "training" / "last.pt").unlink()
    steps = [event for event in events if event["kind"] == "step"]
    keys = ("loss", "reconstruction", "distillation", "gradient_norm")
    return [[step[key] for key in keys] for step in steps]


@pytest.mark.parametrize("quantized", [False, True])
def test_levels_and_shares_are_the_same_training(theirs, quantized):
    """One function of the image, said in white 1 or 255: the losses and gradients are the same.

    In floating point for both networks; a quantized student has the grids of its own range.
    """
    torch.manual_seed(4)
    save_weights(build("their_restorers:blocks"), theirs / "student.safetensors", {})
    losses = {}
    for teacher, student in [(1.0, 1.0), (255.0, 1.0), (1.0, 255.0), (255.0, 255.0)]:
        changes = teacher_of(*BLOCKS, value_range=teacher)
        if quantized and student == 255.0:
            continue
        changes |= HALVED if quantized else student_of(BLOCKS[0], value_range=student)
        changes |= {} if quantized else {"student.weights": "student.safetensors"}
        without = () if quantized else ("quant",)
        losses[teacher, student] = steps_of(theirs, changes, without=without)
    expected = losses.pop((1.0, 1.0))
    assert expected[0][2] > 1e-3  # there is something to learn from the teacher
    assert expected[0][0] != expected[-1][0]
    for found in losses.values():
        np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.mark.parametrize("name", [m for m in methods() if m not in ("blocks", "dckd")])
def test_every_method_reconciles_them(theirs, name):
    """Range 255 and blocks of 4 on one side, range 1 and even sides on the other, crops of 17."""
    changes = HALVED | teacher_of(*BLOCKS, value_range=255.0)
    changes |= {"distill": published(name), "train.steps": 2}
    assert np.isfinite(steps_of(theirs, changes)).all()


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_a_whole_run_measures_exports_and_restores(theirs, white):
    """W8A8, from either side of the range, on images of odd sizes."""
    other = 256.0 - white
    for number, size in enumerate([(66, 74), (70, 62)]):
        save_image(theirs / "odd" / f"{number}.png", photo(*size, number))
    changes = student_of("their_restorers:halved", value_range=white)
    changes |= teacher_of(*BLOCKS, value_range=other)
    changes |= {"data.test": "odd", "data.patch_px": 17, "train.steps": 2}
    changes |= {"quant": {"weight_bits": 8, "activation_bits": 8}}
    write_recipe(theirs / "mixed.toml", changes)
    said = call("distill", "mixed.toml", "--out", "run")
    assert said.code == 0, said
    rows = json.loads((theirs / "run" / "report.json").read_text())["rows"]
    by_kind = {(row["name"], row["arithmetic"]): row["psnr_db"] for row in rows}
    plain = call(
        *("evaluate", BLOCKS[0], "--weights", BLOCKS[1], "--data", "odd"),
        *("--option", "value_range=1.0"),
    )
    assert f"{by_kind['teacher', 'float']:.3f}" in plain.text
    save_image(theirs / "in.png", photo(33, 35, 5))
    assert call("restore", "run", "in.png", "out.png").code == 0
    assert load_image(theirs / "out.png").shape == (66, 70, 3)


MISTAKES = {
    "x2 teacher, x4 student": (
        student_of("srcnn", scale=4, channels=3) | {"data.scale": 4},
        ["the teacher restores x2, but the data is x4", "teacher.options.scale or data.scale"],
    ),
    "x2 teacher, x2 data, x4 student": (
        student_of("srcnn", scale=4, channels=3),
        ["the student restores x4, but the data is x2", "student.options.scale or data.scale"],
    ),
    "a teacher on enlarged images": (
        teacher_of("dncnn", "dn.safetensors", depth=3, width=4, channels=3),
        ["the teacher restores x1, but the data is x2"],
    ),
    "a grey teacher": (
        student_of("srcnn", scale=2, channels=3)
        | teacher_of("srcnn", "srcnn.safetensors", scale=2, channels=1),
        ["teacher srcnn restores luma", "the student srcnn does not"],
    ),
    "a teacher of larger crops": (
        {"data.patch_px": 12, "student": HALVED["student"]}
        | teacher_of("rfdn", "rfdn.safetensors", **RFDN),
        ["data.patch_px = 12", "the teacher rfdn", "at least 15"],
    ),
    "a student of larger crops": (
        student_of("rfdn", **RFDN) | {"data.patch_px": 12},
        ["data.patch_px = 12", "the student rfdn", "at least 15"],
    ),
    "a student of larger test images": (
        student_of("rfdn", **RFDN) | {"data.test": "small"},
        [
            "test image 0 is too small (14x20 px)",
            "the student rfdn",
            "at least 15",
            "take a larger one",
        ],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_reconciled_is_said_before_training(theirs, mistake):
    save_weights(build("dncnn", depth=3, width=4, channels=3), theirs / "dn.safetensors", {})
    save_weights(build("srcnn", scale=2, channels=1), theirs / "srcnn.safetensors", {})
    changes, says = MISTAKES[mistake]
    save_image(theirs / "small" / "0.png", photo(28, 40, 0))
    usual = HALVED | teacher_of(*BLOCKS)
    write_recipe(theirs / "mixed.toml", usual | changes)
    assert_refused("mixed.toml", says)
