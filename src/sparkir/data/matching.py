"""Which file of one folder belongs to which of another, and by what scale they differ."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sparkir.data.images import check_stems, find_images
from sparkir.errors import SparkirError

_ADDED = re.compile(r"^(no)?rain-|x[2348]$")
"""What sets add to a stem: `norain-7x2` and `norain-7`, `0001x4` and `0001` are one image."""


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """A degraded image and its ground truth."""

    name: str
    input: Path
    target: Path


def partners(input_dir: Path, target_dir: Path) -> list[PairFiles]:
    """The images of two folders that have the same stem, sorted by it.

    If the stems do not agree, they are compared without what some sets add to them.

    Raises:
        SparkirError: as `find_images` and `check_stems`, or a file is alone.
    """
    inputs, targets = _by_stem(input_dir), _by_stem(target_dir)
    if inputs.keys() != targets.keys():
        plain_inputs, plain_targets = _without_added(inputs), _without_added(targets)
        if plain_inputs and plain_inputs.keys() == plain_targets.keys():
            inputs, targets = plain_inputs, plain_targets
    for files, others, other_dir in (
        (inputs, targets, target_dir),
        (targets, inputs, input_dir),
    ):
        alone = sorted(files.keys() - others.keys())
        if alone:
            raise SparkirError(
                f"{files[alone[0]]} has no partner named {alone[0]!r} in {other_dir} "
                f"({len(alone)} of {len(files)} files have none); add it or remove the file"
            )
    return [PairFiles(name=n, input=inputs[n], target=targets[n]) for n in sorted(inputs)]


def checked_scale(
    name: str,
    lq: UInt8[np.ndarray, "h w 3"],
    gt: UInt8[np.ndarray, "H W 3"],
    scale: int | None,
) -> int:
    """``scale``, or the one that the sizes tell when it is None.

    Raises:
        SparkirError: the sides of ``gt`` are not that many times those of ``lq``.
    """
    factor = max(1, gt.shape[0] // lq.shape[0]) if scale is None else scale
    if gt.shape[:2] != (lq.shape[0] * factor, lq.shape[1] * factor):
        rule = "a whole number of" if scale is None else f"exactly {scale}"
        raise SparkirError(
            f"pair {name}: input is {size_text(lq)}, target {size_text(gt)}; "
            f"the sides of the target must be {rule} times those of the input"
        )
    return factor


def size_text(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Width and height as people write them: ``640x480 px``."""
    return f"{image.shape[1]}x{image.shape[0]} px"


def _by_stem(folder: Path) -> dict[str, Path]:
    paths = find_images(folder)
    check_stems(paths)
    return {path.stem: path for path in paths}


def _without_added(files: Mapping[str, Path]) -> dict[str, Path]:
    """The same files by shorter stems; empty if two would get the same one."""
    plain = {_ADDED.sub("", stem): path for stem, path in files.items()}
    return plain if len(plain) == len(files) else {}
