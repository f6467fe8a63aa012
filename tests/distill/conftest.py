import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Equal seeds give equal bits, and other work on the machine is left in peace."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
