"""Which file of one folder belongs to which of another, and by what scale they differ."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sparkir.data.images import check_stems, find_images
from sparkir.errors import SparkirError


def partners(input_dir: Path, target_dir: Path) -> tuple[list[Path], list[Path]]:
    """The images of two folders, both sorted by stem, so that those at one place are a pair.

    Raises:
        SparkirError: as `find_images` and `check_stems`, or a file is alone.
    """
    inputs, targets = _by_stem(input_dir), _by_stem(target_dir)
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
    names = sorted(inputs)
    return [inputs[name] for name in names], [targets[name] for name in names]


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
