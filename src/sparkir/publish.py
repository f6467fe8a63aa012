"""What of a finished run goes to the Hub, and what came from there and can be used."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkir.assemble import Report, load_student, recipe_of_student, silent
from sparkir.data.atomic import atomic_folder
from sparkir.data.codec import one_line
from sparkir.data.layouts import set_name
from sparkir.deploy.card import Card, read_card
from sparkir.deploy.hub import Listing, download, list_files, require_repo_name, upload
from sparkir.deploy.hub_card import hub_readme
from sparkir.deploy.session import RUNTIMES, installed, open_session
from sparkir.errors import SparkirError
from sparkir.models.checkpoint import read_metadata
from sparkir.models.facts import facts_of
from sparkir.recipe import Recipe, differences, load
from sparkir.tools import finished_student

_NEEDED = ("student.safetensors", "recipe.toml")
SHIPPED = (
    *("README.md", *_NEEDED, "student.onnx", "student.md", "student.pte"),
    *("report.md", "report.json", "comparison.png"),
)
"""What of a run is for others; the state of its training is not."""


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """What a push would send."""

    files: Mapping[str, Path | bytes]
    """Name in the repository -> where it is, or what is in it."""
    notes: list[str]
    """What is to be known before."""

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def shipment_of(folder: Path, repo: str, *, licence: str = "") -> Shipment:
    """What of a run folder goes to `repo`: the model, its card, its recipe and its report.

    A README.md that lies in the folder is the card; otherwise one is made. The student is built
    and the exported file opened, as `pull` will, so that nothing is sent that it would refuse.

    Raises:
        SparkirError: it is no run folder, the run is not finished, or a file is damaged.
    """
    require_repo_name(repo)
    student, recipe = load_student(finished_student(folder))
    _require_whole(folder, recipe)
    files: dict[str, Path | bytes] = {
        name: folder / name for name in SHIPPED if (folder / name).is_file()
    }
    notes = _local_paths(recipe)
    if "README.md" in files:
        if licence:
            raise SparkirError(
                f"{folder / 'README.md'} is sent as it is; write the licence there, or remove it"
            )
        notes.append("README.md is the folder's own, sent as it is")
    else:
        card = Card(
            facts=facts_of(student),
            quantization=_quantization_of(recipe),
            target="" if recipe.quant is None else recipe.quant.target,
            recipe=recipe.name,
            training=recipe.to_toml(),
            licence=recipe.data.licence,
        )
        readme = _readme(folder, card, repo, set_name(Path(recipe.data.test)), licence)
        files["README.md"] = readme.encode()
    return Shipment(files=files, notes=notes)


def _quantization_of(recipe: Recipe) -> str:
    return "float" if recipe.quant is None else recipe.quant.label


def _readme(folder: Path, card: Card, repo: str, images: str, licence: str) -> str:
    own = folder / "student.md"
    report, values = folder / "report.md", _report_of(folder)
    results = _text_of(report).partition("\n")[2] if report.is_file() else ""
    if results and (folder / "comparison.png").is_file():
        results += "\n![The same detail by each of them](comparison.png)\n"
    return hub_readme(
        _text_of(own) if own.is_file() else card.to_markdown(),
        card,
        repo=repo,
        results=results,
        metrics=_metrics_of(values, folder / "report.json"),
        measured_on=images,
        convention=values.get("convention", ""),
        licence=licence,
        onnx=(folder / "student.onnx").is_file(),
    )


def _report_of(folder: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SparkirError(f"cannot read {folder / 'report.json'}: {error}") from error
    if not isinstance(values, dict):
        raise SparkirError(f"{folder / 'report.json'} holds no report; delete it")
    return values


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SparkirError(f"cannot read {path}: {one_line(error)}; delete or mend it") from error


def _metrics_of(report: Mapping[str, Any], path: Path) -> dict[str, float]:
    """What the Hub shows of the last row; an infinite mean is nothing that it could show."""
    if not report:
        return {}
    try:
        row = report["rows"][-1]
        found = {"psnr": row["psnr_db"], "ssim": row["ssim"]}
        return {name: float(value) for name, value in found.items() if value is not None}
    except (LookupError, TypeError, ValueError) as error:
        raise SparkirError(f"{path} is damaged ({one_line(error)}); delete it") from error


def _local_paths(recipe: Recipe) -> list[str]:
    """The recipe travels as it is: in its file, in the student's and in the exported one's."""
    named = [recipe.data.train, recipe.data.test, recipe.student.weights]
    named += [] if recipe.teacher is None else [recipe.teacher.weights]
    found = [name for name in dict.fromkeys(named) if Path(name).is_absolute()]
    return [f"the recipe shows paths of this machine: {', '.join(found)}"] if found else []


def push(shipment: Shipment, repo: str, *, private: bool = False, report: Report = silent) -> str:
    """Send a shipment to a model repository, made if it is not there, as one commit; its address.

    What an earlier push left there and this one does not have is deleted.

    Raises:
        SparkirError: see `deploy.hub.upload`.
    """
    report({"kind": "stage", "name": f"push {len(shipment.files)} files", "steps": 0})
    return upload(
        shipment.files,
        repo,
        message="Model, card, recipe and report, pushed by sparkir",
        private=private,
        replaced=SHIPPED,
    )


def find_model(repo: str, *, revision: str | None = None) -> tuple[Listing, list[str]]:
    """What a repository holds, and the names of what `pull` would fetch.

    Raises:
        SparkirError: see `deploy.hub.list_files`; or it holds no model of sparkir's.
    """
    require_repo_name(repo)
    listing = list_files(repo, revision=revision)
    absent = [name for name in _NEEDED if name not in listing.files]
    if absent:
        raise SparkirError(
            f"{repo} holds no model that `sparkir push` sent: it has no {' and no '.join(absent)}"
        )
    return listing, [name for name in SHIPPED if name in listing.files]


def pull(listing: Listing, names: list[str], folder: Path, *, report: Report = silent) -> list[str]:
    """Fetch a model into a new folder, whole and usable or not at all; what is to be said of it.

    Raises:
        SparkirError: see `deploy.hub.download`; the folder is not empty; or what came cannot be
            opened.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SparkirError(f"{folder} is there already and not empty; choose another OUT")
    report({"kind": "stage", "name": f"pull {len(names)} files", "steps": 0})
    try:
        with atomic_folder(folder.resolve()) as partial:  # what a link points to is replaced
            download(listing, names, partial)
            try:
                return _opened(partial, folder)
            except SparkirError as error:
                words = str(error).replace(str(partial), listing.repo)
                raise SparkirError(f"what came cannot be used: {words}") from error
    except OSError as error:
        raise SparkirError(f"cannot write to {folder}: {one_line(error)}") from error


def _opened(files: Path, folder: Path) -> list[str]:
    """Open all that can be opened without running anybody's code; what it is good for."""
    recipe = recipe_of_student(files / "student.safetensors")
    _require_whole(files, recipe)
    said = []
    if ":" in recipe.student.model:
        said.append(
            f"the student is built by the function {recipe.student.model}, which is not part of "
            "sparkir and was not called; be sure that you trust it before you use the model"
        )
    else:
        load_student(files / "student.safetensors")
        said += _uses(recipe, folder)
    return said


def _require_whole(folder: Path, recipe: Recipe) -> None:
    """See that recipe and exported file are the student's, as far as it can be known.

    Raises:
        SparkirError: they are not, or the exported file cannot be opened.
    """
    changed = differences(load(folder / "recipe.toml"), recipe)
    if changed:
        raise SparkirError(f"recipe.toml is not the student's: {'; '.join(changed)}")
    file, student = folder / "student.onnx", folder / "student.safetensors"
    runtime = next((name for name in RUNTIMES if installed(name)), None)
    if not file.is_file() or runtime is None:
        return
    card = read_card(open_session(file, runtime=runtime).metadata, str(file))
    words = read_metadata(student)
    target = "" if recipe.quant is None else recipe.quant.target
    of_student = (recipe.name, _quantization_of(recipe), target)
    same = (card.recipe, card.quantization, card.target) == of_student
    if not same or ("facts" in words and read_card(words, str(student)).facts != card.facts):
        raise SparkirError("student.onnx and student.safetensors are of different networks")


def _uses(recipe: Recipe, folder: Path) -> list[str]:
    said = [f"restore with it: sparkir restore {shlex.quote(str(folder))} IN OUT"]
    if recipe.quant is None:
        options = f" and options {recipe.student.options}" if recipe.student.options else ""
        said.append(
            f"as a teacher: --teacher {folder / 'student.safetensors'}, with teacher.model = "
            f"{recipe.student.model!r}{options}"
        )
    return said
