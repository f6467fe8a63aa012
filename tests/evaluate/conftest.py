from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from sparkir.data.degrade import bicubic_resize, mod_crop
from sparkir.data.images import read_image


class BenchmarkSet:
    """A published super-resolution set: its LR files where it has them, else made from the HR."""

    def __init__(self, folder: Path, scale: int) -> None:
        self.folder, self.scale = folder, scale
        self.names = sorted(path.stem for path in (folder / "HR").iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        scale, name = self.scale, self.names[index]
        gt = mod_crop(read_image(self.folder / "HR" / f"{name}.png"), scale)
        published = self.folder / f"LR_bicubic/X{scale}" / f"{name}x{scale}.png"
        if published.exists():
            return read_image(published), gt
        return bicubic_resize(gt, scale=Fraction(1, scale), border="replicate"), gt


@pytest.fixture
def benchmark_set(development_data) -> Callable[[str, int], BenchmarkSet]:
    return lambda name, scale: BenchmarkSet(development_data / "test" / name, scale)
