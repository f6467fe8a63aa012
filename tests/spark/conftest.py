import pytest
import torch


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student, teacher, target), (4, 3, 32, 32) in [0, 1]: random, the student farther off."""
    target = torch.rand(4, 3, 32, 32)
    teacher = (target + 0.05 * torch.randn_like(target)).clamp(0, 1)
    return (target + 0.1 * torch.randn_like(target)).clamp(0, 1), teacher, target
