"""The smaller commands' parts: what a name opens, how it is measured, which files are made."""

import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import IN_FLOAT, call, photo, save_image, write_recipe
from sparkir import assemble, recipe
from sparkir.assemble import convention, silent, weighting_of
from sparkir.data.pairs import PatchSampler
from sparkir.deploy.runtime import RuntimeNetwork
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import evaluate, mean
from sparkir.evaluate.infer import restore_image
from sparkir.measure import parity_images, training_restorer
from sparkir.models.checkpoint import save_weights
from sparkir.models.facts import ModelFacts, facts_of
from sparkir.models.registry import build
from sparkir.quant.arithmetic import rounds_exactly
from sparkir.quant.reference import freeze
from sparkir.recipe import WeightingChoice
from sparkir.restore.engine import Engine
from sparkir.spark.weighting import Confidence, SparkPaper, options_of, weightings
from sparkir.tools import Opened, evaluation_setup, open_model, restorer_of

pytest_plugins = ["helpers"]

OPTIONS = {"width": 8, "blocks": 1, "scale": 2}


@pytest.fixture
def edsr(project: Path) -> Opened:
    return open_model("edsr", project / "teacher.safetensors", OPTIONS)


# What a name opens ----------------------------------------------------------------------------


def test_a_networks_name(project, edsr):
    assert edsr.label == f"edsr with {project / 'teacher.safetensors'}"
    assert edsr.recipe is None
    assert not edsr.network.training


def test_a_networks_name_beats_a_folder_of_that_name(project):
    (project / "edsr").mkdir()
    assert open_model("edsr", project / "teacher.safetensors", OPTIONS).recipe is None
    with pytest.raises(SparkirError, match="edsr is no run folder"):
        open_model("./edsr/")


def test_a_run_folder_opens_what_was_exported_and_knows_its_recipe(finished):
    opened = open_model(str(finished.folder))
    assert isinstance(opened.network, RuntimeNetwork)
    assert opened.recipe == recipe.load(finished.folder / "recipe.toml")


def test_a_run_folder_with_a_dot_in_its_name(finished, project):
    shutil.copytree(finished.folder, project / "run.v2")
    assert isinstance(open_model("run.v2").network, RuntimeNetwork)


def test_a_run_without_an_export_opens_the_integer_network(finished, project):
    shutil.copytree(finished.folder, project / "run")
    (project / "run/student.onnx").unlink()
    opened = open_model("run")
    assert not isinstance(opened.network, RuntimeNetwork)
    image = torch.rand(1, 3, 20, 24) * 255
    assert torch.equal(opened.network(image), finished.frozen(image))
    assert opened.recipe == recipe.load(finished.folder / "recipe.toml")


def test_an_external_network(project, monkeypatch):
    (project / "mine.py").write_text(
        "from sparkir.models.registry import build\n"
        "def make():\n    return build('edsr', width=8, blocks=1, scale=2)\n"
    )
    monkeypatch.syspath_prepend(project)
    opened = open_model("mine:make", project / "teacher.safetensors")
    assert facts_of(opened.network).scale == 2


# How it is measured ---------------------------------------------------------------------------


def opened_with(scale: int, made: recipe.Recipe | None = None) -> Opened:
    network = nn.Upsample(scale_factor=scale) if scale > 1 else nn.Identity()
    network.facts = ModelFacts(  # type: ignore[assignment]
        name="x", scale=scale, channels=3, value_range=1.0, taps=(), halo_px=0
    )
    return Opened(network=network, label="x", recipe=made)


@pytest.mark.parametrize(
    ("scale", "metric", "label"),
    [
        (2, None, "PSNR-Y studio range, uint8, crop 2 px"),
        (2, "rgb", "PSNR-RGB, uint8, no crop"),
        (4, None, "PSNR-Y studio range, uint8, crop 4 px"),
        (1, None, "PSNR-RGB, uint8, no crop"),
        (1, "y", "PSNR-Y studio range, uint8, no crop"),  # deraining: no border is left out
    ],
)
def test_the_convention_without_a_recipe(project, scale, metric, label):
    if scale == 1:
        for name in ("input", "target"):
            save_image(project / "test" / name / "e.png", photo(20, 20, 1))
    pairs, found = evaluation_setup(opened_with(scale), "test", metric, silent)
    assert found.label == label
    assert pairs.scale == scale


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.sigma=50", "data.sigma is of the training images here; .* data.test_sigma=25.0, so"),
        ("data.quality=5", 'data.quality is for data.degradation = "jpeg"; leave it out'),
    ],
)
def test_an_override_that_changes_nothing_is_refused(project, override, says):
    changes = {"data.degradation": "noise", "data.sigma": [0.0, 55.0], "data.test_sigma": 25.0}
    write_recipe(project / "noise.toml", changes | {"data.scale": 1}, without=IN_FLOAT)
    opened = opened_with(1, recipe.load("noise.toml"))
    with pytest.raises(SparkirError, match=says):
        evaluation_setup(opened, "test", None, silent, [override])


def test_a_grey_network_is_not_measured_on_coloured_noise(project):
    opened = Opened(network=build("dncnn", depth=3, width=8), label="grey")
    noise = ["data.degradation=noise"]
    with pytest.raises(SparkirError, match=r"restores grey images, .*set data.channels = 1"):
        evaluation_setup(opened, "test", None, silent, noise)
    found, _ = evaluation_setup(opened, "test", None, silent, [*noise, "data.channels=1"])
    assert found.inputs == "noise of sigma 25, grey"


def test_the_recipes_data_and_metric_are_used(project):
    changes = {"data.degradation": "jpeg", "data.quality": 10, "data.scale": 1, "metric": "rgb"}
    write_recipe(project / "jpeg.toml", changes, without=IN_FLOAT)
    opened = opened_with(1, recipe.load("jpeg.toml"))
    pairs, found = evaluation_setup(opened, "test", None, silent)
    assert found.label == "PSNR-RGB, uint8, no crop"
    lq, gt = pairs.pair(0)
    assert 0 < np.abs(lq.astype(int) - gt).mean() < 30
    scores = evaluate(opened.network, pairs, found)
    assert 15 < mean(scores).psnr_db < 40  # a pair of equal images would be infinite


def test_a_folder_of_pairs_is_taken_as_pairs_whatever_the_recipe(project):
    clean = photo(40, 48, 3)
    save_image(project / "pairs/target/e.png", clean)
    save_image(project / "pairs/input/e.png", clean[::2, ::2])
    for made in (None, recipe.load("tiny.toml")):
        pairs, _ = evaluation_setup(opened_with(2, made), "pairs", None, silent)
        assert np.array_equal(pairs.pair(0)[0], clean[::2, ::2])


@pytest.mark.parametrize(
    ("space", "scale", "crop_px"), [("y", 1, 0), ("y", 3, 3), ("rgb", 3, 0), ("rgb", 1, 0)]
)
def test_convention(space, scale, crop_px):
    made = convention(space, scale)
    assert (made.space, made.crop_px) == (space, crop_px)


def test_an_exported_file_is_measured_as_its_card_says(finished, project):
    """Wherever it lies, without the run's folder."""
    shutil.copy(finished.folder / "student.onnx", project / "alone.ONNX")
    opened = open_model(str(project / "alone.ONNX"))
    assert opened.recipe == recipe.load(finished.folder / "recipe.toml")


def test_parity_is_checked_on_images_that_are_large_enough(project):
    frozen = _frozen(multiple=16)
    for name, side in (("a", 6), ("b", 20), ("c", 40)):
        save_image(project / f"small/target/{name}.png", photo(2 * side, 2 * side, side))
        save_image(project / f"small/input/{name}.png", photo(side, side, side))
    pairs = assemble.open_pairs(
        recipe.load("tiny.toml").data.as_pairs(), str(project / "small"), silent
    )
    assert [tuple(image.shape[-2:]) for image in parity_images(pairs, frozen)] == [
        (32, 32),
        (48, 48),
    ]
    for name in "bc":
        for side in ("input", "target"):
            (project / f"small/{side}/{name}.png").unlink()
    pairs = assemble.open_pairs(
        recipe.load("tiny.toml").data.as_pairs(), str(project / "small"), silent
    )
    with pytest.raises(SparkirError, match="none of these is large enough for it; give others"):
        parity_images(pairs, frozen)


def _frozen(*, multiple):
    """The project's student, which wants sizes of this multiple."""
    made = recipe.load("tiny.toml")
    materials = assemble.gather(made)
    materials.student.facts = replace(materials.student.facts, size_multiple=multiple)
    return freeze(assemble.quantize_student(materials.student, made.quant, materials.crops))


def test_one_picture_that_a_network_fails_at_does_not_end_the_others(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "theirs", types.SimpleNamespace(halving=halving))
    for name, side in (("a", 32), ("b", 5), ("c", 40)):
        save_image(project / f"mix/{name}.png", photo(side, side, 1))
    said = call("restore", "theirs:halving", project / "mix", project / "made")
    assert said.code == 1
    assert sorted(path.name for path in (project / "made").glob("*.png")) == ["a.png", "c.png"]
    assert "left out: " in said.err
    assert "theirs:halving cannot compute an input of (1, 3, 5, 5)" in said.err


def halving():
    """A network whose facts forgot that it needs an even size."""
    network = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 12, 1), nn.PixelShuffle(2))
    network.facts = ModelFacts(
        name="halving", scale=1, channels=3, value_range=1.0, taps=(), halo_px=2, tile_phase_px=2
    )
    return network


# What restores --------------------------------------------------------------------------------


def test_a_torch_network_restores_as_it_is_measured(project, edsr):
    """The tiler's numpy path against the torch one."""
    image = photo(37, 50, 3)
    assert np.array_equal(Engine(restorer_of(edsr))(image), restore_image(edsr.network, image))


def test_a_network_is_known_by_what_it_computes(project, edsr):
    same = open_model("edsr", project / "teacher.safetensors", OPTIONS)
    weaker = open_model("edsr", project / "teacher.safetensors", OPTIONS | {"res_scale": 0.5})
    assert restorer_of(same).identity == restorer_of(edsr).identity
    assert restorer_of(weaker).identity != restorer_of(edsr).identity
    with torch.no_grad():
        same.network.tail[1].bias[0] += 1e-3
    assert restorer_of(same).identity != restorer_of(edsr).identity


class Shifted(nn.Module):
    """A network with numbers that its state_dict does not have."""

    def __init__(self, mean: float = 0.5, curve: float = 1.0, table: float = 1.0):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)
        self.register_buffer("mean", torch.tensor([mean]), persistent=False)
        self.settings = {"curve": [curve]}
        self.table = torch.tensor([table])
        self.facts = ModelFacts(
            name="shifted", scale=1, channels=3, value_range=1.0, taps=(), halo_px=0
        )

    def forward(self, x):
        return self.inner(x - self.mean) * self.settings["curve"][0] * self.table


def test_nor_are_two_networks_the_same_because_their_weights_are():
    def identity(**numbers: float) -> str:
        torch.manual_seed(0)
        return assemble.network_hash(Shifted(**numbers))

    assert identity() == identity()
    assert len({identity(), identity(mean=0.25), identity(curve=2.0), identity(table=2.0)}) == 4


# From words to objects ------------------------------------------------------------------------


@pytest.mark.parametrize("name", weightings())
def test_every_weighting_names_its_options(name):
    with pytest.raises(SparkirError) as caught:
        weighting_of(WeightingChoice(name=name, options={"nonsense": 1}))
    text = str(caught.value)
    assert f"weighting {name!r} has no option 'nonsense'" in text
    known = text.partition("may hold: ")[2].split(", ")
    assert known == (list(options_of(name)) or ["nothing"])
    for option in options_of(name):
        value = 4 if option in ("grid", "reward_every") else 0.5
        weighting_of(WeightingChoice(name=name, options={option: value}))


def test_weighting_options_arrive():
    made = weighting_of(WeightingChoice(name="spark-paper", options={"grid": 4, "alpha": 0.5}))
    assert isinstance(made, SparkPaper)
    assert (made.grid, made.alpha) == (4, 0.5)
    assert isinstance(weighting_of(WeightingChoice(name="confidence")), Confidence)


@pytest.mark.parametrize("space", ["train", "test"])
def test_where_the_cache_is(space, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARKIR_CACHE", str(tmp_path / space))
    assert assemble.cache_folder() == tmp_path / space
    monkeypatch.delenv("SPARKIR_CACHE")
    assert assemble.cache_folder() == Path.home() / ".cache" / "sparkir"


def test_a_home_folder_is_found(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    written = ["data.train=~/train", "data.test=~/test", "teacher.weights=~/teacher.safetensors"]
    materials = assemble.gather(recipe.load("tiny.toml", written))
    assert (len(materials.train), len(materials.test)) == (2, 2)


def test_one_seed_one_student(project):
    made = recipe.load("tiny.toml", ["student.weights="])
    one, two = (assemble.build_student(made, None) for _ in range(2))
    other = assemble.build_student(made.model_copy(update={"seed": 1}), None)
    assert torch.equal(one.head[0].weight, two.head[0].weight)
    assert not torch.equal(one.head[0].weight, other.head[0].weight)


def test_a_student_starts_as_its_teacher(project):
    materials = assemble.gather(recipe.load("tiny.toml"))
    assert materials.teacher is not None
    own, teachers = materials.student.state_dict(), materials.teacher.state_dict()
    assert all(torch.equal(own[name], teachers[name]) for name in teachers)
    assert own["head.0.weight"].data_ptr() != teachers["head.0.weight"].data_ptr()


def test_calibration_crops_are_not_the_training_crops(project):
    """They have the recipe's size and number, and a seed of their own."""
    made = recipe.load("tiny.toml", ["train.calibration_images=20"])
    materials = assemble.gather(made)
    crops = materials.crops
    assert [tuple(crop.shape) for crop in crops] == [(8, 3, 16, 16)] * 3
    assert all(0 <= float(crop.min()) < float(crop.max()) <= 1 for crop in crops)
    assert not torch.equal(crops[0], crops[1])
    trained = PatchSampler(materials.train, patch_px=16, batch=8, seed=made.seed).next()[0]
    assert not torch.equal(crops[0], trained.float() / 255)


def test_a_grey_network_cannot_be_trained_on_colour(project):
    changes = {
        "data.scale": 1,
        "data.degradation": "noise",
        "student.model": "dncnn",
        "student.options": {"depth": 3, "width": 8},
    }
    write_recipe(project / "grey.toml", changes, without=IN_FLOAT)
    with pytest.raises(SparkirError, match=r"restores grey images, .*set data.channels = 1"):
        assemble.gather(recipe.load("grey.toml"))


def frozen_conv(facts):
    network = nn.Conv2d(3, 3, 1).requires_grad_(False)
    network.facts = ModelFacts(**facts)
    return network


OWN = {"name": "own", "scale": 1, "channels": 3, "value_range": 1.0, "taps": (), "halo_px": 0}


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (OWN, "the student own has no parameter to train"),
        (OWN | {"channels": 1}, "own cannot compute an image .1, 1, 24, 24., which by its facts"),
    ],
)
def test_a_students_function_that_gives_what_cannot_be_trained(project, facts, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "theirs", types.SimpleNamespace(frozen_conv=frozen_conv))
    student = {"model": "theirs:frozen_conv", "options": {"facts": facts}, "weights": ""}
    changes = {"data.scale": 1, "data.degradation": "noise", "student": student, "metric": "rgb"}
    write_recipe(project / "own.toml", changes, without=IN_FLOAT)
    with pytest.raises(SparkirError, match=says):
        assemble.gather(recipe.load("own.toml"))


def test_images_that_are_tested_and_trained_on(project):
    events = []
    shutil.copy(project / "test" / "c.png", project / "train" / "c.png")
    assemble.gather(recipe.load("tiny.toml"), events.append)
    assert not [event for event in events if event["kind"] == "warning"]  # another file
    (project / "train" / "c.png").unlink()
    (project / "train" / "c.png").symlink_to(project / "test" / "c.png")
    assemble.gather(recipe.load("tiny.toml"), events.append)
    (warning,) = [event["message"] for event in events if event["kind"] == "warning"]
    assert warning.startswith("1 of the 2 test images are trained on, ")


def test_a_saved_student_comes_back_in_the_same_state(project):
    made = recipe.load("tiny.toml")
    materials = assemble.gather(made)
    assert made.quant is not None
    prepared = assemble.quantize_student(materials.student, made.quant, materials.crops)
    assemble.save_student(made, prepared, project / "s.safetensors")
    loaded, again = assemble.load_student(project / "s.safetensors")
    assert again == made
    image = torch.rand(1, 3, 16, 16) * 255
    assert torch.equal(loaded(image), prepared.eval()(image))


def test_the_training_row_rounds_as_training_did(project):
    seen = []

    class Asks(nn.Module):
        facts = ModelFacts(name="asks", scale=1, channels=3, value_range=1.0, taps=(), halo_px=0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(rounds_exactly())
            return x

    image = photo(16, 16, 0)
    assert np.array_equal(training_restorer(Asks())(image), image)
    assert np.array_equal(restore_image(Asks(), image), image)
    assert seen == [False, True]


def test_weights_of_a_network_are_no_student(project):
    save_weights(build("edsr", **OPTIONS), project / "w.safetensors", {"made by": "another"})
    with pytest.raises(SparkirError, match="holds weights, but not how to build their network"):
        assemble.load_student(project / "w.safetensors")
