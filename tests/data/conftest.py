from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Save = Callable[..., Path]


def photo_like(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Smooth colours with some texture: no two images or corners of it are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(rng.uniform(0.05, 0.3) * x + rng.uniform(0.05, 0.3) * y) for _ in range(3)]
    image = 128 + 80 * np.stack(waves, axis=2) + rng.normal(0, 6, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes an array as an image file below tmp_path, by Pillow rather than by our own code."""

    def write(name: str, array: np.ndarray, **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, **options)
        return path

    return write


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def photo() -> Callable[..., np.ndarray]:
    return photo_like
