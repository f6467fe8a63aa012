"""The shape of the package: who may import whom, what is public, what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparkir

SOURCE = Path(sparkir.__file__).parent
# The data's path. A folder imports from those above it, never from one below.
PATH = [
    "data",
    "models",
    "quant",
    "spark",
    "distill",
    "evaluate",
    "train",
    "deploy",
    "report",
    "restore",
]
# These stand above all folders and wire them.
ABOVE = {
    "cli",
    "run",
    "recipe",
    "assemble",
    "measure",
    "export",
    "memory",
    "teacher",
    "tools",
    "publish",
}
ABOVE_ALL = "compare"  # a folder that stands above these, too


def imports_of(file: Path) -> set[str]:
    """The first part below `sparkir` of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("sparkir.")}
    return found


@pytest.mark.parametrize("folder", PATH)
def test_a_folder_imports_only_from_above(folder):
    allowed = {"errors", *PATH[: PATH.index(folder) + 1]}
    for file in (SOURCE / folder).glob("*.py"):
        assert imports_of(file) <= allowed, file.name


def test_the_path_names_every_folder():
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders == {*PATH, "recipes", ABOVE_ALL}
    assert {p.stem for p in SOURCE.glob("*.py")} == ABOVE | {"__init__", "__main__", "errors"}


def test_only_the_command_line_knows_the_comparison():
    files = [file for file in SOURCE.rglob("*.py") if file.parent.name != ABOVE_ALL]
    assert [file.name for file in files if ABOVE_ALL in imports_of(file)] == ["cli.py"]


def test_spark_knows_nothing_of_the_other_folders():
    for file in (SOURCE / "spark").glob("*.py"):
        assert imports_of(file) <= {"spark", "errors"}, file.name


def test_public_names():
    assert sparkir.__all__ == ["Spark", "SparkirError", "__version__"]
    for name in sparkir.__all__:
        assert hasattr(sparkir, name)
    with pytest.raises(AttributeError, match="no attribute 'spork'"):
        _ = sparkir.spork


def test_spark_needs_torch_alone_and_imports_quickly():
    """In an interpreter of its own, which has imported torch already."""
    unwanted = {"pydantic", "onnx", "onnxruntime", "PIL", "safetensors", "typer", "rich", "skimage"}
    code = (
        "import sys, time, torch; began = time.process_time(); from sparkir import Spark; "
        "took_s = time.process_time() - began; Spark; "
        f"found = {unwanted} & sys.modules.keys(); "
        "found |= {n for n in sys.modules if n.startswith('sparkir.') "
        "and not n.startswith('sparkir.spark') and n != 'sparkir.errors'}; "
        "sys.exit(f'{took_s:.2f} s, {found}' if took_s > 0.3 or found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, sparkir; sys.exit(bool({'torch', 'numpy', 'jaxtyping'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_command_line_prints():
    for file in SOURCE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)]
        printing = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printing or file.name == "cli.py", file


def test_help_does_not_wait_for_torch():
    code = "import sys, sparkir.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_restoring_with_an_exported_file_does_not_need_torch():
    """Nor onnx, nor anything that reads recipes; jaxtyping imports none of them by itself."""
    unwanted = {"torch", "onnx", "pydantic", "safetensors"}
    modules = [f"sparkir.restore.{file.stem}" for file in (SOURCE / "restore").glob("[a-z]*.py")]
    assert len(modules) >= 6
    code = (
        f"import sys, sparkir.deploy.session, sparkir.deploy.card, {', '.join(modules)}; "
        f"sys.exit(bool({unwanted} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
