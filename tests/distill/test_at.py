import torch
from tapped import Tapped, seen, setting

from sparkir.distill.at import AT, attention


def test_by_hand():
    """Energies 3, 4 and 6, 8 differ in size alone; 1, 8 of two channels do not."""
    student = torch.tensor([[1.0, 2], [0, 2]]).view(1, 2, 1, 2)
    teacher = torch.tensor([3.0, 4]).sqrt().view(1, 1, 1, 2)
    root = 65**0.5
    torch.testing.assert_close(
        attention(student).flatten(), torch.tensor([1 / root, 8 / root]), rtol=1e-5, atol=0
    )
    method = AT(setting(Tapped(width=2), Tapped(width=1)))
    terms = method(seen([student, 2 * teacher.expand(1, 2, 1, 2)], [teacher, teacher]))
    expected = torch.tensor([0.6 - 1 / root, 8 / root - 0.8])
    torch.testing.assert_close(terms[0].distance.flatten(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms[1].distance, torch.zeros(1, 1, 1, 2), rtol=0, atol=1e-6)
    assert [term.factor for term in terms] == [1, 1]


def test_each_image_has_its_own_norm():
    feature = torch.rand(2, 3, 4, 5)
    alone = [attention(feature[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(attention(feature), torch.cat(alone))


def test_a_feature_of_zeros_has_a_gradient():
    feature = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention(feature).sum().backward()
    assert feature.grad.isfinite().all()
