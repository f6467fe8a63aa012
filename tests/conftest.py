import os
from pathlib import Path
from zlib import crc32

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SPARKIR_DATA", ROOT.parent / "shared" / "data"))


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report() -> None:
    """What a module draws when it is read does not depend on the modules before it.

    This comes before all fixtures, those of the whole session included.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """A fixture draws the same numbers, whichever test is the first to ask for it."""
    torch.manual_seed(crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """So does a test, whichever ran before it; and others than its fixtures."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Equal seeds give equal bits, and other work on the machine is left in peace."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def development_data() -> Path:
    """The folder of benchmark sets and published weights; without it, the test is skipped."""
    if not DATA.is_dir():
        pytest.skip("needs the development data (benchmark sets and published weights)")
    return DATA
