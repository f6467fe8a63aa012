"""The commands as a user meets them: what they say, and what a mistake costs (one line)."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import onnx
import pytest
import torch

import sparkir.export
import sparkir.run
import sparkir.tools
import sparkir.train.state
from helpers import (
    IN_FLOAT,
    Finished,
    Said,
    call,
    contents,
    load_image,
    photo,
    save_image,
    write_recipe,
)
from sparkir import cli, recipe
from sparkir.data.atomic import atomic_file
from sparkir.deploy import contenders
from sparkir.errors import SparkirError
from sparkir.models.checkpoint import read_metadata, read_weights, save_weights
from sparkir.models.registry import available, build
from sparkir.report.progress import CellDisplay

pytest_plugins = ["helpers"]

TO_RUN = ("distill", "tiny.toml", "--out", "run")


@pytest.fixture
def refused(project: Path) -> Callable[..., Said]:
    """Runs a command that must fail with one line that holds `says`, and change no file."""

    def run(*arguments: object, says: list[str]) -> Said:
        before = contents(project)
        said = call(*arguments)
        assert said.code == 1, said
        lines = [line for line in said.err.splitlines() if not line.startswith("warning:")]
        assert len(lines) == 1, said.err
        assert lines[0].startswith("error: "), said.err
        for words in says:
            assert words in lines[0], f"{words!r} is not in {lines[0]!r}"
        assert contents(project) == before
        return said

    return run


# Recipes --------------------------------------------------------------------------------------

OVERRIDES = {
    "missing folder": ("data.train=nowhere", ["cannot list nowhere", "give a folder of images"]),
    "file for a folder": ("data.test=tiny.toml", ["cannot list tiny.toml", "Not a directory"]),
    "unknown network": ("student.model=edrs", ["'edrs'", "did you mean 'edsr'?"]),
    "unknown network option": (
        "student.options.widht=8",
        ["'edsr' has no option 'widht'", "it has: scale, width"],
    ),
    "network option out of range": ("student.options.width=0", ["'width'", ">= 1, got 0"]),
    "unknown key": ("sed=1", ["unknown key 'sed'", "did you mean 'seed'?"]),
    "unknown key in a section": ("train.step=1", ["'train.step'", "did you mean 'train.steps'?"]),
    "unknown key in quant": ("quant.weight_bit=4", ["did you mean 'quant.weight_bits'?"]),
    "unknown key in student": ("student.weight=x", ["did you mean 'student.weights'?"]),
    "wrong type": ("train.steps=many", ["train.steps = 'many'", "valid integer"]),
    "out of range": ("train.steps=0", ["train.steps = 0", "greater than or equal to 1"]),
    "not one of the choices": ("metric=lpips", ["metric = 'lpips'", "'y', 'rgb' or 'grey'"]),
    "a section that is a value": ("train.steps.more=1", ["steps holds a value, not a section"]),
    "unknown weighting": ("weighting.name=sparc-paper", ["did you mean 'spark-paper'?"]),
    "unknown weighting option": (
        "weighting.options.gird=4",
        ["'spark-paper' has no option 'gird'", "grid, sigma"],
    ),
    "weighting option below one": (
        "weighting.options.reward_every=0",
        ["weighting.options = ", "reward_every = 0: give a whole number >= 1"],
    ),
    "weighting option that is no whole number": (
        "weighting.options.grid=2.5",
        ["weighting.options = ", "grid = 2.5: give a whole number >= 1"],
    ),
    "weighting option out of range": (
        "weighting.options.sigma=-0.5",
        ["'sigma': -0.5", "do not fit 'spark-paper'"],
    ),
    "bits out of range": ("quant.weight_bits=9", ["weight_bits is 9", "from 2 to 8"]),
    "malformed override": ("train.steps", ["--set 'train.steps'", "key=value"]),
    "patch larger than an image": (
        "data.patch_px=48",
        ["image a is 36x32 px", "patch of 48 px", "make the patch smaller or remove the image"],
    ),
    "scale of the network": (
        "data.scale=3",
        ["the teacher restores x2, but the data is x3", "teacher.options.scale or data.scale"],
    ),
    "scale of a degradation that has none": (
        "data.degradation=noise",
        ["noise keeps the size", "leave out data.scale"],
    ),
    "weights of another size for the student": (
        "student.options.width=4",
        ['student.weights = "teacher"', "architecture and options", "head.0.weight"],
    ),
    "network that cannot be imported": (
        "student.model=nobodys_networks:make",
        ["cannot import 'nobodys_networks'", "PYTHONPATH"],
    ),
    "function that is not there": ("student.model=math:make", ["'math' has no function 'make'"]),
    "unknown shipped weights": ("teacher.weights=package:rfdn", ["no weights 'rfdn'", "known: "]),
    "teacher without weights": (
        "teacher.weights=",
        ["the teacher has no weights", "--teacher FILE"],
    ),
    "no GPU": ("train.device=cuda", ['train.device = "cuda"', '"auto" or "cpu"']),
}


@pytest.mark.parametrize("mistake", OVERRIDES)
def test_a_mistake_in_the_recipe(refused, mistake):
    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    override, says = OVERRIDES[mistake]
    refused(*TO_RUN, "--set", override, says=says)


@pytest.mark.parametrize("command", ["check", "distill"])
def test_unknown_recipe(refused, command):
    refused(command, "dmo", says=["no recipe file dmo", "did you mean 'demo'?"])


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        ("w9a4", ["weight_bits is 9", "from 2 to 8"]),
        ("w4a1", ["activation_bits is 1", "from 2 to 8"]),
        ("int4", ["--bits 'int4'", "as in w4a4"]),
        ("4", ["--bits '4'", "as in w4a4"]),
    ],
)
def test_bits(refused, bits, says):
    refused(*TO_RUN, "--bits", bits, says=says)


def test_broken_toml(refused, project):
    (project / "tiny.toml").write_text('name = "tiny\n')
    refused(*TO_RUN, says=["tiny.toml is not valid TOML", "line 1"])


def test_a_recipe_that_is_no_text(refused, project):
    (project / "tiny.toml").write_bytes(b"\xff\xfe\x00")
    refused(*TO_RUN, says=["cannot read the recipe tiny.toml"])


@pytest.mark.parametrize(
    ("without", "says"),
    [
        (["train"], ["tiny.toml: train is missing"]),
        (["name"], ["tiny.toml: name is missing"]),
        (["teacher"], ["distill needs a [teacher]", "or remove [distill]"]),
        (["distill"], ["[weighting] weights a distillation", "add [distill]"]),
        (["teacher", "distill", "weighting"], ['the baseline "teacher" needs a [teacher]']),
    ],
)
def test_a_missing_section(refused, project, without, says):
    write_recipe(project / "tiny.toml", without=without)
    refused(*TO_RUN, says=says)


def test_weights_of_a_teacher_that_is_not_there(refused, project):
    write_recipe(project / "tiny.toml", {"student.weights": "teacher"}, without=IN_FLOAT)
    refused(*TO_RUN, says=['student.weights = "teacher" needs a [teacher]'])


def test_a_learning_rate_that_diverges(refused, project):
    write_recipe(project / "tiny.toml", {"train.learning_rate": 1e25}, without=["quant"])
    says = ["the reward is", "at step 0", "nothing was saved", "a lower train.learning_rate"]
    refused(*TO_RUN, says=says)


def test_two_mistakes_are_both_named_on_one_line(refused):
    refused(*TO_RUN, "--set", "sed=1", "--set", "train.step=1", says=["'sed'", "'train.step'"])


# Images ---------------------------------------------------------------------------------------


def test_empty_folder(refused, project):
    (project / "empty").mkdir()
    refused(*TO_RUN, "--data", "empty", says=["no images in empty", "png jpg"])


@pytest.fixture
def broken_image(project: Path) -> Path:
    path = project / "train" / "bad.png"
    path.write_bytes((project / "train" / "a.png").read_bytes()[:500])
    return path


def test_an_unreadable_image_stops_the_run(refused, broken_image):
    refused(
        *TO_RUN,
        says=["cannot read image", "train/bad.png", "data.skip_broken = true"],
    )


def test_an_unreadable_image_can_be_skipped_with_a_warning(project, broken_image):
    said = call("check", "tiny.toml", "--set", "data.skip_broken=true")
    assert said.code == 0, said
    warnings = [line for line in said.err.splitlines() if line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: cannot read image")
    assert "train/bad.png" in warnings[0]
    assert "training images: 2, test images: 2" in said.out


def test_only_unreadable_images(refused, project):
    for path in (project / "train").iterdir():
        path.write_bytes(b"no image")
    refused(
        *TO_RUN,
        "--set",
        "data.skip_broken=true",
        says=["not one of 2 images could be read", "train/a.png"],
    )


@pytest.fixture
def paired(project: Path) -> Path:
    """A recipe for pairs of equal size, and its images."""
    for seed, name in enumerate(["train/input/a", "train/target/a", "test/input/c"]):
        save_image(project / "pairs" / f"{name}.png", photo(40, 48, seed))
    save_image(project / "pairs" / "test" / "target" / "c.png", photo(40, 48, 9))
    changes = {
        "metric": "rgb",
        "data.train": "pairs/train",
        "data.test": "pairs/test",
        "data.degradation": "pairs",
        "data.scale": 1,
        "student.model": "dncnn",
        "student.options": {"depth": 3, "width": 8, "channels": 3},
        "student.weights": "",
    }
    write_recipe(project / "tiny.toml", changes, without=IN_FLOAT)
    return project / "pairs"


def test_a_pair_without_its_partner(refused, paired):
    save_image(paired / "train/input/lonely.png", photo(40, 48, 5))
    refused(*TO_RUN, says=["train/input/lonely.png has no partner", "pairs/train/target", "1 of 2"])


def test_a_pair_of_different_sizes(refused, paired):
    save_image(paired / "test/target/c.png", photo(40, 44, 5))
    refused(*TO_RUN, says=["pair c: input is 48x40 px, target 44x40 px", "exactly 1 times"])


def test_pairs_that_are_not_in_the_two_folders(refused, paired):
    refused(*TO_RUN, "--data", "train", says=["no pairs in train", "train/input", "train/target"])


def test_a_test_image_too_small_to_measure_is_found_before_training(refused, project):
    save_image(project / "test" / "small.png", photo(14, 40, 5))
    refused(*TO_RUN, says=["test image small", "at least 11 x 11 px", "remove it"])


# Checkpoints ----------------------------------------------------------------------------------


def test_weights_of_another_network(refused, project):
    save_weights(build("dncnn", depth=3, width=8), project / "other.safetensors", {})
    refused(
        *TO_RUN,
        "--teacher",
        "other.safetensors",
        says=["other.safetensors are not of this network", "missing: head.0", "unexpected: model"],
    )


def test_weights_that_are_no_checkpoint(refused, project):
    (project / "notes.pth").write_text("to do: train")
    refused(*TO_RUN, "--teacher", "notes.pth", says=["cannot read weights from notes.pth"])


def test_damaged_weights(refused, project):
    path = project / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(*TO_RUN, says=["cannot read weights from teacher.safetensors", "complete?"])


def test_missing_weights(refused):
    refused(*TO_RUN, "--teacher", "gone.pth", says=["no weights at gone.pth", "check the path"])


class _WritesMarker:
    """Unpickling it makes a file: the harm that a published checkpoint could do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def test_weights_with_code_inside_are_not_executed(refused, project, tmp_path):
    marker = tmp_path / "executed"
    torch.save({"params": _WritesMarker(marker)}, project / "harm.pth")
    (project / "harm.pt").write_bytes(pickle.dumps(_WritesMarker(marker), protocol=2))
    for name in ("harm.pth", "harm.pt"):
        refused(*TO_RUN, "--teacher", name, says=[name, "could run code", "state_dict()"])
    assert not marker.exists()
    torch.load(project / "harm.pth", weights_only=False)
    assert marker.exists(), "the file is harmless, so this test shows nothing"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refused, project, value):
    state = read_weights(project / "teacher.safetensors")
    state["body.1.bias"][0] = value
    save_weights(state, project / "diverged.safetensors", {})
    refused(
        *TO_RUN,
        "--teacher",
        "diverged.safetensors",
        says=["diverged.safetensors: body.1.bias holds NaN or infinite", "earlier checkpoint"],
    )


# The user's own networks ----------------------------------------------------------------------

MODULE = """
import torch
from torch import nn
from sparkir.models.facts import ModelFacts

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 12, 3, padding=1)
        self.facts = ModelFacts(
            name="two", scale=2, channels=3, value_range=1.0, taps=(), halo_px=1
        )

    def forward(self, x):
        y = nn.functional.pixel_shuffle(self.layer(x), 2)
        return y, x

class Small(Two):
    def forward(self, x):
        return self.layer(x)

def bare():
    return nn.Conv2d(3, 3, 3, padding=1)

def nothing():
    return None
"""


@pytest.fixture
def own_networks(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of networks with mistakes in them."""
    name = f"own_networks_{os.getpid()}"
    (project / "code").mkdir()
    (project / "code" / f"{name}.py").write_text(MODULE)
    (project / "code" / f"{name}_broken.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(project / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    changes = {"student.options": {}, "student.weights": ""}
    write_recipe(project / "tiny.toml", changes)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (":Two", ["the student two returns tuple", "it must return one tensor"]),
        (":Small", ["the student two returns (1, 12, 24, 24)", "(1, 3, 48, 48)"]),
        (":bare", ["carries no facts", "set network.facts = ModelFacts(...)"]),
        (":nothing", ["must return an nn.Module, but returned NoneType"]),
        ("_broken:make", ["cannot import 'package_that_is_not_installed'", "install it"]),
    ],
)
@pytest.mark.parametrize("bits", [["--bits", "w4a4"], []], ids=["quantized", "float"])
def test_a_mistake_in_the_users_own_network(refused, project, own_networks, function, says, bits):
    if not bits:
        text = (project / "tiny.toml").read_text()
        (project / "tiny.toml").write_text(text.replace("[quant]", "[other]"))
        text = text[: text.index("[quant]")] + text[text.index("[distill]") :]
        (project / "tiny.toml").write_text(text)
    refused(*TO_RUN, *bits, "--student", own_networks + function, says=says)


# Run folders ----------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run(refused, project):
    (project / "run").mkdir()
    (project / "run" / "recipe.toml").write_bytes((project / "tiny.toml").read_bytes())
    refused(*TO_RUN, says=["run already holds a run", "--resume", "another --out"])


def test_a_folder_that_holds_something_else(refused):
    says = ["train is not empty and holds no run", "another --out"]
    said = refused("distill", "tiny.toml", "--out", "train", says=says)
    assert "--resume" not in said.err  # it would not help


def test_an_out_folder_that_is_a_file(refused):
    refused("distill", "tiny.toml", "--out", "tiny.toml", says=["tiny.toml is a file", "folder"])


def test_an_out_folder_below_a_file(refused):
    says = ["cannot write to tiny.toml/run", "Not a directory", "another --out"]
    refused("distill", "tiny.toml", "--out", "tiny.toml/run", says=says)


def test_resuming_what_was_never_begun(refused, project):
    refused(*TO_RUN, "--resume", says=["run holds no run to resume", "leave out --resume"])
    (project / "run").mkdir()
    refused(*TO_RUN, "--resume", says=["run holds no run to resume", "leave out --resume"])


def test_resuming_with_another_recipe(refused, project):
    (project / "run").mkdir()
    (project / "run" / "recipe.toml").write_bytes((project / "tiny.toml").read_bytes())
    refused(
        *TO_RUN,
        "--resume",
        "--bits",
        "w4a8",
        "--set",
        "train.learning_rate=1e-3",
        says=[
            "the recipe differs from the run in run",
            "quant.activation_bits: 4 -> 8; train.learning_rate: 0.0002 -> 0.001",
            "another --out",
        ],
    )


def test_a_mistake_leaves_an_empty_folder_empty(refused, project):
    (project / "run").mkdir()
    refused(*TO_RUN, "--data", "nowhere", says=["nowhere"])


def test_after_a_mistake_the_same_command_works(project):
    assert call(*TO_RUN, "--set", "data.train=nowhere").code == 1
    write_recipe(project / "tiny.toml", without=IN_FLOAT)
    said = call(*TO_RUN, "--set", "student.weights=", "--set", "train.steps=1")
    assert said.code == 0, said


def test_disk_full_while_writing_a_checkpoint(project, monkeypatch):
    write_recipe(project / "tiny.toml", without=IN_FLOAT)

    class Full:
        def __init__(self, file: BinaryIO) -> None:
            self.file = file

        def write(self, content: bytes) -> int:
            self.file.write(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            self.file.flush()

    @contextmanager
    def on_full_disk(path: Path) -> Iterator[Full]:
        with atomic_file(path) as file:
            yield Full(file)

    with monkeypatch.context() as patch:
        patch.setattr(sparkir.train.state, "atomic_file", on_full_disk)
        said = call(*TO_RUN)
    assert said.code == 1, said
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("error: cannot write the checkpoint run/training/float/last.pt")
    assert "No space left on device" in said.err
    assert "free some space and go on with --resume" in said.err
    files = {path.name for path in (project / "run").rglob("*") if path.is_file()}
    assert files == {"recipe.toml", "events.jsonl", ".lock"}
    assert call(*TO_RUN, "--resume").code == 0


def test_disk_full_while_writing_the_report(project, monkeypatch):
    write_recipe(project / "tiny.toml", without=IN_FLOAT)

    @contextmanager
    def on_full_disk(path: Path) -> Iterator[BinaryIO]:
        with atomic_file(path) as file:
            if path.suffix == ".json":
                raise OSError(errno.ENOSPC, "No space left on device")
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(sparkir.run, "atomic_file", on_full_disk)
        said = call(*TO_RUN)
    assert said.code == 1, said
    assert said.err.startswith("error: cannot write run/report.json: No space left on device")
    assert "--resume" in said.err
    assert not (project / "run" / "report.json").exists()


# Benchmarks -----------------------------------------------------------------------------------

QUICK = ("--size", "16x24", "--repeats", 1, "--threads", 1)


def test_bench_of_a_run(finished, project, monkeypatch):
    """Without OpenVINO and ExecuTorch, whose processes take seconds to start."""
    monkeypatch.setattr(contenders, "find_spec", lambda name: name == "onnxruntime" or None)
    before = contents(finished.folder)
    said = call("bench", finished.folder, *QUICK, "--json", "bench.json")
    assert said.code == 0, said
    assert "input 16x24, 1 thread" in said.out
    values = json.loads((project / "bench.json").read_text())
    rows = {row["label"]: row for row in values["rows"]}
    assert {"torch float32", "ONNX Runtime float32", "ONNX Runtime integer"} <= rows.keys()
    for label in ("torch float32", "ONNX Runtime float32", "ONNX Runtime integer"):
        assert rows[label]["failure"] == ""
        assert len(rows[label]["samples_ms"]) == 1
        assert rows[label]["peak_mib"] > 0
    integer = rows["ONNX Runtime integer"]
    size = (finished.folder / "student.onnx").stat().st_size
    assert integer["contender"]["file_bytes"] == size
    assert "0/6" in said.out
    assert "stored in 4 bits" in said.text
    assert "times as fast as torch float32" in said.out
    assert contents(finished.folder) == before


def test_bench_of_an_exported_file_has_no_twin(finished, project):
    said = call("bench", finished.folder / "student.onnx", *QUICK)
    assert said.code == 0, said
    assert "ONNX Runtime" in said.out
    assert "torch float32" not in said.out.partition("ms: median")[0]
    (line,) = [line for line in said.out.splitlines() if line.startswith("not measured: ")]
    assert "float twin" in line
    assert "give the run folder" in line


def test_bench_names_what_is_not_installed(finished, project, monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda name: name == "onnxruntime" or None)
    said = call("bench", finished.folder / "student.onnx", *QUICK)
    (line,) = [line for line in said.out.splitlines() if line.startswith("not measured: ")]
    assert 'OpenVINO (pip install "sparkir[openvino]")' in line
    assert 'ExecuTorch (pip install "sparkir[mobile]")' in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.onnx"], ["no file gone.onnx", "check the path"]),
        (["gone.safetensors"], ["no student at gone.safetensors"]),
        (["edsr"], ["bench takes a run folder", "edsr is none"]),
        (["train"], ["train is no run folder"]),
        (["unfinished"], ["is not finished", "--resume"]),
        (["broken.onnx"], ["broken.onnx is no ONNX file, or is damaged"]),
        (["train", "--size", "180"], ["--size '180'", "as in 540x960"]),
        (["train", "--repeats", "0"], ["--repeats 0", "at least 1"]),
        (["train", "--threads", "0"], ["--threads 0", "at least 1"]),
        (["train", "--json", "train"], ["--json train is a folder"]),
    ],
)
def test_a_mistake_in_what_to_bench(refused, project, arguments, says):
    (project / "broken.onnx").write_bytes(b"no model")
    (project / "unfinished").mkdir()
    (project / "unfinished" / "recipe.toml").write_text("")
    refused("bench", *arguments, says=says)


# Ctrl-C outside training ----------------------------------------------------------------------


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_training_leaves_nothing(project, monkeypatch):
    monkeypatch.setattr(sparkir.run, "gather", interrupt)
    before = contents(project)
    said = call(*TO_RUN)
    assert said.code == 130
    assert said.err == "stopped; nothing half-written was left behind\n"
    assert contents(project) == before


def test_ctrl_c_after_training_says_how_to_go_on(project, monkeypatch):
    write_recipe(project / "tiny.toml", without=IN_FLOAT)
    monkeypatch.setattr(sparkir.run, "measure", interrupt)
    said = call("distill", "tiny.toml", "--out", "my run")
    assert said.code == 130
    assert said.err == "stopped; go on with --resume --out 'my run'\n"
    monkeypatch.undo()
    monkeypatch.chdir(project)
    monkeypatch.setenv("SPARKIR_CACHE", str(project / "cache"))
    assert call("distill", "tiny.toml", "--out", "my run", "--resume").code == 0
    assert (project / "my run" / "report.md").is_file()


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_first_ctrl_c_in_training_waits_for_the_step_and_a_second_does_not(asked):
    before = signal.getsignal(asked)
    with cli._display() as shown, shown.stoppable():
        shown({"kind": "stage", "name": "train QAT", "steps": 5})
        signal.raise_signal(asked)
        assert shown.stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(asked)
    assert signal.getsignal(asked) is before


def test_ctrl_c_stops_at_once_where_there_is_no_step_to_wait_for():
    with cli._display() as shown, shown.stoppable():
        shown({"kind": "stage", "name": "train QAT", "steps": 5})
        shown({"kind": "stage", "name": "measure", "steps": 5})
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not shown.stop


def test_a_comparison_has_a_bar_for_every_training_and_one_for_all(capsys):
    with cli._display(CellDisplay) as shown:
        shown({"kind": "cells", "done": 1, "total": 3})
        for cell in ("QAT, seed 0", "KD, seed 0"):
            shown({"kind": "cell", "cell": cell, "steps": 8})
            shown({"kind": "stage", "cell": cell, "name": "train QAT", "steps": 8})
            shown({"kind": "stage", "cell": cell, "name": "teacher on 2 images", "steps": 2})
            shown({"kind": "warning", "cell": cell, "message": "the same for both"})
        shown({"kind": "step", "cell": "KD, seed 0", "step": 5, "loss": 0.5})
        bars = {task.description: (task.completed, task.total) for task in shown.progress.tasks}
        assert bars == {"comparison": (1, 3), "QAT, seed 0": (0, 8), "KD, seed 0": (5, 8)}
        notes = [task.fields["note"] for task in shown.progress.tasks]
        assert notes == ["", "teacher on 2 images", "loss 0.50000"]
        shown({"kind": "cell_done", "cell": "QAT, seed 0", "failed": ""})
        assert [task.completed for task in shown.progress.tasks] == [2, 5]
        # Of a worker that was killed before it began:
        shown({"kind": "cell_done", "cell": "PTQ, seed 0", "failed": "exit code -9"})
        assert [task.completed for task in shown.progress.tasks] == [3, 5]
        assert shown.training  # or a first Ctrl-C would not wait for the step
    assert capsys.readouterr().err.count("the same for both") == 1


# evaluate, restore, export --------------------------------------------------------------------

EDSR = ("edsr", "--weights", "teacher.safetensors")
OPTIONS = ("--option", "width=8", "--option", "blocks=1", "--option", "scale=2")


def test_the_teachers_weights_are_a_word_for_students_alone(refused, project):
    network = ("edsr", "--weights", "teacher", *OPTIONS)
    refused("evaluate", *network, "--data", "test", says=["no weights at teacher; check the path"])


@pytest.mark.parametrize("data", ["nowhere", "empty"])
def test_evaluating_no_images(refused, project, data):
    (project / "empty").mkdir()
    refused("evaluate", *EDSR, *OPTIONS, "--data", data, says=[data])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["old.pth"], ["old.pth does not say which network", "--weights old.pth"]),
        (["teacher.safetensors"], ["but not how to build", "network's name and --weights"]),
        (["edsr"], ["network edsr has no weights yet", "add --weights FILE"]),
        (["esdr"], ["no run or file esdr", "did you mean 'edsr'?"]),
        (["runs/gone"], ["no run or file runs/gone"]),
        (["gone.safetensors"], ["no student at gone.safetensors"]),
        (["gone.onnx"], ["there is no file gone.onnx; check the path"]),
        (["train"], ["train is no run folder", "sparkir distill"]),
        ([*EDSR, "--option", "scale"], ["--option takes name=value"]),
        ([*EDSR, "--option", "scales=2"], ["no option 'scales'"]),
        ([*EDSR, "--option", "width=16"], ["teacher.safetensors are not of this network"]),
        ([*EDSR, *OPTIONS, "--metric", "psnr"], ["--metric 'psnr'", "y, rgb or grey"]),
    ],
)
def test_a_mistake_in_what_to_evaluate(refused, project, arguments, says):
    torch.save(read_weights(project / "teacher.safetensors"), project / "old.pth")
    refused("evaluate", *arguments, "--data", "test", says=says)


def test_a_scale_for_which_no_input_can_be_made(refused, project):
    save_weights(build("edsr", width=8, blocks=1, scale=16), project / "x16.safetensors", {})
    options = [*OPTIONS[:4], "--option", "scale=16"]
    arguments = ["edsr", "--weights", "x16.safetensors", *options, "--data", "test"]
    refused("evaluate", *arguments, says=["bicubic scale is 16", "(2, 3, 4, 8)"])


@pytest.fixture
def run_copy(finished: Finished, project: Path) -> Path:
    """The finished run in this project, as `run`."""
    for name, content in contents(finished.folder).items():
        path = project / "run" / name
        if content is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return project / "run"


def test_weights_for_a_run_that_has_its_own(refused, run_copy):
    says = ["run has its own weights", "leave out --weights"]
    refused("evaluate", "run", *EDSR[1:], "--data", "test", says=says)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_a_damaged_student(refused, run_copy):
    cut(run_copy / "student.safetensors")
    for command in (["evaluate", "run/student.safetensors", "--data", "test"], ["export", "run"]):
        refused(*command, says=["run/student.safetensors", "is the file complete?"])


def test_a_student_of_another_version(refused, project, run_copy):
    path = run_copy / "student.safetensors"
    state = {key: value for key, value in read_weights(path).items() if "tail" not in key}
    save_weights(state, path, read_metadata(path))
    says = ["run/student.safetensors was made by sparkir", "Missing key(s)", "tail.1"]
    refused("evaluate", str(path), "--data", "test", says=[*says[1:], "student.safetensors"])


def test_a_damaged_export(refused, run_copy):
    cut(run_copy / "student.onnx")
    refused("restore", "run", "test", "made", says=["ONNX Runtime cannot open run/student.onnx"])


def test_a_foreign_onnx_file(refused, project, finished):
    model = onnx.load(finished.folder / "student.onnx")
    model.ClearField("metadata_props")
    onnx.save(model, project / "foreign.onnx")
    says = ["foreign.onnx does not say its scale and value range", "export it with sparkir"]
    refused("restore", "foreign.onnx", "test", "made", says=says)


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("gone.png", "made.png", ["no image or folder at gone.png"]),
        ("empty", "made", ["no images in empty"]),
        ("test/c.png", "made.gif", ["written as .png .tif", "not .gif", "rename made.gif"]),
        ("test", "tiny.toml", ["tiny.toml is a file", "give a folder"]),
        ("tiny.toml", "made.png", ["cannot read image tiny.toml"]),
        ("test/c.png", "tiny.toml/made", ["cannot write tiny.toml/made"]),
        ("test/c.png", "test", ["test/c.png would replace the image it is made from"]),
        ("test", "test", ["test/c.png would replace the image", "another OUT"]),
    ],
)
def test_a_mistake_in_what_to_restore(refused, project, source, target, says):
    (project / "empty").mkdir()
    refused("restore", *EDSR, *OPTIONS, source, target, says=says)


def test_two_images_that_would_get_one_name(refused, project):
    save_image(project / "test" / "c.bmp", photo(32, 32, 4))
    says = ["both named 'c'", "rename or remove one"]
    refused("restore", *EDSR, *OPTIONS, "test", "made", says=says)


def test_a_folder_with_one_broken_image_is_restored_but_for_it(project):
    (project / "test" / "bad.png").write_bytes(b"no image")
    said = call("restore", *EDSR, *OPTIONS, "test", "made")
    assert said.code == 1
    assert said.err.splitlines()[0].startswith("left out: bad.png: cannot read image test/bad.png")
    assert len(said.err.splitlines()) == 1
    assert "2 restored with edsr with teacher.safetensors, in made" in said.out
    assert {path.name for path in (project / "made").iterdir()} == {"c.png", "d.png"}
    assert load_image(project / "made" / "d.png").shape == (144, 136, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], ["the run in run is not finished", "--resume"]),
        (["test"], ["test is no run folder"]),
        (["gone"], ["gone is no run folder"]),
        (["run", "--format", "tflite"], ["no export format 'tflite'", "known: onnx, executorch"]),
    ],
)
def test_a_mistake_in_what_to_export(refused, project, arguments, says):
    (project / "run").mkdir()
    (project / "run" / "recipe.toml").write_bytes((project / "tiny.toml").read_bytes())
    refused("export", *arguments, says=says)


def test_an_export_that_differs_is_not_written(refused, run_copy, monkeypatch):
    """The real check, on a file with other weights in one layer."""
    model = onnx.load(run_copy / "student.onnx")
    weights = next(i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8)
    changed = onnx.numpy_helper.to_array(weights) // 2
    weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
    monkeypatch.setattr(sparkir.export, "to_onnx", lambda frozen: model)
    says = ["does not match the integer network, so it was not written", "differs in"]
    refused("export", "run", "--out", "new.onnx", says=says)


def test_an_export_that_differs_is_written_if_one_insists_and_says_so(run_copy, monkeypatch):
    model = onnx.load(run_copy / "student.onnx")
    weights = next(i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8)
    changed = onnx.numpy_helper.to_array(weights) // 2
    weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
    monkeypatch.setattr(sparkir.export, "to_onnx", lambda frozen: model)
    said = call("export", "run", "--out", "new.onnx", "--allow-mismatch")
    assert said.code == 0, said
    assert "it is NOT what was trained: quantizers_" in said.out
    words = {p.key: p.value for p in onnx.load("new.onnx").metadata_props}
    assert "differs in" in words["differs"]
    assert "**Not what was trained:** quantizers_" in Path("new.md").read_text("utf-8")


@pytest.mark.slow
def test_a_program_that_differs_says_so_too(run_copy, monkeypatch):
    """The real program and check; only what was found is another."""
    pytest.importorskip("executorch.exir", reason='needs ExecuTorch: pip install "sparkir[mobile]"')
    from sparkir.deploy import mobile_parity
    from sparkir.deploy.executorch import ExecuTorchSession

    check = mobile_parity.check_mobile_parity

    def differing(*arguments):
        return replace(check(*arguments), failures=["a grid differs in 9 of 9 values"])

    monkeypatch.setattr(mobile_parity, "check_mobile_parity", differing)
    said = call("export", "run", "--format", "executorch", "--allow-mismatch")
    assert said.code == 0, said
    assert "it is NOT what was trained: a grid differs" in said.out
    words = ExecuTorchSession(run_copy / "student.pte").metadata
    assert words["differs"] == "a grid differs in 9 of 9 values"


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("new.md", "new.md is no name for this format; give a file *.onnx"),
        ("run", "run is no name for this format"),
        ("notes.onnx", "notes.md is there, where the model card goes, and is none"),
    ],
)
def test_where_an_export_cannot_go(refused, run_copy, out, says):
    Path("notes.md").write_text("# Mine\n", "utf-8")
    refused("export", "run", "--out", out, says=[says])
    assert Path("notes.md").read_text("utf-8") == "# Mine\n"


@pytest.mark.parametrize("content", ["{bad", "{}", "[1]", '{"rows": [{}]}'])
def test_an_export_with_a_damaged_report(refused, run_copy, content):
    (run_copy / "report.json").write_text(content, "utf-8")
    refused("export", "run", says=["report.json is damaged", "delete it to export without"])


def test_an_unfinished_run_cannot_be_evaluated(refused, project):
    (project / "run").mkdir()
    (project / "run" / "recipe.toml").write_bytes((project / "tiny.toml").read_bytes())
    refused("evaluate", "run", "--data", "test", says=["run in run is not finished", "--resume"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["distil"], ["distill"], ["evaluate", "edsr"], ["restore", "edsr", "in"], ["check", "-x"]],
)
def test_wrong_usage_is_exit_code_2(project, arguments):
    said = call(*arguments)
    assert said.code == 2
    assert "Usage: " in said.out + said.err
    assert "Traceback" not in said.err


# Text -----------------------------------------------------------------------------------------


def test_names_are_printed_as_they_are(project):
    """Rich would take [/b] for markup and :fire: for a picture, and break long lines."""
    write_recipe(
        project / "tiny.toml",
        {"name": "a[b]", "description": "[/b] :fire: [red]x[/red]", "student.weights": ""},
        without=IN_FLOAT,
    )
    folder = "deep/" * 25 + "[/i]:fire:"
    said = call("distill", "tiny.toml", "--out", folder, "--set", "train.steps=1")
    assert said.code == 0, said
    assert "a[b]: [/b] :fire: [red]x[/red]\n" in said.out
    assert f"run folder {folder}; " in said.out
    assert f" {folder}/report.md\n" in said.out
    assert (
        f"error: {folder} already holds a run; "
        in call("distill", "tiny.toml", "--out", folder).err
    )


def test_a_message_of_several_lines_becomes_one(monkeypatch):
    def load(*_: object) -> None:
        raise SparkirError("first:\n\tsecond\n\n  third [/b]  ")

    monkeypatch.setattr(recipe, "load", load)
    assert call("check", "tiny.toml").err == "error: first: second third [/b]\n"


def test_the_default_folder_is_new_for_every_run(project):
    write_recipe(project / "tiny.toml", {"train.steps": 1}, without=IN_FLOAT)
    for _ in range(2):
        assert call("distill", "tiny.toml").code == 0
    assert {path.name for path in (project / "runs").iterdir()} == {"tiny", "tiny-2"}
    said = call("distill", "tiny.toml", "--resume")
    assert said.code == 0
    assert "run folder runs/tiny-2; " in said.out
    shutil.move(project / "runs/tiny-2", project / "runs/tiny-4")
    said = call("distill", "tiny.toml", "--resume")
    assert "run folder runs/tiny-4; " in said.out
    said = call("distill", "tiny.toml")
    assert "run folder runs/tiny-5; " in said.out


def test_shortcuts_stand_for_recipe_keys(project):
    awkward = project / 'it\'s a \\ "folder"'
    for split in ("train", "test"):
        save_image(awkward / split / "e.png", photo(64, 64, 7))
    (awkward / "w.safetensors").write_bytes((project / "teacher.safetensors").read_bytes())
    write_recipe(project / "tiny.toml", without=["distill", "weighting", "baselines"])
    changes = cli._shortcuts(awkward / "w.safetensors", "edsr", "W5A6", awkward)
    made = recipe.load("tiny.toml", list(changes))
    assert made.teacher is not None
    assert made.quant is not None
    assert made.teacher.weights == str(awkward / "w.safetensors")
    assert (made.quant.weight_bits, made.quant.activation_bits) == (5, 6)
    assert (made.data.train, made.data.test) == (str(awkward / "train"), str(awkward / "test"))
    (only,) = cli._shortcuts(None, None, None, awkward / "train")
    assert recipe.load("tiny.toml", [only]).data.train == str(awkward / "train")


COMMANDS = {
    "distill": [
        "RECIPE",
        "--teacher",
        "--student",
        "--bits",
        "--data",
        "--out",
        "--set",
        "--resume",
    ],
    "compare": [
        "RECIPE",
        "--methods",
        "--seeds",
        "--baseline",
        "--data",
        "--test",
        "--out",
        "--jobs",
        "--set",
    ],
    "evaluate": ["MODEL", "--data", "--weights", "--option", "--metric", "--each", "--set"],
    "restore": [
        "MODEL",
        "IN",
        "OUT",
        "--weights",
        "--option",
        "--memory",
        "--runtime",
        "--format",
        "--overwrite",
        "--max-pixels",
    ],
    "export": ["RUN", "--format", "--out", "--data", "--allow-mismatch"],
    "bench": ["MODEL", "--size", "--repeats", "--threads", "--json"],
    "push": ["RUN", "REPO", "--licence", "--private", "--dry-run"],
    "pull": ["REPO", "OUT", "--revision", "--dry-run"],
    "report": ["RUN", "--csv", "--tensorboard", "--follow"],
    "check": ["RECIPE", "--teacher", "--data", "--as", "--set"],
    "models": [],
    "sets": ["NAME"],
    "recipes": ["NAME", "--weightings"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument(command):
    said = call(command, "--help")
    assert said.code == 0
    for argument in [f"sparkir {command}", *COMMANDS[command]]:
        assert argument.lower() in said.out.lower()
    callback = next(
        c.callback for c in cli.app.registered_commands if c.callback.__name__ == command
    )
    assert callback.__doc__.partition("\n")[0].rstrip(".") in said.text


def test_no_command_is_left_out_of_the_help():
    names = {command.callback.__name__ for command in cli.app.registered_commands}
    assert names == COMMANDS.keys()
    said = call("--help")
    assert said.code == 0
    assert all(f" {name} " in said.out for name in names)


def test_models_lists_every_network():
    said = call("models")
    assert said.code == 0
    for name, description in available().items():
        assert f"{name} {description}" in said.text


def test_recipes_lists_every_recipe_and_every_weighting():
    for said, names in (
        (call("recipes"), recipe.shipped()),
        (call("recipes", "--weightings"), recipe.weightings()),
    ):
        assert said.code == 0
        assert len(names) >= 2
        assert all(line in said.text for line in names)


def test_a_printed_recipe_is_that_recipe(project):
    said = call("recipes", "demo")
    assert said.code == 0
    assert recipe.from_values(tomllib.loads(said.out), "printed") == recipe.load("demo")
    (project / "mine.toml").write_text(said.out, encoding="utf-8")
    assert recipe.load("mine.toml") == recipe.load("demo")


def test_check_says_what_is_quantized_and_what_is_not(project):
    before = contents(project)
    said = call("check", "tiny.toml")
    assert said.code == 0, said
    lines = said.out.splitlines()
    images = "training images: 2, test images: 2, x2; "
    assert images + "measured as PSNR-Y studio range, uint8, crop 2 px" in lines
    count = sum(p.numel() for p in build("edsr", width=8, blocks=1, scale=2).parameters())
    assert f"teacher: edsr, {count:,} parameters" in lines
    assert f"student: edsr, {count:,} parameters" in lines
    assert "quantized to W4A4: 6 layers" in lines
    assert "W8A8: head.0, tail.1" in lines
    assert "W4A4: body.0.body.0, body.0.body.2, body.1, tail.0.0" in lines
    left = [line for line in lines if line.startswith("left in float: ")]
    assert left
    assert all(line.endswith(")") and "(" in line for line in left)
    assert lines[-1] == "ready"
    assert contents(project) == before


def test_check_finds_what_would_stop_the_run(refused):
    refused("check", "tiny.toml", "--set", "data.scale=3", says=["restores x2, but the data is x3"])


def test_check_takes_the_shortcuts_of_distill(project):
    (project / "other.safetensors").write_bytes((project / "teacher.safetensors").read_bytes())
    (project / "teacher.safetensors").unlink()
    (project / "train" / "b.png").unlink()
    save_image(project / "more" / "x.png", photo(64, 64, 7))
    said = call("check", "tiny.toml", "--teacher", "other.safetensors", "--data", "more")
    assert said.code == 0, said
    assert "training images: 1, test images: 2, x2; " in said.out


# As a program ---------------------------------------------------------------------------------


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    script = Path(sys.executable).with_name("sparkir")
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)


def test_the_installed_command(project):
    said = program("models")
    assert said.returncode == 0
    assert "edsr-baseline" in said.stdout
    assert said.stderr == ""


def test_the_installed_command_and_a_mistake(project):
    before = contents(project)
    said = program(*TO_RUN, "--set", "data.train=nowhere")
    assert said.returncode == 1
    assert said.stderr.startswith("error: cannot list nowhere: ")
    assert len(said.stderr.splitlines()) == 1
    assert contents(project) == before
