"""A project of a few kilobytes, the command line in this process, and one finished run.

A pytest plugin: `pytest_plugins = ["helpers"]` in a test module brings the fixtures.
PYTEST_DONT_REWRITE, because the module is imported before it becomes a plugin.
"""

import io
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from torch.fx import GraphModule

from sparkir import cli, run
from sparkir.assemble import gather
from sparkir.errors import SparkirError
from sparkir.models.checkpoint import save_weights
from sparkir.models.registry import build
from sparkir.recipe import load

one_order_of_sums = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU sums in no fixed order: no two runs are alike"
)
NETWORK = {"model": "edsr", "options": {"width": 8, "blocks": 1, "scale": 2}}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "description": "A network of two blocks, for tests",
    "baselines": ["degraded", "teacher"],
    "data": {"train": "train", "test": "test", "scale": 2, "patch_px": 16, "batch": 2},
    "teacher": {**NETWORK, "weights": "teacher.safetensors"},
    "student": {**NETWORK, "weights": "teacher"},
    "quant": {"weight_bits": 4, "activation_bits": 4},
    "distill": {},
    "weighting": {"name": "spark-paper", "options": {"reward_every": 2}},
    "train": {"steps": 12, "calibration_images": 8, "log_every": 1, "checkpoint_every": 2},
}
ALL_BASELINES = ["degraded", "teacher", "ptq-w8a8", "ptq", "qat"]
IN_FLOAT = ("quant", "teacher", "distill", "weighting", "baselines")
"""What a recipe lacks that trains a float network alone."""


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Waves and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(rng.uniform(0.05, 0.6) * x + rng.uniform(0.05, 0.6) * y) for _ in "rgb"]
    image = 128 + 80 * np.stack(waves, axis=2) + rng.normal(0, 6, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def save_image(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def load_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def make_project(folder: Path) -> Path:
    """Images, a teacher's weights and `tiny.toml`."""
    for seed, (name, height, width) in enumerate(
        [("train/a", 64, 72), ("train/b", 80, 64), ("test/c", 64, 80), ("test/d", 72, 68)]
    ):
        save_image(folder / f"{name}.png", photo(height, width, seed))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = build("edsr", width=8, blocks=1, scale=2)
    save_weights(teacher, folder / "teacher.safetensors", {})
    write_recipe(folder / "tiny.toml")
    return folder


def write_recipe(
    path: Path, changes: Mapping[str, Any] | None = None, *, without: Sequence[str] = ()
) -> Path:
    """`RECIPE` with some `section.key`s changed and some sections left out."""
    values = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in RECIPE.items()
        if key not in without
    }
    if "teacher" in without:
        values["student"] = values["student"] | {"weights": ""}
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def assert_refused(recipe_file: str, says: Sequence[str]) -> None:
    """A run of this recipe is refused before anything is trained, in one line with these words."""
    with pytest.raises(SparkirError) as caught:
        gather(load(recipe_file))
    for words in says:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard output with every run of blanks as one space."""
        return " ".join(self.out.split())


def call(*arguments: object) -> Said:
    """`sparkir ARGUMENTS`, as the installed script calls it."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sparkir", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def project(_template: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, holding a fresh copy of the project."""
    folder = tmp_path / "project"
    shutil.copytree(_template, folder)
    monkeypatch.setenv("SPARKIR_CACHE", str(cache))
    monkeypatch.chdir(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    """A run of the recipe with all baselines."""

    project: Path
    folder: Path
    said: Said
    frozen: GraphModule
    """The integer network that the run measured and exported."""


@pytest.fixture(scope="session")
def finished(_template: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Read-only: copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(_template, folder)
    write_recipe(folder / "tiny.toml", {"baselines": ALL_BASELINES})
    frozen: list[GraphModule] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKIR_CACHE", str(cache))
        patch.chdir(folder)
        freeze: Callable[..., GraphModule] = run.freeze
        patch.setattr(run, "freeze", lambda student: frozen.append(freeze(student)) or frozen[-1])
        said = call("distill", "tiny.toml", "--out", "run")
    assert said.code == 0, said
    return Finished(folder, folder / "run", said, frozen[-1])
