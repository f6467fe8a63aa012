"""Executes `notebook.ipynb` again, in place: make notebook. Also makes a page of it, for the site.

Outputs are kept small, and free of what changes from one run to the next. A digest of the code goes
with them, by which a test sees whether they are those of the code beside them.
"""

import base64
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("notebook.ipynb")
LARGEST_BYTES = 400_000
PICTURES = ("image/png", "image/jpeg")


def code_of(notebook: dict[str, Any]) -> list[str]:
    """The code, a text for each cell."""
    cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    return ["".join(cell["source"]) for cell in cells]


def digest_of(notebook: dict[str, Any]) -> str:
    """What the code is recognised by."""
    return hashlib.sha256("\0".join(code_of(notebook)).encode()).hexdigest()[:16]


def page_of(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and the pictures that it shows, by their paths."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for data in (output["data"] for output in cell.get("outputs", ())):
            (kind, shown), *_ = data.items()
            shown = "".join(shown).strip()
            if kind == "image/jpeg":
                path = f"images/notebook-{len(pictures) + 1}.jpg"
                pictures[path], shown = base64.b64decode(shown), f"![What the cell shows]({path})"
            elif kind == "text/plain":
                shown = f"```text\n{shown}\n```"
            parts.append(shown)
    parts.append("This page is [a notebook](notebook.ipynb).")
    return "\n\n".join(parts) + "\n", pictures


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of a new kernel, in an empty folder, with an empty cache.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        SystemExit: a cell wrote to standard error, or the outputs are too large.
    """
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            node, record_timing=False, timeout=None, resources={"metadata": {"path": folder}}
        )
        client.execute(env=os.environ | {"SPARKIR_CACHE": str(Path(folder) / "cache")})
    done: dict[str, Any] = json.loads(nbformat.writes(node))
    outputs = [o for cell in done["cells"] for o in cell.get("outputs", ())]
    for output in outputs:
        if output.get("name") == "stderr":
            raise SystemExit(f"the notebook complains: {''.join(output['text'])}")
        if "data" in output:
            output["data"] = small(output["data"])
    done["metadata"] = notebook["metadata"] | {"sparkir": {"digest": digest_of(done)}}
    return done


def small(data: dict[str, Any]) -> dict[str, Any]:
    """One output without its second forms, a picture as JPEG."""
    for kind in PICTURES:
        if kind in data:
            return {"image/jpeg": _jpeg(data[kind])}
    richer = [kind for kind in ("text/html", "text/markdown") if kind in data]
    return {kind: data[kind] for kind in richer or data}


def _jpeg(encoded: str) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=85, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Execute it and write it."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # the debugger's greeting
    text = json.dumps(execute(json.loads(PATH.read_text("utf-8"))), indent=1, ensure_ascii=False)
    if len(text) > LARGEST_BYTES:
        raise SystemExit(f"the notebook would have {len(text)} bytes; show less in it")
    PATH.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
