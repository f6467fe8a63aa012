"""A wheel and an sdist, installed where there is nothing else, by every Python that is here."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
TORCH = os.environ.get("SPARKIR_TEST_TORCH", "torch==2.13.0")
SMOKE = """
import sys, torch
from sparkir import Spark, SparkirError, __version__
from sparkir import recipe
spark = Spark()
student = torch.nn.Conv2d(3, 3, 3, padding=1)
gt = torch.rand(4, 3, 32, 32)
output = student(gt)
kd, weights = spark.weigh(output, gt, gt)
kd.backward()
assert spark.learn()["trust"] > 0
assert "demo" in recipe.shipped()
assert "site-packages" in recipe.__file__
print(sys.version_info[:2], __version__)
"""


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def interpreter(version: str) -> Path | None:
    """A Python of this version: on the path, or one of pyenv's, whose shims may refuse."""
    found = [shutil.which(f"python{version}"), *PYENV.glob(f"versions/{version}.*/bin/python")]
    for candidate in filter(None, found):
        asked = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return Path(candidate)
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with both files; the wheel is made from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "venv", folder / "builder", cwd=folder)
    python = folder / "builder" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "build", cwd=folder)
    run(python, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.slow
def test_holds_what_it_needs_and_nothing_else(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sparkir"}
    for needed in ("py.typed", "recipes/demo.toml", "models/weights/rfdn-x2-small.safetensors"):
        assert f"sparkir/{needed}" in names
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "LICENSE", "src/sparkir/__init__.py"} <= inside


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_works_in_an_empty_environment(built, version, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    run(python, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "-q", TORCH, cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    assert version.replace(".", ", ") in run(python, "-c", SMOKE, cwd=tmp_path)
    said = run(tmp_path / "empty" / "bin" / "sparkir", "recipes", cwd=tmp_path)
    assert "demo" in said
