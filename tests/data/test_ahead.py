"""Batches cut ahead are those that would be cut in time."""

import json
import time

import pytest
import torch

from sparkir.data.ahead import SampledAhead
from sparkir.data.degrade import BicubicDownscale, GaussianNoise
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.errors import SparkirError


@pytest.fixture(params=[BicubicDownscale(2), GaussianNoise((5, 25))], ids=str)
def pairs(request, save, photo, cache):
    paths = [save(f"hr/{i}.png", photo(33 + i, 50 - i, seed=i)) for i in range(3)]
    return PairStore.from_images(paths, request.param, cache=cache)


def sampler(pairs, seed=0):
    return PatchSampler(pairs, patch_px=8, batch=2, seed=seed)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_batches_are_the_same_and_so_is_the_state(pairs):
    plain, ahead = sampler(pairs), SampledAhead(sampler(pairs))
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(7):
        assert_same(ahead.next(), plain.next())
        assert ahead.state_dict() == plain.state_dict()


def test_it_goes_on_after_the_last_batch_that_was_given(pairs):
    first = SampledAhead(sampler(pairs))
    for _ in range(4):
        first.next()
    saved = json.loads(json.dumps(first.state_dict()))
    expected = [first.next() for _ in range(4)]
    again = SampledAhead(sampler(pairs, seed=9))
    again.next()  # which has cut one ahead
    again.load_state_dict(saved)
    assert again.state_dict() == saved
    for batch in expected:
        assert_same(again.next(), batch)


def test_a_state_of_other_images_is_refused(pairs, save, photo, cache):
    other = PairStore.from_images(
        [save("other/x.png", photo(40, 40))], BicubicDownscale(2), cache=cache
    )
    ahead = SampledAhead(sampler(pairs))
    with pytest.raises(SparkirError, match="not those of the saved run"):
        ahead.load_state_dict(sampler(other).state_dict())


def test_an_error_is_raised_where_the_batch_is_asked_for(pairs, monkeypatch):
    ahead = SampledAhead(sampler(pairs))
    ahead.next()
    ahead._pending.result()

    def broken(*arguments, **options):
        raise SparkirError("the disk is gone")

    monkeypatch.setattr(PairStore, "crop", broken)
    ahead.next()  # was cut before
    with pytest.raises(SparkirError, match="the disk is gone"):
        ahead.next()


def test_it_is_cut_while_the_caller_waits(pairs, monkeypatch):
    slow_s = 0.05
    cut = PairStore.crop

    def slowly(*arguments, **options):
        time.sleep(slow_s / 2)
        return cut(*arguments, **options)

    monkeypatch.setattr(PairStore, "crop", slowly)
    ahead = SampledAhead(sampler(pairs))
    ahead.next()
    waited_s = []
    for _ in range(5):
        time.sleep(3 * slow_s)  # as for a GPU
        began_s = time.perf_counter()
        ahead.next()
        waited_s.append(time.perf_counter() - began_s)
    assert min(waited_s) < slow_s / 5
