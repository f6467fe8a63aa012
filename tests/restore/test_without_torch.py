"""An exported file restores where there is no torch, and never asks for it."""

import os
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import numpy as np
import pytest

import sparkir
from helpers import load_image, photo, save_image
from sparkir.restore.engine import Engine
from sparkir.restore.network import open_exported
from sparkir.restore.pictures import Picture, read_picture
from sparkir.restore.writing import write_picture

NEEDED = ["numpy", "pillow", "typer", "rich", "jaxtyping", "onnxruntime"]
FORBIDS = """
import sys

class Forbids:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden}:
            raise AssertionError(f"{{name}} was imported")

sys.meta_path.insert(0, Forbids())
from sparkir import cli
sys.argv = ["sparkir", *sys.argv[1:]]
cli.main()
"""


def without(forbidden: set[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(FORBIDS.format(forbidden=repr(forbidden)))
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


UNWANTED = {"torch", "onnx", "onnxscript", "safetensors", "scipy", "skimage"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_restoring_imports_no_torch(tmp_path, model_file, runtime):
    pytest.importorskip(runtime)
    image = photo(30, 40, 1)
    save_image(tmp_path / "a.png", image)
    path = model_file("edsr", "integer")
    other = {"onnxruntime", "openvino"} - {runtime}
    arguments = ["restore", path, tmp_path / "a.png", tmp_path / "b.png", "--runtime", runtime]
    said = without(UNWANTED | other, *arguments)
    assert said.returncode == 0, said.stderr
    expected = Engine(open_exported(path, runtime))(image)
    np.testing.assert_array_equal(load_image(tmp_path / "b.png"), expected)


def test_a_run_folder_needs_none_either(tmp_path, model_file):
    save_image(tmp_path / "a.png", photo(30, 40, 1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/student.onnx").write_bytes(model_file("edsr", "integer").read_bytes())
    (tmp_path / "run/student.safetensors").write_bytes(b"")
    said = without(UNWANTED, "restore", tmp_path / "run", tmp_path / "a.png", tmp_path / "b.png")
    assert said.returncode == 0, said.stderr


def test_what_needs_torch_says_so(tmp_path):
    save_image(tmp_path / "a.png", photo(30, 40, 1))
    code = "import sys; sys.modules['torch'] = None; from sparkir import cli; cli.main()"
    command = [
        sys.executable,
        "-c",
        code,
        "restore",
        "edsr",
        tmp_path / "a.png",
        tmp_path / "b.png",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert said.stderr.startswith(
        "error: edsr needs torch, which is not installed; without it only"
    )
    assert len(said.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_fresh_environment_without_torch(tmp_path, model_file):
    """What docs/restore.md says to install, and no more."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-input", *NEEDED]
    said = subprocess.run(install, capture_output=True, text=True, check=False)
    if said.returncode:
        pytest.skip(f"pip cannot install here: {said.stderr[-300:]}")
    source = Path(sparkir.__file__).parents[1]
    metadata = next(Path(p) for p in _places() if list(Path(p).glob("sparkir-*.dist-info")))
    made = _site_packages(python)
    (made / "sparkir.pth").write_text(str(source))
    for folder in metadata.glob("sparkir-*.dist-info"):
        (made / folder.name).symlink_to(folder)
    image = photo(30, 40, 1)
    save_image(tmp_path / "a.png", image)
    write_picture(tmp_path / "deep.png", Picture(pixels=image.astype(np.uint16) * 257), "")
    path = model_file("edsr", "integer")
    code = "from sparkir import cli; cli.main()"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def restore(name: str) -> subprocess.CompletedProcess[str]:
        arguments = ["restore", path, tmp_path / name, tmp_path / "out"]
        command = [python, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=clean)

    said = restore("a.png")
    assert said.returncode == 0, said.stderr
    assert "torch" not in {entry.name for entry in made.iterdir()}
    expected = Engine(open_exported(path))(image)
    np.testing.assert_array_equal(load_image(tmp_path / "out/a.png"), expected)
    said = restore("deep.png")
    assert 'needs pyvips: pip install "sparkir[deep]"' in said.stderr, said
    extra = [*install[: -len(NEEDED)], "pyvips[binary]", "tifffile"]
    if subprocess.run(extra, capture_output=True, check=False).returncode == 0:
        assert restore("deep.png").returncode == 0
        assert read_picture(tmp_path / "out/deep.png").pixels.dtype == np.uint16


def _places() -> list[str]:
    return [place for place in sys.path if place and Path(place).is_dir()]


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(said.stdout.strip())
