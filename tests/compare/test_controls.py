import math

import pytest
import torch

from sparkir.compare.controls import WeightRecord, matched_random, record_of
from sparkir.errors import SparkirError
from sparkir.spark.weighting import weighting


def step(number: int, mean: float, deviation: float) -> dict:
    return {"kind": "step", "step": number, "mean_weight": mean, "weight_deviation": deviation}


def test_the_record_by_hand():
    events = [
        {"kind": "resumed", "step": 1},
        step(1, 0.9, 0.9),  # repeated below, after a kill
        step(1, 0.2, 0.3),
        {"kind": "policy", "step": 1, "mean_weight": 7.0},
        step(2, 0.4, 0.4),
    ]
    record = record_of(events)
    assert record.mean == pytest.approx(0.3)
    assert record.deviation == pytest.approx(math.sqrt((0.09 + 0.16) / 2))


def test_a_training_without_weights_has_no_record():
    assert record_of([{"kind": "step", "step": 1, "loss": 0.1}]) is None


@pytest.mark.parametrize(
    ("mean", "deviation", "grid"),
    [
        (0.5, 0.13, 8),
        (0.8, 0.12, 8),
        (0.1, 0.05, 8),
        (0.5, 0.1, 4),
        (0.3, 0.0, 8),
        (0.95, 0.05, 8),
        (0.999, 0.002, 8),
    ],
)
def test_random_weights_are_scattered_as_those_that_they_are_matched_to(mean, deviation, grid):
    """Drawn by the source itself, on other noise than the matching used."""
    torch.manual_seed(1)
    record = WeightRecord(mean=mean, deviation=deviation)
    source = weighting("random", **matched_random(record, grid=grid))
    images = torch.zeros(2000, 3, 32, 32)
    drawn = source(images, images, images)
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.003)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.03, abs=1e-6)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


@pytest.mark.parametrize(("mean", "deviation"), [(1.5, 0.1), (0.9, 0.3), (-0.2, 0.1)])
def test_weights_that_no_draw_in_the_unit_range_has(mean, deviation):
    with pytest.raises(SparkirError, match=r"no random W in \[0, 1\].*leave random out"):
        matched_random(WeightRecord(mean=mean, deviation=deviation), grid=8)


def test_what_random_w_is_drawn_from_is_the_same_by_any_number_of_threads():
    """A comparison that is gone on with elsewhere would not know its own cells otherwise."""
    before, found = torch.get_num_threads(), []
    record = WeightRecord(mean=0.7218, deviation=0.0279)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(matched_random(record, grid=8))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
