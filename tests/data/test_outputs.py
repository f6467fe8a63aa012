import shutil

import numpy as np
import pytest
import torch

from sparkir.data.outputs import fill, loaded, output_store, to_levels
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.errors import SparkirError

SIZES = [(6, 8), (10, 4), (12, 12)]


def numbers(size, seed=0):
    return np.random.default_rng(seed).integers(0, 2**16, (*size, 3), dtype=np.uint16)


def rounded(values):
    return np.rint(to_levels(values)).astype(np.uint16)


def test_what_is_written_is_read(cache):
    store = output_store(cache, ["key"], SIZES)
    assert store.missing() == [0, 1, 2]
    for index in (2, 0, 1):
        store.write(index, numbers(SIZES[index], index))
    again = output_store(cache, ["key"], SIZES)
    assert again.missing() == store.missing() == []
    for index in range(3):
        assert np.array_equal(again[index], numbers(SIZES[index], index))
        assert not again[index].flags.writeable
    assert again.bytes == sum(h * w * 6 for h, w in SIZES)


def test_values_come_back_to_a_250th_of_a_level():
    values = np.linspace(-0.5, 1.49, 100_001, dtype=np.float32)
    found = loaded(rounded(values))
    assert np.abs(found - values).max() <= 2**-16 + 1e-7
    assert np.abs(found - values).max() * 255 < 1 / 250
    half = values.astype(np.float16).astype(np.float32)
    assert np.abs(half - values).max() > 10 * np.abs(found - values).max()
    assert np.array_equal(rounded(found), rounded(values))


def test_other_keys_and_sizes_are_other_stores(cache):
    folders = {
        output_store(cache, key, sizes).folder
        for key, sizes in ((["a"], SIZES), (["b"], SIZES), (["a", ""], SIZES), (["a"], SIZES[:2]))
    }
    assert len(folders) == 4


def test_goes_on_where_it_was_stopped(cache):
    store, computed = output_store(cache, ["key"], SIZES), []

    def compute(index):
        if index == 2 and len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(index)
        return numbers(SIZES[index])

    with pytest.raises(KeyboardInterrupt):
        fill(store, compute)
    told = []
    again = output_store(cache, ["key"], SIZES)
    computed.append("again")
    fill(again, compute, progress=lambda done, total: told.append((done, total)))
    assert computed == [0, 1, "again", 2]
    assert told == [(3, 3)]
    fill(again, compute)
    assert len(computed) == 4


def test_a_full_disk_is_told_before_anything_is_computed(cache, monkeypatch):
    store = output_store(cache, ["key"], SIZES)
    usage = shutil.disk_usage(cache)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        SparkirError, match=r"only 100 bytes.*1,392 bytes are needed.*teacher_cache"
    ):
        fill(store, lambda index: pytest.fail("it computed"))


def test_a_damaged_store_says_so(cache):
    store = output_store(cache, ["key"], SIZES)
    (store.folder / "values.u16").write_bytes(b"12")
    with pytest.raises(SparkirError, match="damaged: wrong size; delete it"):
        output_store(cache, ["key"], SIZES)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_sampler_cuts_and_turns_them_like_the_truth(cache, photo, scale):
    """Stored is the truth itself, so that every crop must be the truth's."""
    gt = [photo(32, 40, seed=seed) for seed in range(3)]
    lq = [image[::scale, ::scale] for image in gt]
    pairs = PairStore(names=list("abc"), gt=gt, lq=lq, scale=scale)
    store = output_store(cache, ["key"], [(32, 40)] * 3)
    fill(store, lambda index: rounded(gt[index].astype(np.float32) / 255))
    options = {"patch_px": 8, "batch": 5, "seed": 3}
    with_them, without = (
        PatchSampler(pairs, outputs=store, **options),
        PatchSampler(pairs, **options),
    )
    for _ in range(6):
        lq_crops, gt_crops, outputs = with_them.next()
        assert outputs.dtype == torch.float32
        assert outputs.is_contiguous()
        torch.testing.assert_close(outputs, gt_crops.float() / 255, rtol=0, atol=2e-5)
        for found, expected in zip((lq_crops, gt_crops), without.next(), strict=True):
            assert torch.equal(found, expected)
    assert with_them.state_dict() == without.state_dict()
