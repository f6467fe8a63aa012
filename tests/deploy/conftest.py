import os

import exported
import pytest
from exported import CASES, Deployed, deploy


@pytest.fixture(autouse=True, scope="session")
def exported_once(tmp_path_factory) -> None:
    """Several processes of one run keep their exports in the folder that they have in common."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        exported.shared_folder = tmp_path_factory.getbasetemp().parent / "exports"
        exported.shared_folder.mkdir(exist_ok=True)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} W{case[1]}A{case[1]}")
def deployed(request) -> Deployed:
    return deploy(*request.param)


@pytest.fixture
def dncnn() -> Deployed:
    return deploy("dncnn", 8)


@pytest.fixture
def edsr() -> Deployed:
    return deploy("edsr", 8)
