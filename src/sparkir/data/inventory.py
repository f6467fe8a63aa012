"""What of a known set a folder holds, and what is missing from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparkir.data.blocks import count_blocks, is_blocks
from sparkir.data.catalog import CATALOG, KnownSet, Part, fits, nearest_names
from sparkir.data.codec import image_size
from sparkir.data.layouts import clean_images, pair_files, part_of
from sparkir.errors import SparkirError

_NAMED_AT_MOST = 5
_RECOGNISED_FROM = 0.5


@dataclass(frozen=True, kw_only=True)
class Found:
    """What there is of one part of a set."""

    part: Part
    folder: Path | None
    """None where there is nothing of it."""
    present: int = 0
    problems: tuple[str, ...] = ()
    """What is missing, too much, unreadable or of another size."""

    @property
    def complete(self) -> bool:
        """Whether everything is as the set's authors distribute it."""
        return self.folder is not None and not self.problems

    def line(self) -> str:
        """For people."""
        part = self.part
        if self.folder is None:
            return f"{part.split}: not here ({part.label}; {part.where})"
        kind = "pairs" if part.paired else "images"
        count = f"{self.present:,} of {part.count:,}" if part.count else f"{self.present:,}"
        return "; ".join([f"{part.split}: {count} {kind} in {self.folder}", *self.problems])


def take_inventory(folder: Path, known: KnownSet) -> list[Found]:
    """What of each part of a set lies in a folder, which is the set's or a part's own.

    Raises:
        SparkirError: there is no such folder, or nothing of the set in it.
    """
    if not folder.is_dir():
        raise SparkirError(f"no folder {folder}; check the path")
    held = [_hold(folder, part) for part in known.parts]
    best: dict[Path, _Held] = {}
    for one in held:  # where parts look into the same folder, it holds the one that fits best
        if one is not None and one.fit > 0:
            best[one.folder] = max(best.get(one.folder, one), one, key=lambda h: h.fit)
    chosen = {id(one.part): one for one in best.values()}
    here = {one.part.split for one in best.values()}
    if not here:
        wanted = " or ".join(f"{part.label} as in {part.where}" for part in known.parts)
        raise SparkirError(f"{folder} holds nothing of {known.name}; it has {wanted}")
    return [
        _examined(chosen[id(part)]) if id(part) in chosen else Found(part=part, folder=None)
        for part in known.parts
        if id(part) in chosen or part.split not in here  # not another form of what is there
    ]


def recognise(folder: Path) -> KnownSet:
    """The set that a folder holds, by the names of its files or its own.

    Raises:
        SparkirError: it is none, or one of several; the message says how to name it.
    """
    fitting = [known for known in CATALOG if _is_likely(folder, known)]
    named = [known for known in fitting if _is_named_in(folder, known)]
    candidates = named or fitting
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(known.name for known in candidates or CATALOG)
    why = "may hold one of several known sets" if candidates else "looks like no known set"
    raise SparkirError(f"{folder} {why}; name it with --as: {names}")


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Files that may be a part of a set."""

    part: Part
    folder: Path
    files: dict[str, tuple[Path, ...]]
    """By the name of the image or pair."""
    fit: float
    error: str = ""


def _hold(folder: Path, part: Part) -> _Held | None:
    place = part_of(folder, part.split)
    if place is None:
        return None
    try:
        files = _files_of(place, part)
    except SparkirError as error:  # a file without its partner
        return _Held(part=part, folder=place, files={}, fit=0.01, error=str(error))
    return _Held(part=part, folder=place, files=files, fit=fits(part, list(files)))


def _files_of(place: Path, part: Part) -> dict[str, tuple[Path, ...]]:
    if not part.paired:
        return {path.stem: (path,) for path in clean_images(place)}
    found: dict[str, tuple[Path, ...]] = {}
    for pair in pair_files(place, part.split):
        if is_blocks(pair.input):
            scenes, blocks = min(count_blocks(pair.input), count_blocks(pair.target))
            numbers = ((s, b) for s in range(1, scenes + 1) for b in range(1, blocks + 1))
            found |= {f"{pair.name}-{s:02d}-{b:02d}": () for s, b in numbers}
        else:
            found[pair.name] = (pair.input, pair.target)
    return found


def _examined(held: _Held) -> Found:
    part, names = held.part, list(held.files)
    problems = [held.error] if held.error else []
    expected = nearest_names(part, names)
    missing = [name for name in expected if name not in held.files]
    beyond = [name for name in names if expected and name not in expected]
    if missing:
        problems.append(f"missing {_listed(missing)}")
    elif not expected and 0 < len(names) < part.count:
        problems.append(f"{part.count - len(names):,} are missing, but which cannot be told")
    if beyond:
        problems.append(f"not of the set: {_listed(beyond)}")
    elif not expected and part.count and len(names) > part.count:
        problems.append(f"{len(names) - part.count:,} too many")
    problems += _wrong_files([path for paths in held.files.values() for path in paths], part)
    present = len(names) - len(beyond)
    return Found(part=part, folder=held.folder, present=present, problems=tuple(problems))


def _wrong_files(paths: Sequence[Path], part: Part) -> list[str]:
    """Files whose header cannot be read, or is of another size than the set's."""
    unreadable, others = [], []
    allowed = set(part.sizes_px) | {size[::-1] for size in part.sizes_px}
    for path in paths:
        try:
            size = image_size(path)
        except SparkirError:
            unreadable.append(path.name)
        else:
            if allowed and size not in allowed:
                others.append(f"{path.name} ({size[0]}x{size[1]})")
    problems = [f"cannot be read: {_listed(unreadable)}"] if unreadable else []
    if others:
        right = " or ".join(f"{width}x{height}" for width, height in part.sizes_px)
        problems.append(f"not of {right} px: {_listed(others)}")
    return problems


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST:,} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _is_likely(folder: Path, known: KnownSet) -> bool:
    """By most of its names and few others; or by less, if the folder is called like it."""
    held = [one for part in known.parts if (one := _hold(folder, part)) is not None]
    if _is_named_in(folder, known):
        return any(one.fit > 0 for one in held)
    return any(
        bool(nearest_names(one.part, list(one.files)))
        and one.fit * min(1, one.part.count / len(one.files)) >= _RECOGNISED_FROM
        for one in held
    )


def _is_named_in(folder: Path, known: KnownSet) -> bool:
    """Whether the folder, one above it or one inside is called like the set."""
    inside = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    names = [_plain(name) for name in (*folder.absolute().parts[-3:], *inside)]
    wanted = [_plain(name) for name in (known.name, *known.aliases)]
    return any(name.startswith(one) for name in names for one in wanted)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
