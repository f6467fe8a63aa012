"""The notebook: its code runs, what it ends cells with can be shown, and its outputs are of it."""

import ast
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import photo, save_image
from sparkir.data import photographs

DOCS = Path(__file__).parents[1] / "docs"
FEW, SIDE_PX = "STEPS = 8", 160
SHOWN = ("_repr_markdown_", "_repr_png_")


@pytest.fixture(scope="module")
def notebook():
    return json.loads((DOCS / "notebook.ipynb").read_text("utf-8"))


@pytest.fixture(scope="module")
def tool():
    return SimpleNamespace(**runpy.run_path(str(DOCS / "notebook.py")))


def script_of(code: list[str]) -> str:
    """All cells as one script, which gives the value of each to `show`, as Jupyter would."""
    body = []
    for cell in code:
        lines = ast.parse(cell).body
        if isinstance(lines[-1], ast.Expr):
            shown = ast.Call(func=ast.Name("show"), args=[lines[-1].value], keywords=[])
            lines[-1] = ast.Expr(shown)
        body += lines
    return ast.unparse(ast.fix_missing_locations(ast.Module(body, type_ignores=[])))


def shown_as(value: object) -> str | bytes:
    """The richest form that Jupyter would find."""
    for name in SHOWN:
        if hasattr(value, name):
            return getattr(value, name)()
    return repr(value)


def small_photographs(folder: Path) -> object:
    """What the search for scikit-image finds: its files, of fewer pixels."""
    for seed, name in enumerate(sum(photographs._FILES.values(), ())):
        save_image(folder / "data" / name, photo(SIDE_PX, SIDE_PX, seed))
    return SimpleNamespace(submodule_search_locations=[str(folder)])


def test_every_cell_runs(notebook, tool, tmp_path, monkeypatch):
    found = small_photographs(tmp_path / "skimage")
    monkeypatch.setattr(photographs, "find_spec", lambda name: found)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARKIR_CACHE", str(tmp_path / "cache"))
    first, *others = tool.code_of(notebook)
    assert first.startswith("STEPS = ")
    Path("cells.py").write_text(script_of([FEW, *others]), "utf-8")
    shown = []
    runpy.run_path("cells.py", {"show": lambda value: shown.append(shown_as(value))})
    pictures = [one for one in shown if isinstance(one, bytes) and one.startswith(b"\x89PNG")]
    assert len(pictures) == 3
    assert "| SPARK W4A4 | runtime |" in shown[0]
    assert any("of which" in str(one) for one in shown)


def test_outputs_are_of_this_code(notebook, tool):
    assert notebook["metadata"]["sparkir"]["digest"] == tool.digest_of(notebook), "make notebook"


def test_every_cell_that_shows_something_has_its_output(notebook, tool):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        if isinstance(ast.parse("".join(cell["source"])).body[-1], ast.Expr):
            assert len(cell["outputs"]) == 1, cell["source"]
        for output in cell["outputs"]:
            assert output["output_type"] in ("execute_result", "display_data")
            assert set(output["data"]) <= {"text/plain", "text/html", "text/markdown", "image/jpeg"}


def test_the_notebook_is_small(tool):
    assert tool.PATH.stat().st_size <= tool.LARGEST_BYTES


def test_a_picture_is_kept_once(tool):
    kept = tool.small({"text/plain": "<PIL.Image at 0x7f>", "text/markdown": "| a |"})
    assert kept == {"text/markdown": "| a |"}
    assert tool.small({"text/plain": "'a'"}) == {"text/plain": "'a'"}


def test_the_site_has_a_page_of_it(notebook, tool):
    page, pictures = tool.page_of(notebook)
    for cell in notebook["cells"]:
        assert "".join(cell["source"]) in page
    assert "| SPARK W4A4 | runtime |" in page
    assert [f"({path})" in page for path in pictures] == [True] * 3
    assert all(content.startswith(b"\xff\xd8\xff") for content in pictures.values())
    assert "base64" not in page
