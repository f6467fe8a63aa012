"""What a record keeps of a comparison, and how a comparison goes on from it.

A comparison of many methods and seeds takes longer than a machine may be at hand. Its record has
every image's scores, but no weights; put back into a folder they are finished cells, to which
`sparkir compare` adds methods and seeds, after its own checks that the start is the same.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparkir.compare.cell import folder_of, start_file
from sparkir.compare.comparison import sets_of
from sparkir.recipe import load

FILES = ("comparison.*", "images.csv", "to-*.md")


def keep(made: Path, record: Path, places: Mapping[str, Path]) -> None:
    """Copy the tables into the record, without where things lay."""
    record.mkdir(exist_ok=True)
    for file in (path for pattern in FILES for path in made.glob(pattern)):
        text = file.read_text("utf-8")
        for place in places.values():
            text = text.replace(f"{place}/", "").replace(str(place), "photographs")
        (record / file.name).write_text(text, "utf-8")


def take_up(
    record: Path, made: Path, recipe: str, settings: Sequence[str], tests: Sequence[str]
) -> None:
    """Put the finished cells of a record into a new folder.

    Args:
        record: the folder that `keep` wrote.
        made: the comparison's folder, new.
        recipe: the comparison's, by its name or file.
        settings: what is set in it, KEY=VALUE.
        tests: more test sets, NAME=DIR.

    Raises:
        FileNotFoundError: an older record, which has no `images.csv`.
    """
    scores = _scores(record / "images.csv")
    comparison = json.loads((record / "comparison.json").read_text("utf-8"))
    whole = load(recipe, settings)
    made.mkdir(parents=True)
    (made / "recipe.toml").write_text(whole.to_toml(), "utf-8")
    for seed, start in comparison["starts"].items():
        _write(start_file(made, int(seed)), start)
    for cell in comparison["cells"]:
        if cell["result"] is None:
            continue
        seed, method = cell["seed"], cell["method"]
        folder = folder_of(made, seed, method)
        _write(folder / "result.json", cell["result"])
        for name, where in sets_of(whole, tests).items():
            if found := scores[name, seed, method]:
                values = {"method": method, "seed": seed, "set": name, "where": where}
                values |= {"content": comparison["images"][name], "lpips": "", "scores": found}
                _write(folder / "scores" / f"{name}.json", values)


Scores = dict[str, list[dict[str, str | float | None]]]
"""Arithmetic -> every image's scores, as a cell keeps them."""


def _scores(file: Path) -> defaultdict[tuple[str, int, str], Scores]:
    """Test set, seed and method -> the scores."""
    found: defaultdict[tuple[str, int, str], Scores] = defaultdict(dict)
    with file.open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            values = {m: float(line[m]) if line[m] else None for m in ("psnr_db", "ssim", "lpips")}
            of = found[line["set"], int(line["seed"]), line["method"]]
            of.setdefault(line["arithmetic"], []).append({"name": line["image"], **values})
    return found


def _write(path: Path, values: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1), "utf-8")
