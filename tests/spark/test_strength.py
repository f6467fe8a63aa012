import math

import pytest
import torch
from torch import nn, optim

from sparkir.spark.reward import reward
from sparkir.spark.strength import Strength


def test_one_move_by_hand():
    strength = Strength(0.5, rate=1.5)
    told = strength.learn(torch.tensor([0.3, -0.1]))
    assert told["lead"] == pytest.approx(0.1)
    assert told["strength"] == pytest.approx(0.5 * math.exp(1.5 * math.tanh(1.0)))
    assert strength.value.item() == told["strength"]


def test_the_lead_is_a_running_mean():
    strength = Strength(1.0, rate=1.5)
    leads = [strength.learn(torch.tensor([value]))["lead"] for value in (1.0, 0.0, 0.0, 1.0)]
    assert leads == pytest.approx([1.0, 0.5, 1 / 3, 1 / 3 + 0.3 * 2 / 3])


@pytest.mark.parametrize(("lead", "end"), [(1.0, 10), (-1.0, 0.01)])
def test_stays_within_its_bounds(lead, end):
    strength = Strength(0.3, rate=1.5)
    for _ in range(20):
        told = strength.learn(torch.tensor([lead]))
    assert told["strength"] == pytest.approx(end)


def test_comes_back_when_the_student_falls_behind():
    strength = Strength(0.3, rate=1.5)
    for lead in (*[-1.0] * 10, *[1.0] * 10):
        told = strength.learn(torch.tensor([lead]))
    assert told["strength"] == 10


def test_no_lead_is_no_move():
    assert Strength(0.3, rate=1.5).learn(torch.zeros(4)) == {
        "strength": pytest.approx(0.3),
        "lead": 0,
    }


def test_at_no_rate_it_stays():
    strength = Strength(0.3, rate=0.0)
    assert strength.learn(torch.ones(4))["strength"] == pytest.approx(0.3)


def test_its_state_goes_on():
    first, second = Strength(0.3, rate=1.5), Strength(7.0, rate=1.5)
    first.learn(torch.tensor([0.02]))
    second.load_state_dict(first.state_dict())
    lead = torch.tensor([-0.05])
    assert first.learn(lead) == second.learn(lead)


@pytest.mark.parametrize("is_right", [True, False])
def test_a_right_teacher_is_followed_and_a_wrong_one_left(is_right):
    """A student learns to undo a filter; its teacher undoes it, or a part of it."""
    torch.manual_seed(0)
    strength, student = Strength(0.3, rate=1.5), nn.Conv2d(3, 3, 3, padding=1)
    optimizer = optim.Adam(student.parameters(), lr=0.02)
    for step in range(400):
        gt = torch.rand(4, 3, 16, 16)
        teacher = gt if is_right else 0.7 * gt
        output = student(0.5 * gt)
        if step % 8 == 0:
            strength.learn(reward(teacher, output.detach(), gt, alpha=1.0, beta=10.0))
        imitation = strength.value * (output - teacher).square().mean()
        optimizer.zero_grad()
        ((output - gt).square().mean() + imitation).backward()
        optimizer.step()
    followed = strength.value.item()
    assert followed == 10 if is_right else followed < 0.1
    assert (output - gt).square().mean() < (0.9 * gt - gt).square().mean()
