import torch
from tapped import Tapped, seen, setting
from torch import nn

from sparkir.distill.fitnet import FitNet


def test_by_hand():
    """Equal widths: no projection, the mean absolute difference of each pair."""
    method = FitNet(setting(Tapped(width=4), Tapped(width=4)))
    assert [type(p) for p in method.projections] == [nn.Identity, nn.Identity]
    student = [torch.tensor([1.0, 2, 3, 4]).view(1, 2, 1, 2), torch.ones(1, 2, 1, 2)]
    teacher = [torch.tensor([1.0, 4, 3, 1]).view(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)]
    terms = method(seen(student, teacher))
    assert terms[0].distance.flatten().tolist() == [0, 2, 0, 3]
    one = torch.ones(1, 1, 1, 2)
    assert [term.loss(one).item() for term in terms] == [1.25, 1.0]
    assert {term.name for term in terms} == {"fitnet"}


def test_projection_by_hand():
    """Widths 2 and 1: the convolution's own weights and bias, then the difference."""
    method = FitNet(setting(Tapped(width=2, blocks=1), Tapped(width=1, blocks=1)))
    (projection,) = method.projections
    assert projection.weight.shape == (1, 2, 1, 1)
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([2.0, -1]).view(1, 2, 1, 1))
        projection.bias.fill_(0.5)
    student = torch.tensor([[1.0, 2], [3, 4]]).view(1, 2, 1, 2)  # channel 0: 1, 2; channel 1: 3, 4
    (term,) = method(seen([student], [torch.zeros(1, 1, 1, 2)]))
    assert term.distance.flatten().tolist() == [0.5, 0.5]  # |2 - 3 + 0.5|, |4 - 4 + 0.5|


def test_factor_replaces_the_published_one():
    assert FitNet(setting(Tapped(), Tapped())).factor == 1
    method = FitNet(setting(Tapped(), Tapped()), factor=0.25)
    feature = torch.ones(1, 4, 2, 2)
    terms = method(seen([feature, feature], [feature, 3 * feature]))
    assert [term.loss(torch.ones(1, 1, 2, 2)).item() for term in terms] == [0, 0.5]


def test_features_of_another_size_are_averaged():
    """A student that enlarges at its beginning has features four times as many."""
    made = setting(Tapped(enlarge_first=True), Tapped())
    assert [tuple(s) for s, _ in made.shapes] == [(1, 4, 24, 24)] * 2
    assert [tuple(t) for _, t in made.shapes] == [(1, 4, 12, 12)] * 2
    student = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 4, 4, 4)
    terms = FitNet(made)(seen([student] * 2, [torch.zeros(1, 4, 2, 2)] * 2))
    assert terms[0].distance[0, 0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_making_projections_disturbs_no_draw():
    made = setting(Tapped(width=2), Tapped(width=4))
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    method = FitNet(made)
    assert [tuple(p.weight.shape[:2]) for p in method.projections] == [(4, 2), (4, 2)]
    assert torch.equal(torch.rand(2), expected)
