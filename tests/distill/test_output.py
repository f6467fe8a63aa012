import pytest
import torch

from sparkir.distill.output import MAPS, l1_map, mse_map


def test_by_hand():
    student = torch.tensor([0.5, 0.25, -1.0]).view(1, 3, 1, 1)
    target = torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1)
    assert l1_map(student, target).flatten().tolist() == [0.25, 0.25, 2]
    assert mse_map(student, target).flatten().tolist() == [0.0625, 0.0625, 4]


@pytest.mark.parametrize(("norm", "loss"), [("l1", "l1_loss"), ("mse", "mse_loss")])
def test_mean_is_torchs_loss(norm, loss):
    student, target = torch.rand(2, 2, 3, 5, 7)
    expected = getattr(torch.nn.functional, loss)(student, target)
    torch.testing.assert_close(MAPS[norm](student, target).mean(), expected)
    assert MAPS.keys() == {"l1", "mse"}
