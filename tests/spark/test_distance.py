import pytest
import torch

from sparkir.spark.distance import MAPS, l1_map, matched_map, mse_map


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
    assert MAPS.keys() == {"l1", "mse", "matched"}


def test_matched_by_hand():
    student = torch.tensor([0.5, 0.25, -1.0]).view(1, 3, 1, 1)
    target = torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1)
    mean_gap = (0.25 + 0.25 + 2) / 3
    expected = torch.tensor([0.0625, 0.0625, 4]) / (2 * mean_gap)
    torch.testing.assert_close(matched_map(student, target).flatten(), expected)


@pytest.mark.parametrize("gap", [1e-4, 0.01, 0.3])
def test_matched_pulls_as_hard_as_l1(gap):
    target = torch.rand(2, 3, 8, 8)
    pulls = []
    for norm in ("l1", "matched"):
        student = (target + gap * torch.linspace(-1, 1, 384).view_as(target)).requires_grad_()
        MAPS[norm](student, target).mean().backward()
        pulls.append(student.grad.abs().mean())
    torch.testing.assert_close(pulls[0], pulls[1], rtol=1e-3, atol=0)


def test_matched_is_finite_where_nothing_differs():
    student = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    loss = matched_map(student, student.detach()).mean()
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()
