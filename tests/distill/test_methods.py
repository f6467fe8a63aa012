"""What every method owes the training loop, whatever it computes."""

import copy
import dataclasses
import inspect
from typing import get_args

import pytest
import torch
from tapped import Tapped, lq_images, quantized, setting
from torch import nn

from sparkir.distill.method import Term
from sparkir.distill.methods import method, methods, published
from sparkir.distill.task import DistillationTask
from sparkir.errors import SparkirError
from sparkir.recipe import Distill
from sparkir.spark.weighting import SparkPaper, Weighting, weighting, weightings

FEATURE_METHODS = [name for name in methods() if name != "kd"]


def networks(name: str, *, bits: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher that the method can compare, of other shapes where it may."""
    teacher = Tapped(width=6, blocks=3, value_range=255.0)
    student = Tapped(width=4, blocks=2)
    if name == "blocks":
        student = Tapped(width=6, blocks=3, value_range=255.0)
    return (student if bits is None else quantized(student, bits)), teacher


def task_of(name: str, source: Weighting | None = None, *, bits: int | None = None, **options):
    student, teacher = networks(name, bits=bits)
    made = method(name, setting(student, teacher, steps=100_000))
    return DistillationTask(student, teacher, weighting=source, method=made, **options).train()


def batch():
    draw = torch.Generator().manual_seed(2)
    return lq_images(), torch.rand(2, 3, 24, 24, generator=draw)


def test_recipes_know_them_all():
    assert get_args(Distill.model_fields["method"].annotation) == methods()


def test_kd_is_the_default_and_adds_nothing():
    task = DistillationTask(*networks("kd"))
    assert [term.name for term in task(*batch()).terms] == ["output"]
    assert task.method.state_dict() == {}


@pytest.mark.parametrize("name", methods())
def test_as_published_is_a_distillation(name):
    choice = Distill(**published(name))
    assert choice.method == name
    if name != "kd":
        assert choice.norm == "l1"


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("source", weightings())
def test_one_step_with_every_weighting(name, source):
    """The gradient reaches the student and what trains with it, never teacher or weighting."""
    task = task_of(name, weighting(source))
    student, teacher = task.student, task.teacher
    before = copy.deepcopy(teacher.state_dict())
    trained = [*student.parameters(), *(p for p in task.method.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    losses = task(*batch())
    assert losses.distillation().isfinite() and losses.distillation() > 0
    losses.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.abs().max() > 0 for p in student.first.parameters())
    assert all(p.grad is None for p in [*teacher.parameters(), *task.weighting.parameters()])
    optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())


@pytest.mark.parametrize("name", FEATURE_METHODS)
@pytest.mark.parametrize("bits", [None, 4])
def test_gradient_of_its_own_terms(name, bits):
    """A published re-implementation cut it off by copying the losses into a new tensor."""
    task = task_of(name, bits=bits, strength=0.0)
    losses = task(*batch())
    trained = [p for p in task.student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(losses.distillation(), trained, allow_unused=True)
    reached = [g for g in gradients if g is not None and g.abs().max() > 0]
    assert len(reached) >= 2


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_descending_it_brings_the_student_nearer(name):
    task = task_of(name, strength=0.0)
    trained = [*task.student.parameters(), *task.method.parameters()]
    optimizer = torch.optim.Adam([p for p in trained if p.requires_grad], lr=3e-3)
    found = []
    for _ in range(25):
        torch.manual_seed(0)
        loss = task(*batch()).distillation()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.97 * found[0]


@pytest.mark.parametrize("name", methods())
def test_uniform_is_the_plain_method_bit_for_bit(name):
    """Loss and gradients equal those of the plain means of the maps."""
    task = task_of(name, weighting("uniform"), norm="l1")
    parameters = list(task.student.parameters())
    torch.manual_seed(3)
    losses = task(*batch())
    found = torch.autograd.grad(losses.total(), parameters, retain_graph=True)
    plain = losses.reconstruction + sum_of(losses.terms)
    expected = torch.autograd.grad(plain, parameters)
    assert torch.equal(losses.total(), plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def sum_of(terms):
    """As the task adds: terms of one name first."""
    parts = {}
    for term in terms:
        loss = term.factor * term.distance.mean()
        parts[term.name] = parts[term.name] + loss if term.name in parts else loss
    first, *rest = parts.values()
    return sum(rest, start=first)


@pytest.mark.parametrize("name", methods())
def test_weights_scale_every_term(name):
    """A tenth of W everywhere is a tenth of the distillation; no term escapes the weighting."""
    whole, tenth = (
        task_of_seeded(name, weighting("constant", value=value))(*batch()).distillation()
        for value in (1.0, 0.1)
    )
    torch.testing.assert_close(tenth, 0.1 * whole)


def task_of_seeded(name: str, source: Weighting):
    torch.manual_seed(0)
    task = task_of(name, source)
    torch.manual_seed(1)
    return task


@pytest.mark.parametrize("name", methods())
def test_the_step_without_allocation(name):
    """For the look-ahead: each image's mean W on every term's own grid."""
    task = task_of(name, weighting("random"))
    losses = task(*batch())
    expected = losses.reconstruction + sum(
        term.factor
        * sum(term.weights_at(losses.weights)[i].mean() * term.distance[i].mean() for i in range(2))
        / 2
        for term in losses.terms
    )
    torch.testing.assert_close(losses.total_without_allocation(), expected)
    assert not torch.allclose(losses.total(), expected, rtol=1e-7, atol=0)
    gradients = [
        torch.autograd.grad(loss, task.student.first.weight, retain_graph=True)[0]
        for loss in (losses.total_without_allocation(), losses.total(), losses.total())
    ]
    assert not torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[1], gradients[2])  # a second backward finds the same


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_float32_under_autocast(name):
    task = task_of(name, SparkPaper())
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(*batch())
    assert {term.distance.dtype for term in losses.terms} == {torch.float32}
    losses.total().backward()


@pytest.mark.parametrize("name", methods())
def test_a_feature_factor_scales_all_of_its_own_terms(name):
    if name == "kd":
        return
    student, teacher = networks(name)
    found = []
    for doubled in (1, 2):
        made = method(name, setting(student, teacher))
        made = method(name, setting(student, teacher), factor=doubled * made.factor)
        if hasattr(made, "projections"):  # both from the same draws
            torch.manual_seed(0)
            for p in made.projections.parameters():
                nn.init.normal_(p)
        torch.manual_seed(1)
        task = DistillationTask(student, teacher, method=made, strength=0.0).train()
        found.append(task(*batch()).distillation())
    torch.testing.assert_close(found[1], 2 * found[0])


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_needs_features(name):
    student, teacher = networks(name)
    if not method(name, setting(student, teacher)).student_taps:
        pytest.skip("it looks at images alone")
    bare = Tapped(blocks=0)
    with pytest.raises(SparkirError, match=r"the student tapped names no features .* \"kd\""):
        method(name, setting(bare, teacher))
    with pytest.raises(SparkirError, match="the teacher tapped names no features"):
        method(name, setting(student, bare))


def test_weights_are_averaged_onto_a_coarser_map():
    weights = torch.arange(16.0).view(1, 1, 4, 4)
    term = Term(name="coarse", distance=torch.tensor([1.0, 0, 0, 2]).view(1, 1, 2, 2), factor=0.5)
    assert term.weights_at(weights).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert term.loss(term.weights_at(weights)).item() == 0.5 * (2.5 + 25) / 4
    fine = Term(name="fine", distance=torch.ones(1, 1, 4, 4))
    assert fine.weights_at(weights) is weights


def test_the_loop_knows_no_method_by_name():
    from sparkir.train import loop, optimize, state

    for module in (loop, optimize, state):
        assert not any(f'"{name}"' in inspect.getsource(module) for name in methods())


@pytest.mark.parametrize("name", ["at", "fitnet"])
def test_a_wrong_tap_is_found_when_the_method_is_made(name):
    student, teacher = networks(name)
    student.facts = dataclasses.replace(student.facts, taps=("blocks.0", "blocks.9"))
    with pytest.raises(SparkirError, match=r"has no module 'blocks\.9'"):
        method(name, setting(student, teacher))
