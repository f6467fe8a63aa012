"""The teacher's outputs, computed once: they are right, found again, and never stale."""

import importlib
import linecache
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import sparkir.teacher
from helpers import write_recipe
from sparkir.assemble import gather
from sparkir.data.outputs import loaded
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import device_of, evaluating
from sparkir.models.facts import ModelFacts, facts_of, restore
from sparkir.models.normalize import LayerNorm2d
from sparkir.recipe import load
from sparkir.run import train_student
from sparkir.teacher import teacher_outputs

pytest_plugins = ["helpers"]
CACHED = {"train.teacher_cache": True}


@pytest.fixture
def made(project):
    """A recipe that keeps outputs, its materials, and what was reported."""

    def make(changes=None, **options):
        path = write_recipe(project / "cached.toml", CACHED | (changes or {}), **options)
        recipe = load(path)
        return recipe, gather(recipe), []

    return make


def test_outputs_are_the_teachers_on_whole_images(made):
    recipe, materials, events = made()
    store = teacher_outputs(recipe, materials, events.append)
    assert [event["kind"] for event in events] == ["stage", "teacher", "teacher"]
    assert events[0]["name"].startswith("teacher on 2 images, 0.1 MB")
    for index in range(2):
        lq, _ = materials.train.pair(index)
        batch = torch.from_numpy(lq.copy()).movedim(-1, 0)[None].float() / 255
        batch = batch.to(device_of(materials.teacher))
        with torch.no_grad(), evaluating(materials.teacher):
            expected = restore(materials.teacher, batch)[0].movedim(0, -1).cpu().numpy()
        assert np.abs(loaded(store[index]) - expected).max() < 2e-5


def test_they_are_found_again_and_never_stale(made):
    recipe, materials, events = made()
    first = teacher_outputs(recipe, materials, events.append)
    events.clear()
    assert teacher_outputs(recipe, materials, events.append).folder == first.folder
    assert events == []
    with torch.no_grad():
        next(materials.teacher.parameters()).view(-1)[0] += 1e-3
    assert teacher_outputs(recipe, materials, events.append).folder != first.folder
    other = made({"data.border": "replicate"})
    assert teacher_outputs(other[0], other[1], events.append).folder != first.folder


@pytest.mark.parametrize("changed", ["sparkir.models.edsr", "sparkir.models.normalize"])
def test_other_code_of_the_network_makes_other_outputs(made, monkeypatch, changed):
    """That of a base class in another file too."""
    recipe, materials, events = made()
    own = type("Own", (LayerNorm2d,), {"__module__": __name__})
    materials.teacher.extra = own(4)
    first = teacher_outputs(recipe, materials, events.append)
    read = sparkir.teacher.inspect.getsource

    def source(module):
        return read(module) + ("# changed" if module.__name__ == changed else "")

    monkeypatch.setattr(sparkir.teacher.inspect, "getsource", source)
    assert teacher_outputs(recipe, materials, events.append).folder != first.folder


@pytest.mark.parametrize(
    ("reads", "uses"),
    [
        ("from of_mine.helping import halved", "halved"),
        ("import of_mine.helping as helping", "helping.halved"),
        ("import of_mine.helping", "of_mine.helping.halved"),  # by a file that is empty
        ("from of_mine.between import halved", "halved"),  # which has it from there
        ("from of_mine import between", "between.twice"),  # which calls it
    ],
)
def test_other_code_of_what_the_users_network_calls_makes_other_outputs(
    made, project, monkeypatch, reads, uses
):
    package = project / "of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    helping = package / "helping.py"
    helping.write_text("def halved(x):\n    return x / 2\n")
    twice = "def twice(x):\n    return halved(halved(x))\n"
    (package / "between.py").write_text(f"from of_mine.helping import halved\n\n\n{twice}")
    forward = f"    def forward(self, x):\n        return {uses}(x)\n"
    (package / "network.py").write_text(
        f"from torch import nn\n\n{reads}\n\n\nclass Halves(nn.Module):\n{forward}"
    )
    monkeypatch.syspath_prepend(str(project))
    recipe, materials, events = made()
    materials.teacher.extra = importlib.import_module("of_mine.network").Halves()
    first = teacher_outputs(recipe, materials, events.append)
    helping.write_text("def halved(x):\n    return x / 3\n")
    linecache.checkcache()  # another process would read it anew
    try:
        assert teacher_outputs(recipe, materials, events.append).folder != first.folder
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "of_mine"]:
            del sys.modules[name]


def test_a_network_whose_code_cannot_be_read_runs_at_every_step(made):
    recipe, materials, events = made()
    foreign = type("Foreign", (nn.Identity,), {"__module__": "nowhere"})
    materials.teacher.extra = foreign()
    assert teacher_outputs(recipe, materials, events.append) is None
    assert "source code of its network cannot be read" in events[0]["message"]


def test_degradations_drawn_anew_run_the_teacher_and_say_so_once(made, project):
    changes = {"data.degradation": "noise", "data.scale": 1, "metric": "rgb"}
    network = {"model": "dncnn", "options": {"depth": 3, "width": 4, "channels": 3}}
    changes |= {
        f"{role}.{key}": value for role in ("teacher", "student") for key, value in network.items()
    }
    torch.manual_seed(0)
    from sparkir.models.checkpoint import save_weights
    from sparkir.models.registry import build

    save_weights(build("dncnn", **network["options"]), project / "noise.safetensors", {})
    changes |= {"teacher.weights": str(project / "noise.safetensors"), "train.steps": 2}
    recipe, materials, events = made(changes)
    train_student(recipe, materials, project / "training", report=events.append)
    said = [event["message"] for event in events if event["kind"] == "warning"]
    assert said == ["the teacher runs at every step: degraded images are drawn anew for each crop"]


def test_training_with_them_does_not_run_the_teacher(made, project, monkeypatch):
    recipe, materials, events = made()
    teacher_outputs(recipe, materials, events.append)
    called = []
    materials.teacher.register_forward_hook(lambda *_: called.append(1))
    train_student(recipe, materials, project / "training", report=events.append)
    assert len(called) == 1  # for a look at what it makes of crops
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, 13))


def test_it_is_off_by_default_and_without_distillation(made):
    recipe, materials, events = made()
    off = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"teacher_cache": False})}
    )
    assert teacher_outputs(off, materials, events.append) is None
    alone = recipe.model_copy(update={"distill": None})
    assert teacher_outputs(alone, materials, events.append) is None
    assert events == []


def test_more_than_allowed_is_refused(made):
    recipe, materials, events = made({"train.teacher_cache_gb": 1e-5})
    with pytest.raises(
        SparkirError, match=r"2 training images take 0.1 MB.*teacher_cache_gb = 1e-05"
    ):
        teacher_outputs(recipe, materials, events.append)


def test_methods_that_look_at_features_run_the_teacher_and_say_so(made, project):
    recipe, materials, events = made({"distill.method": "fitnet", "train.steps": 2})
    called = []
    materials.teacher.register_forward_hook(lambda *_: called.append(1))
    train_student(recipe, materials, project / "training", report=events.append)
    assert len(called) >= 2
    said = [event["message"] for event in events if event["kind"] == "warning"]
    assert said == ["the teacher runs at every step: the distillation method looks at its features"]


class LooksAround(nn.Module):
    """Enlarges, and darkens the smaller an image is: as other as one with global pooling may be."""

    def __init__(self, facts: ModelFacts, whole_px: int) -> None:
        super().__init__()
        self.facts, self.whole_px = facts, whole_px

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x.shape[-1] / self.whole_px
        return nn.functional.interpolate(x, scale_factor=self.facts.scale) * seen


def test_a_teacher_that_sees_more_than_a_crop_is_warned_of(made):
    recipe, materials, events = made()
    teacher_outputs(recipe, materials, events.append)
    assert [event for event in events if event["kind"] == "warning"] == []
    whole_px = materials.train.lq_size(0)[1]
    around = replace(materials, teacher=LooksAround(facts_of(materials.teacher), whole_px))
    teacher_outputs(recipe, around, events.append)
    (warning,) = [event["message"] for event in events if event["kind"] == "warning"]
    assert "it looks further than a crop; set train.teacher_cache = false" in warning
