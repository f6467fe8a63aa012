import math

import pytest
import torch
from torch import nn, optim

from sparkir.models.edsr import EDSR
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import prepare
from sparkir.quant.spec import QuantSpec
from sparkir.train.optimize import (
    build_average,
    build_optimizer,
    fast_precision,
    rate_factor,
    set_rates,
)


def factors(steps, schedule, warmup=0):
    return [rate_factor(i, steps=steps, schedule=schedule, warmup=warmup) for i in range(steps)]


class TestSchedule:
    def test_cosine(self):
        found = factors(100, "cosine")
        assert found[0] == 1
        assert found[25] == pytest.approx(0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)
        assert found[50] == pytest.approx(0.505)
        assert found == sorted(found, reverse=True)
        assert rate_factor(100, steps=100, schedule="cosine", warmup=0) == pytest.approx(0.01)

    def test_step_halves_at_every_quarter(self):
        assert factors(8, "step") == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
        assert factors(12, "step") == [1] * 3 + [0.5] * 3 + [0.25] * 3 + [0.125] * 3

    def test_constant(self):
        assert factors(7, "constant") == [1] * 7

    @pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
    def test_warmup_rises_linearly_into_the_schedule(self, schedule):
        plain, warm = factors(40, schedule), factors(40, schedule, warmup=4)
        shares = [warm[i] / plain[i] for i in range(40)]
        assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 36)

    def test_one_step(self):
        assert factors(1, "cosine") == [1]


@pytest.fixture
def prepared():
    student = prepare(EDSR(scale=2, width=4, blocks=1), QuantSpec(weight_bits=4))
    calibrate(student, [torch.rand(1, 3, 8, 8) * 255])
    return student


def build(network, **options):
    defaults = {
        "name": "adamw",
        "learning_rate": 0.1,
        "grid_learning_rate": 0.03,
        "weight_decay": 0.5,
    }
    return build_optimizer(network, **defaults | options)


class TestOptimizer:
    def test_grids_have_their_own_rate_and_no_decay(self, prepared):
        optimizer = build(prepared)
        network, grids = optimizer.param_groups
        named = {id(p): name for name, p in prepared.named_parameters() if p.requires_grad}
        for group, is_grid in ((network, False), (grids, True)):
            assert group["params"]
            assert all(named[id(p)].endswith("log_scale") == is_grid for p in group["params"])
        assert len(named) == len(network["params"]) + len(grids["params"])
        assert (network["lr"], network["weight_decay"]) == (0.1, 0.5)
        assert (grids["lr"], grids["weight_decay"]) == (0.03, 0)

    def test_a_step_without_gradient_shrinks_weights_and_no_grid(self, prepared):
        before = {name: p.detach().clone() for name, p in prepared.named_parameters()}
        optimizer = build(prepared)
        for parameter in prepared.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in prepared.named_parameters():
            factor = 1 if name.endswith("log_scale") else 1 - 0.1 * 0.5
            torch.testing.assert_close(parameter.detach(), factor * before[name])

    def test_fixed_grids_are_left_out(self):
        fixed = prepare(EDSR(scale=2, width=4, blocks=1), QuantSpec(learned="none"))
        (network,) = build(fixed).param_groups
        names = {id(p): name for name, p in fixed.named_parameters()}
        assert not any(names[id(p)].endswith("log_scale") for p in network["params"])

    def test_float_network_has_one_group(self):
        (group,) = build(nn.Conv2d(3, 3, 3), weight_decay=0.0).param_groups
        assert len(group["params"]) == 2

    def test_kinds(self):
        assert type(build(nn.Conv2d(3, 3, 3), name="adam")) is optim.Adam
        assert type(build(nn.Conv2d(3, 3, 3), name="adamw")) is optim.AdamW

    def test_rates_are_scaled_from_where_they_started(self, prepared):
        optimizer = build(prepared)
        for factor in (0.5, 0.25, 1.0):
            set_rates(optimizer, factor)
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([0.1 * factor, 0.03 * factor])


class TestAverage:
    def test_none_without_decay(self):
        assert build_average(EDSR(scale=2, width=4, blocks=1), 0) is None

    @pytest.mark.parametrize("decay", [0.1, 0.3, 0.999])
    def test_against_the_recurrence(self, prepared, decay):
        """From the first update on; the decay is reached slowly."""
        average = build_average(prepared, decay)
        followed = None
        for count in range(8):
            with torch.no_grad():
                for parameter in prepared.parameters():
                    parameter.add_(torch.randn_like(parameter))
            average.update_parameters(prepared)
            now = [p.detach().double() for p in prepared.parameters()]
            if followed is None:
                followed = now
            else:
                keep = min(decay, (1 + count) / (10 + count))
                followed = [keep * a + (1 - keep) * b for a, b in zip(followed, now, strict=True)]
        for found, expected in zip(average.module.parameters(), followed, strict=True):
            torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-5)

    def test_is_a_network_with_facts_and_the_students_zero_points(self, prepared):
        average = build_average(prepared, 0.9)
        average.update_parameters(prepared)
        assert average.module.facts == prepared.facts
        image = torch.rand(1, 3, 8, 8) * 255
        assert torch.equal(average.module.eval()(image), prepared.eval()(image))


def test_fast_precision_knows_this_machine():
    assert fast_precision(torch.device("cpu")) in (True, False)


def test_an_average_has_the_students_own_statistics():
    """Those of batches are running means already, and others' cannot be averaged."""
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = build_average(student, 0.9)
    for step in range(3):
        student(torch.randn(2, 3, 4, 4) + step)
        average.update_parameters(student)
    assert torch.equal(average.module[1].running_mean, student[1].running_mean)
