import pytest
import torch
from tapped import Tapped, seen, setting

from sparkir.distill.skt import SKT, structure


def test_by_hand():
    """mean_c F^2 of 3, 4 has the norm 5; of 1, 0 the norm 1."""
    student = torch.tensor([[6.0, 0], [0, 8]]).sqrt().view(1, 2, 1, 2)
    assert structure(student).flatten().tolist() == pytest.approx([0.6, 0.8])
    teacher = torch.tensor([1.0, 0]).view(1, 1, 1, 2)
    (term,) = SKT(setting(Tapped(width=2), Tapped(width=1)))(seen([student], [teacher]))
    assert term.distance.flatten().tolist() == pytest.approx([0.16, 0.64])
    assert term.loss(torch.ones(1, 1, 1, 2)).item() == pytest.approx(0.4 * 1000 / 255)


def test_is_the_published_loss_in_its_own_unit():
    """L1 of [0, 255] + 1000 * mean over b * h * w, as PAMS adds them up, is 255 times ours."""
    student, teacher = torch.rand(2, 3, 4, 6, 5)
    (term,) = SKT(setting(Tapped(width=4), Tapped(width=4)))(seen([student], [teacher]))
    energies = [f.pow(2).mean(1).reshape(3, -1) for f in (student, teacher)]
    at = [e / e.norm(dim=1, keepdim=True) for e in energies]
    expected = 1000 * (at[0] - at[1]).pow(2).mean() / 255
    torch.testing.assert_close(term.loss(torch.ones(1, 1, 1, 1)), expected)


def test_looks_at_the_last_tap_alone():
    method = SKT(setting(Tapped(blocks=2), Tapped(blocks=3)))
    assert (method.student_taps, method.teacher_taps) == (("blocks.1",), ("blocks.2",))


def test_a_feature_of_zeros_has_a_gradient():
    feature = torch.zeros(1, 2, 3, 3, requires_grad=True)
    structure(feature).sum().backward()
    assert feature.grad.isfinite().all()
