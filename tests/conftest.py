import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SPARKIR_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def development_data() -> Path:
    """The folder of benchmark sets and published weights; without it, the test is skipped."""
    if not DATA.is_dir():
        pytest.skip("needs the development data (benchmark sets and published weights)")
    return DATA
