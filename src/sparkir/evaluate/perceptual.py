"""LPIPS, where its library and its weights are on this machine. Nothing is ever downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

LpipsMetric = Callable[[np.ndarray, np.ndarray], float]
"""Takes two uint8 (h, w, 3) RGB images and returns their distance, 0 for equal ones."""

_TRUNK = "alexnet-*.pth"


class Lpips(NamedTuple):
    """The metric, or why there is none."""

    metric: LpipsMetric | None
    words: str
    """What to print beside the figures, or in their place."""


@cache
def find_lpips() -> Lpips:
    """LPIPS 0.1 with AlexNet (Zhang et al., CVPR 2018) from the package `lpips`, on whole images.

    The package wants torchvision, and AlexNet's ImageNet weights in torch's hub folder.
    """
    if importlib.util.find_spec("lpips") is None:
        return Lpips(None, "the package lpips is not installed")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(folder.glob(_TRUNK)):
        return Lpips(None, f"AlexNet's weights ({_TRUNK}) are not in {folder}")
    try:
        network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()
    except (ImportError, RuntimeError, OSError) as error:  # torchvision that does not fit torch
        reason = str(error).partition("\n")[0]
        return Lpips(None, f"the package lpips does not load ({reason})")

    @torch.inference_mode()
    def metric(output: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> float:
        distance: Any = network(_as_input(output), _as_input(target))
        return float(distance)

    return Lpips(metric, "LPIPS 0.1 with AlexNet, RGB, no crop")


def _as_input(image: UInt8[np.ndarray, "h w 3"]) -> torch.Tensor:
    """(1, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(image.copy()).movedim(-1, 0)[None].float() / 127.5 - 1
