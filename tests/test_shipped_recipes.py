"""Every shipped recipe takes its first step, on tiny images and with a teacher of fresh weights."""

import pytest
import torch

from helpers import call, photo, save_image
from sparkir.assemble import convention_of, gather
from sparkir.data.catalog import CATALOG
from sparkir.errors import SparkirError
from sparkir.models.checkpoint import save_weights
from sparkir.models.registry import build
from sparkir.recipe import changed, load, shipped
from sparkir.run import train_student

pytest_plugins = ["helpers"]

SHRUNK = {
    "dncnn": {"depth": 4, "width": 8},
    "edsr-baseline": {"width": 8},
    "mirnet": {"width": 8, "groups": 1, "blocks": 1},
    "nafnet": {
        "width": 8,
        "encoder_blocks": "[1]",
        "middle_blocks": 1,
        "decoder_blocks": "[1]",
    },
    "rfdn": {"width": 8, "blocks": 1},
    "swinir": {"width": 8, "depths": "[2]", "heads": 2},
}
"""Small ones are enough to see a recipe start."""
TASKS = {
    "sr-x2": "PSNR-Y studio range, uint8, crop 2 px",
    "sr-x3": "PSNR-Y studio range, uint8, crop 3 px",
    "sr-x4": "PSNR-Y studio range, uint8, crop 4 px",
    "denoise-color-25": "PSNR-RGB, uint8, no crop",
    "denoise-color-blind": "PSNR-RGB, uint8, no crop",
    "denoise-grey-25": "PSNR-grey, uint8, no crop",
    "denoise-grey-blind": "PSNR-grey, uint8, no crop",
    "jpeg": "PSNR-RGB, uint8, no crop",
    "denoise-real": "PSNR-RGB, uint8, no crop",
    "denoise-real-nafnet": "PSNR-RGB, uint8, no crop",
    "sr-x2-swinir": "PSNR-Y studio range, uint8, crop 2 px",
    "lowlight": "PSNR-RGB, uint8, no crop",
    "derain": "PSNR-Y studio range, uint8, no crop",
    "deblur": "PSNR-RGB, uint8, no crop",
}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Clean images, and pairs, to train and test on; the current folder."""
    monkeypatch.setenv("SPARKIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, split in enumerate(("train", "test")):
        for name in ("clean/a", "pairs/input/a", "pairs/target/a"):
            save_image(tmp_path / split / f"{name}.png", photo(64, 72, seed))
    return tmp_path


def started(name, folder):
    """The recipe, made small enough to take one step."""
    recipe = load(name)
    kind = "pairs" if recipe.data.degradation == "pairs" else "clean"
    overrides = [f"data.{split}={folder / split / kind}" for split in ("train", "test")]
    overrides += ["data.patch_px=16", "data.batch=2", "train.calibration_images=8"]
    overrides += ["train.steps=1", "train.float_steps=0"]
    if recipe.quant is not None:
        overrides.append("quant.calibration=minmax")  # twice as fast for a MIRNet
    if recipe.student.weights == "teacher" and recipe.teacher.weights.startswith("package:"):
        return load(name, overrides)
    for role in ("teacher", "student"):
        network = getattr(recipe, role)
        for option, value in SHRUNK.get(network.model if network else "", {}).items():
            overrides.append(f"{role}.options.{option}={value}")
    if recipe.teacher is not None:
        overrides.append("teacher.weights=teacher.safetensors")
    if recipe.student.weights.startswith("runs/"):
        overrides.append("student.weights=student.safetensors")
    small = load(name, overrides)
    torch.manual_seed(0)
    for role in ("teacher", "student"):
        network = getattr(small, role)
        if network is not None and network.weights == f"{role}.safetensors":
            made = build(network.model, **network.options)
            save_weights(made, folder / network.weights, {})
    return small


@pytest.mark.parametrize("name", shipped())
def test_takes_a_step(images, name):
    recipe = started(name, images)
    trained = train_student(recipe, gather(recipe), images / "run")
    assert (images / "run" / "last.pt").is_file()
    assert all(p.isfinite().all() for p in trained.student.parameters())


def test_defaults_that_are_not_for_spark_are_warned_of(images):
    def warnings(recipe):
        said = []
        gather(recipe, said.append)
        messages = [event["message"] for event in said if event["kind"] == "warning"]
        return [message for message in messages if "weighting spark" in message]

    recipe = started("sr-x2", images)
    assert not warnings(recipe)
    (alone,) = warnings(changed(recipe, distill={"norm": "matched"}))
    assert "to nobody" in alone
    (weak,) = warnings(changed(recipe, distill={"target": "both"}))
    assert "next to nothing" in weak


@pytest.mark.parametrize("name", TASKS)
def test_is_measured_as_its_community_does(name):
    recipe = load(name)
    assert convention_of(recipe).label == TASKS[name]
    assert recipe.quant is not None
    assert {"degraded", "teacher"} <= set(recipe.baselines)


@pytest.mark.parametrize("name", shipped())
def test_names_sets_that_are_known(name):
    data, known = load(name).data, {known.name for known in CATALOG}
    for where in (data.train, data.test):
        assert where in known or where.startswith("photographs:") or where == "CID22"
    assert data.train != data.test or data.degradation == "pairs"  # parts of one set


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith(("teacher-", "float-"))])
def test_a_float_network_is_made_for_another_recipe(name):
    """The file that the first of two commands writes is the one that the second reads."""
    made, file = load(name), f"runs/{name}/student.safetensors"
    assert made.quant is None
    assert made.distill is None
    role = "teacher" if name.startswith("teacher-") else "student"
    users = [user for user in map(load, shipped()) if getattr(user, role) is not None]
    fitting = [user for user in users if getattr(user, role).weights == file]
    assert fitting or name == "teacher-rfdn-x2"  # that one ships inside the package
    for user in fitting:
        reader = getattr(user, role)
        assert (reader.model, reader.options) == (made.student.model, made.student.options)
        assert user.data.scale == made.data.scale


def test_two_commands_in_sequence(images, monkeypatch):
    (images / "DIV2K").symlink_to(images / "train" / "clean")
    (images / "Set5").symlink_to(images / "test" / "clean")
    small = ["data.patch_px=16", "data.batch=2", "train.steps=1", "train.calibration_images=8"]
    options = [part for override in small for part in ("--set", override)]
    for name in ("teacher-sr-x2", "sr-x2"):
        for role in ("teacher", "student"):
            if name == "sr-x2" or role == "student":
                options += ["--set", f"{role}.options.width=8", "--set", f"{role}.options.blocks=1"]
        said = call("distill", name, *options)
        assert said.code == 0, said
    assert (images / "runs/sr-x2/student.onnx").is_file()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "sr-x2",
            ["for the teacher at runs/teacher-sr-x2/student.safetensors", "distill teacher-sr-x2`"],
        ),
        ("sr-x4", ["the teacher has no weights", "--teacher FILE"]),
        ("teacher-sr-x2", ["no folder DIV2K here", "https://data.vision.ee.ethz.ch", "--data DIR"]),
    ],
)
def test_what_is_not_here_is_said(images, name, says):
    with pytest.raises(SparkirError) as caught:
        gather(load(name))
    for words in says:
        assert words in str(caught.value)
