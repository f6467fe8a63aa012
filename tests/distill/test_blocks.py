import copy

import pytest
import torch
from tapped import Tapped, lq_images, quantized, seen, setting

from sparkir.distill.blocks import Blocks
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError


def test_by_hand():
    """Squared gaps 1 and 4 of a feature whose mean square is 10; the other tap is imitated."""
    method = Blocks(setting(Tapped(), Tapped()))
    teacher = torch.tensor([2.0, 4]).view(1, 1, 1, 2).expand(1, 4, 1, 2)
    student = torch.tensor([3.0, 2]).view(1, 1, 1, 2).expand(1, 4, 1, 2)
    terms = method(seen([student, teacher], [teacher, teacher]))
    assert terms[0].distance[0, 0].flatten().tolist() == pytest.approx([0.1, 0.4])
    one = torch.ones(1, 1, 1, 2)
    assert [t.loss(one).item() for t in terms] == pytest.approx([0.1 * 0.25 / 2, 0])


def test_blocks_of_any_size_count_alike():
    method = Blocks(setting(Tapped(), Tapped()))
    student, teacher = torch.rand(2, 1, 4, 3, 3)
    terms = method(seen([student, 100 * student], [teacher, 100 * teacher]))
    torch.testing.assert_close(terms[0].distance, terms[1].distance)


def test_a_quantized_student_against_its_float_self():
    """More bits, less to imitate; none at all where nothing is rounded."""
    teacher = Tapped(value_range=255.0)
    found = {}
    for bits in (3, 8):
        student = quantized(copy.deepcopy(teacher), bits)
        method = Blocks(setting(student, teacher))
        task = DistillationTask(student, teacher, method=method, strength=0.0)
        found[bits] = task(lq_images(), torch.rand(2, 3, 24, 24)).distillation().item()
    assert found[3] > 10 * found[8] > 0
    twin = copy.deepcopy(teacher)
    task = DistillationTask(twin, teacher, method=Blocks(setting(twin, teacher)), strength=0.0)
    assert task(lq_images(), torch.rand(2, 3, 24, 24)).distillation().item() == 0


@pytest.mark.parametrize("other", [{"width": 6}, {"blocks": 3}, {"enlarge_first": True}])
def test_another_architecture_is_refused(other):
    with pytest.raises(SparkirError, match=r"with its float self.*take \"fitnet\""):
        Blocks(setting(Tapped(**other), Tapped()))


def test_of_zeros_is_finite():
    zeros = torch.zeros(1, 4, 2, 2)
    terms = Blocks(setting(Tapped(), Tapped()))(seen([zeros, zeros], [zeros, zeros]))
    assert all(term.distance.isfinite().all() for term in terms)
