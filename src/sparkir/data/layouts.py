"""The layouts that published sets come in, so that nobody has to arrange files anew.

Two questions are answered here: where in a set's folder the part for training or for testing
lies, and which files of a part are pairs. The catalog knows the sets; this knows only folders.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sparkir.data.blocks import CLEAN, NOISY
from sparkir.data.images import SUFFIXES, find_images
from sparkir.data.matching import PairFiles, partners
from sparkir.errors import SparkirError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

PARTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "train",
        "training",
        "our485",  # LOL
        "DIV2K_train_HR",
        "RainTrainL",
        "RainTrainH",
        "rain_data_train_Light",
        "rain_data_train_Heavy",
        "SIDD_Medium_Srgb/Data",
        "Data",  # SIDD_Medium_Srgb itself
    ),
    "test": (
        "test",
        "testing",
        "eval15",  # LOL
        "val",
        "valid",
        "validation",
        "DIV2K_valid_HR",
        "Rain100L",
        "Rain100H",
        "rain_data_test_Light",
        "rain_data_test_Heavy",
    ),
}
"""Folders that hold one part of a set, by the names that the sets give them, whatever their
capitals."""

_CLEAN_INSIDE = ("HR", "GTmod12", "original_png", "Flickr2K_HR", "image_SRF_4")
"""Where sets that come with degraded copies keep the clean images."""
_CLEAN_AMONG_OTHERS = re.compile(r"_SRF_\d_HR$")  # the HR files of SelfExSR's folders

_FOLDERS = (
    ("input", "target"),
    ("low", "high"),  # LOL
    ("blur", "sharp"),  # GoPro
    ("rain/x2", "norain"),  # Rain100L and Rain100H as their authors distribute them
    ("rain", "norain"),
    ("input_crops", "gt_crops"),  # SIDD in crops
    ("input", "groundtruth"),
)
"""Folders of degraded and of clean images, whatever their capitals."""

_MARKS = (
    (re.compile("_NOISY_"), "_GT_"),  # SIDD Medium
    (re.compile("^rain-"), "norain-"),  # Rain100L, RainTrainL and their heavy siblings
)
"""What in the stem of a degraded image has to be replaced by what to get its ground truth's."""
_DEGRADED_INSIDE = "rainy"  # where Rain100L and Rain100H keep the degraded images of marked pairs


def set_name(folder: Path) -> str:
    """What a set of images is called: as its folder, but `Set14` where that is `Set14/HR`."""
    inner = folder.name in _CLEAN_INSIDE and folder.parent.name
    return inner or folder.name


def part_of(folder: Path, split: Split) -> Path | None:
    """The folder that holds a part of the set in ``folder``: itself or one inside; None if none.

    Raises:
        SparkirError: images lie in it, and in a folder inside where sets keep theirs.
    """
    if holds_pairs(folder, split):
        return folder
    if alone := _images(folder):
        for inside in (_inside(folder, name) for name in _CLEAN_INSIDE):
            if _images(inside):
                raise SparkirError(
                    f"{folder} holds images ({alone[0].name}), and so does {inside}; give "
                    f"{inside}, or move one of them elsewhere"
                )
        return folder
    for name in (*PARTS[split], *_CLEAN_INSIDE):
        part = _inside(folder, name)
        if _images(part) or holds_pairs(part, split):
            return part
    return None


def _inside(folder: Path, name: str) -> Path:
    """The folder of this name inside, or else one that differs from it in capitals alone."""
    exact = folder / name
    if "/" in name or exact.is_dir():
        return exact
    alike = (path for path in _folders(folder) if path.name.lower() == name.lower())
    return next(alike, exact)


def clean_images(folder: Path) -> list[Path]:
    """As `find_images`; where SelfExSR keeps reduced copies beside clean images, without them."""
    images = find_images(folder)
    marked = [path for path in images if _CLEAN_AMONG_OTHERS.search(path.stem)]
    return marked or images


def holds_pairs(folder: Path, split: Split = "test") -> bool:
    """Whether `pair_files` would find any; broken pairs count as well."""
    if split == "test" and (folder / NOISY).is_file():
        return True
    return any(_is_paired(part) for part in (folder, *_scenes(folder)))


def pair_files(folder: Path, split: Split = "test") -> list[PairFiles]:
    """The pairs in a folder, in any of the known layouts.

    Either two folders inside, such as `input` and `target`; or files marked by their names; or
    folders for scenes that hold one of the two; or, to test on, SIDD's validation blocks.

    Raises:
        SparkirError: there are no pairs, or a file has no partner.
    """
    if split == "test" and (folder / NOISY).is_file():
        return [PairFiles(name="block", input=folder / NOISY, target=folder / CLEAN)]
    if _is_paired(folder):
        return _paired(folder)
    scenes = _scenes(folder)
    pairs = [
        replace(pair, name=f"{scene.name}-{pair.name}")
        for scene in scenes
        if _is_paired(scene)
        for pair in _paired(scene)
    ]
    for scene in scenes if pairs else ():
        _require_no_half(scene)
    names = {pair.name: pair for pair in pairs}
    for pair in pairs:
        if names[pair.name] is not pair:  # scene a-b with c, scene a with b-c
            raise SparkirError(
                f"{pair.target} and {names[pair.name].target} would both be {pair.name!r}; "
                "rename one of their folders"
            )
    if not pairs:
        raise SparkirError(
            f"no pairs in {folder}; put degraded images in {folder / 'input'} and clean ones of "
            f"the same names in {folder / 'target'}"
        )
    return pairs


def _require_no_half(scene: Path) -> None:
    """Among scenes that hold pairs, refuse one that holds one side alone.

    Raises:
        SparkirError: it does.
    """
    if _is_paired(scene):
        return
    inside = {path.name.lower() for path in _folders(scene)}
    sides = {side for both in _FOLDERS for side in both} & inside
    if sides or _images(scene):
        found = f"only {' and '.join(sorted(sides))}" if sides else "images"
        raise SparkirError(
            f"{scene} holds {found}, and no pairs, as the folders beside it do; add what is "
            "missing or remove it"
        )


def _is_paired(folder: Path) -> bool:
    if _pair_of_folders(folder) is not None:
        return True
    return any(_marked(folder)) and any(map(_is_marked_clean, _images(folder)))


def _paired(folder: Path) -> list[PairFiles]:
    both = _pair_of_folders(folder)
    return partners(*both) if both is not None else _partners_by_mark(folder)


def _pair_of_folders(folder: Path) -> tuple[Path, Path] | None:
    inside = {path.name.lower(): path for path in _folders(folder)}
    inside |= {f"rain/{p.name.lower()}": p for p in _folders(inside.get("rain", folder / "rain"))}
    return next(((inside[a], inside[b]) for a, b in _FOLDERS if a in inside and b in inside), None)


def _marked(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each image that is marked as degraded, and the stem of its ground truth."""
    for path in [*_images(folder), *_images(folder / _DEGRADED_INSIDE)]:
        for mark, clean in _MARKS:
            if mark.search(path.stem):
                yield path, mark.sub(clean, path.stem)


def _is_marked_clean(path: Path) -> bool:
    """Whether it is marked as a ground truth; without any, `rain-forest.png` is but a name."""
    return any(clean in path.stem for _, clean in _MARKS)


def _partners_by_mark(folder: Path) -> list[PairFiles]:
    clean = {path.stem: path for path in _images(folder)}
    pairs = []
    for path, stem in _marked(folder):
        if stem not in clean:
            raise SparkirError(
                f"{path} has no partner named {stem!r} in {folder}; add it or remove the file"
            )
        pairs.append(PairFiles(name=stem, input=path, target=clean[stem]))
    marked = {stem for stem, path in clean.items() if _is_marked_clean(path)}
    alone = sorted(marked - {pair.name for pair in pairs})
    if alone:
        raise SparkirError(
            f"{clean[alone[0]]} has no degraded partner ({len(alone)} of {len(marked)} have "
            "none); add it or remove the file"
        )
    return pairs


def _scenes(folder: Path) -> list[Path]:
    """Folders inside that are not the parts of a set: those must never be mixed."""
    parts = {name.lower() for names in PARTS.values() for name in names}
    return [path for path in _folders(folder) if path.name.lower() not in parts]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if path.is_dir()]


def _images(folder: Path) -> list[Path]:
    """As `find_images`, but without a complaint."""
    return [p for p in _listed(folder) if p.suffix.lower() in SUFFIXES and not p.is_dir()]


def _listed(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden; nothing, where that cannot be known."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:  # no folder, or `lost+found`
        return []
