"""SIDD's validation blocks: many small images in one MATLAB file."""

import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

NOISY, CLEAN = "ValidationNoisyBlocksSrgb.mat", "ValidationGtBlocksSrgb.mat"
"""The two files as the set's site has them: 40 scenes of 32 blocks of 256 x 256 px each."""


def is_blocks(path: Path) -> bool:
    """Whether a file is one that `read_blocks` reads."""
    return path.suffix.lower() == ".mat"


def count_blocks(path: Path) -> tuple[int, int]:
    """Scenes, and blocks of each, without reading them; SparkirError as `read_blocks`."""
    shapes = _matlab(path, lambda matlab: {n: shape for n, shape, _ in matlab.whosmat(path)})
    scenes, blocks, *_ = shapes.get(path.stem, (0, 0))
    return scenes, blocks


def read_blocks(path: Path) -> UInt8[np.ndarray, "scenes blocks h w 3"]:
    """The blocks of a MATLAB file, RGB, 0..255; the variable is called like the file.

    Raises:
        SparkirError: scipy is not installed, or the file is missing, damaged or something else.
    """
    found = _matlab(path, lambda matlab: matlab.loadmat(path, variable_names=[path.stem]))
    found = found.get(path.stem)
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 5:
        raise SparkirError(
            f"{path} does not hold {path.stem}, an array (scenes, blocks, height, width, 3) of "
            "bytes; take the sRGB blocks of SIDD's validation set"
        )
    return found


def _matlab(path: Path, read: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - scipy has no types
    """What `read` makes of scipy's reader; its many errors become one."""
    try:
        matlab = import_module("scipy.io")
    except ModuleNotFoundError as error:
        raise SparkirError(
            f"{path} is a MATLAB file, which needs scipy to be read: pip install scipy"
        ) from error
    damaged = (OSError, ValueError, TypeError, NotImplementedError, zlib.error)
    try:
        return read(matlab)
    except (*damaged, matlab.matlab.MatReadError) as error:
        raise SparkirError(
            f"cannot read {path}: {one_line(error)}; download it again, or remove it"
        ) from error
