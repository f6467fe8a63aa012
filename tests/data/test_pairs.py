import io
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from sparkir.data.degrade import (
    BicubicDownscale,
    GaussianNoise,
    JpegCompression,
    bicubic_resize,
    mod_crop,
)
from sparkir.data.images import read_image
from sparkir.data.layouts import pair_files
from sparkir.data.matching import partners
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.errors import SparkirError


@pytest.fixture
def paths(save, photo):
    return [save(f"hr/{i}.png", photo(33 + i, 50 - i, seed=i)) for i in range(5)]


@pytest.fixture
def folders(save, photo, tmp_path):
    for i in range(3):
        gt = photo(24, 36 + 4 * i, seed=i)
        save(f"target/{i}.png", gt)
        save(f"input/{i}.bmp", bicubic_resize(gt, scale=Fraction(1, 4)))
    return tmp_path / "input", tmp_path / "target"


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


class TestFromImages:
    def test_bicubic_pairs_are_the_whole_images_degraded(self, paths, cache):
        pairs = PairStore.from_images(paths, BicubicDownscale(4), cache=cache)
        assert pairs.names == tuple("01234")
        assert (len(pairs), pairs.scale, pairs.skipped) == (5, 4, ())
        for i, path in enumerate(paths):
            lq, gt = pairs.pair(i)
            np.testing.assert_array_equal(gt, mod_crop(read_image(path), 4))
            np.testing.assert_array_equal(lq, bicubic_resize(gt, scale=Fraction(1, 4)))
            assert pairs.lq_size(i) == lq.shape[:2] == (gt.shape[0] // 4, gt.shape[1] // 4)

    def test_fixed_degradation_is_kept_per_degradation(self, paths, cache, monkeypatch):
        first = PairStore.from_images(paths, BicubicDownscale(2), cache=cache)
        other = PairStore.from_images(paths, BicubicDownscale(2, "replicate"), cache=cache)
        jpeg = PairStore.from_images(paths, JpegCompression(50), cache=cache)
        monkeypatch.setattr("sparkir.data.degrade.bicubic_resize", None)
        again = PairStore.from_images(paths, BicubicDownscale(2), cache=cache)
        np.testing.assert_array_equal(again.pair(0)[0], first.pair(0)[0])
        assert not again.pair(0)[0].flags.writeable
        assert not np.array_equal(other.pair(0)[0], first.pair(0)[0])
        assert jpeg.pair(0)[0].shape == jpeg.pair(0)[1].shape

    def test_random_degradation_repeats_for_whole_images(self, paths, cache):
        one = PairStore.from_images(paths, GaussianNoise((5, 50)), cache=cache)
        noisy = [one.pair(i)[0] for i in range(5)]
        other = PairStore.from_images(paths[::-1], GaussianNoise((5, 50)), cache=cache)
        for i in range(5):  # whatever the order, and whatever was asked before
            np.testing.assert_array_equal(other.pair(4 - i)[0], noisy[i])

    def test_whole_images_do_not_share_their_noise(self, save, photo, cache):
        paths = [save(f"{name}.png", photo(20, 20)) for name in "ab"]
        pairs = PairStore.from_images(paths, GaussianNoise(10), cache=cache)
        assert not np.array_equal(pairs.pair(0)[0], pairs.pair(1)[0])

    def test_progress_counts_decoding_then_degrading(self, paths, cache):
        calls: list[tuple[int, int]] = []
        PairStore.from_images(
            paths, BicubicDownscale(2), cache=cache, progress=lambda *call: calls.append(call)
        )
        assert calls == [(i, 5) for i in (1, 2, 3, 4, 5)] * 2

    def test_broken_image(self, paths, cache):
        paths[2].write_bytes(b"broken")
        with pytest.raises(SparkirError, match=r"2\.png.*data\.skip_broken"):
            PairStore.from_images(paths, BicubicDownscale(2), cache=cache)
        pairs = PairStore.from_images(paths, BicubicDownscale(2), cache=cache, skip_broken=True)
        assert pairs.names == tuple("0134")
        assert "2.png" in pairs.skipped[0]
        lq, gt = pairs.pair(2)
        np.testing.assert_array_equal(gt, mod_crop(read_image(paths[3]), 2))
        np.testing.assert_array_equal(lq, bicubic_resize(gt, scale=Fraction(1, 2)))

    def test_image_smaller_than_the_scale(self, save, photo, cache):
        path = save("tiny.png", photo(7, 100))
        with pytest.raises(SparkirError, match="image tiny is only 100x7 px, for scale 8"):
            PairStore.from_images([path], BicubicDownscale(8), cache=cache)


class TestFromFiles:
    @pytest.mark.parametrize("scale", [None, 4])
    def test_pairs_by_stem(self, folders, cache, scale):
        pairs = PairStore.from_files(partners(*folders), scale=scale, cache=cache)
        assert pairs.names == ("0", "1", "2")
        assert pairs.scale == 4
        for i in range(3):
            lq, gt = pairs.pair(i)
            np.testing.assert_array_equal(lq, read_image(folders[0] / f"{i}.bmp"))
            np.testing.assert_array_equal(gt, read_image(folders[1] / f"{i}.png"))

    def test_equal_sizes_are_scale_one(self, folders, cache):
        assert PairStore.from_files(partners(folders[1], folders[1]), cache=cache).scale == 1

    @pytest.mark.parametrize("side", [0, 1])
    def test_missing_partner(self, folders, cache, side):
        lost = next(folders[side].glob("1.*"))
        lost.unlink()
        kept = next(folders[1 - side].glob("1.*"))
        with pytest.raises(SparkirError, match=rf"{kept.name} has no partner .*{lost.parent.name}"):
            PairStore.from_files(partners(*folders), cache=cache)

    @pytest.mark.parametrize(
        ("input_size", "scale", "rule"),
        [
            ((9, 6), None, "a whole number of times"),  # 2.67 and 6.67 times
            ((12, 10), None, "a whole number of times"),  # 2 and 4
            ((48, 80), None, "a whole number of times"),  # the wrong way round
            ((6, 10), 2, "exactly 2 times"),
            ((24, 39), 1, "exactly 1 times"),
        ],
    )
    def test_sizes_that_do_not_fit(self, save, photo, tmp_path, cache, input_size, scale, rule):
        save("input/a.png", photo(*input_size))
        save("target/a.png", photo(24, 40))
        sizes = f"input is {input_size[1]}x{input_size[0]} px, target 40x24 px"
        with pytest.raises(SparkirError, match=rf"pair a: {sizes}; .*{rule}"):
            PairStore.from_files(
                partners(tmp_path / "input", tmp_path / "target"), scale=scale, cache=cache
            )

    def test_one_scale_for_all(self, folders, save, photo, cache):
        save("input/1.bmp", photo(12, 20))
        with pytest.raises(SparkirError, match=r"pair 1: .*exactly 4 times"):
            PairStore.from_files(partners(*folders), cache=cache)

    def test_same_stem_twice(self, folders, save, photo, cache):
        save("input/1.png", photo(6, 10))
        with pytest.raises(SparkirError, match="both named '1'"):
            PairStore.from_files(partners(*folders), cache=cache)

    def test_half_a_pair_is_skipped_whole(self, folders, cache):
        (folders[0] / "0.bmp").write_bytes(b"broken")
        (folders[1] / "2.png").write_bytes(b"broken")
        with pytest.raises(SparkirError, match=r"0\.bmp.*data\.skip_broken"):
            PairStore.from_files(partners(*folders), cache=cache)
        pairs = PairStore.from_files(partners(*folders), cache=cache, skip_broken=True)
        assert pairs.names == ("1",)
        assert len(pairs.skipped) == 2
        np.testing.assert_array_equal(pairs.pair(0)[1], read_image(folders[1] / "1.png"))
        np.testing.assert_array_equal(pairs.pair(0)[0], read_image(folders[0] / "1.bmp"))

    def test_no_whole_pair(self, folders, cache):
        for name in ("input/0.bmp", "input/1.bmp", "target/2.png"):
            (folders[0].parent / name).write_bytes(b"broken")
        with pytest.raises(SparkirError, match=r"not one whole pair could be read: .*0\.bmp"):
            PairStore.from_files(partners(*folders), cache=cache, skip_broken=True)

    @pytest.mark.data
    def test_development_pairs(self, development_data, cache):
        folder = development_data / "tasks" / "lowlight_LOL_eval15"
        pairs = PairStore.from_files(pair_files(folder), cache=cache)
        assert (len(pairs), pairs.scale) == (15, 1)
        lq, gt = pairs.pair(0)
        assert lq.mean() < 0.5 * gt.mean()


class TestSampler:
    @pytest.fixture
    def pairs(self, paths, cache):
        return PairStore.from_images(paths, BicubicDownscale(2), cache=cache)

    def test_batches_are_contiguous_uint8_tensors(self, pairs):
        lq, gt = PatchSampler(pairs, patch_px=6, batch=7, seed=0).next()
        assert lq.shape == (7, 3, 6, 6)
        assert gt.shape == (7, 3, 12, 12)
        for tensor in (lq, gt):
            assert tensor.dtype == torch.uint8
            assert tensor.is_contiguous()
        lq.zero_()  # a copy of its own: the store is read-only

    def test_patch_is_cut_from_the_pair(self, pairs):
        lq, gt = PatchSampler(pairs, patch_px=5, batch=10, seed=3, augment=False).next()
        for small, large in zip(lq.numpy(), gt.numpy(), strict=True):
            small, large = small.transpose(1, 2, 0), large.transpose(1, 2, 0)
            places = [
                (i, y, x)
                for i in range(len(pairs))
                for y in range(pairs.lq_size(i)[0] - 4)
                for x in range(pairs.lq_size(i)[1] - 4)
                if np.array_equal(pairs.pair(i)[0][y : y + 5, x : x + 5], small)
            ]
            assert len(places) == 1
            i, y, x = places[0]
            expected = pairs.pair(i)[1][2 * y : 2 * y + 10, 2 * x : 2 * x + 10]
            np.testing.assert_array_equal(expected, large)

    def test_augmentation_is_the_same_for_both(self, pairs):
        lq, gt = PatchSampler(pairs, patch_px=12, batch=40, seed=0).next()
        for small, large in zip(lq.numpy(), gt.numpy(), strict=True):
            again = bicubic_resize(large.transpose(1, 2, 0), scale=Fraction(1, 2))
            inner = np.abs(again.astype(int) - small.transpose(1, 2, 0))[2:-2, 2:-2]
            assert inner.max() <= 1  # rows-first rounding is not symmetric under transposition

    def test_all_eight_orientations_are_equally_likely(self, cache, save):
        corner = np.zeros((4, 4, 3), np.uint8)
        corner[0, 1] = 255  # has eight different orientations
        pairs = PairStore.from_images([save("c.png", corner)], JpegCompression(100), cache=cache)
        sampler = PatchSampler(pairs, patch_px=4, batch=800, seed=0)
        counts = Counter(gt.numpy().tobytes() for gt in sampler.next()[1])
        assert len(counts) == 8
        assert min(counts.values()) > 60
        plain = PatchSampler(pairs, patch_px=4, batch=20, seed=0, augment=False).next()[1]
        assert (plain.numpy() == corner.transpose(2, 0, 1)).all()

    def test_crops_reach_every_place(self, cache, save):
        image = np.zeros((4, 5, 3), np.uint8)
        image[..., 0] = np.arange(20).reshape(4, 5)
        pairs = PairStore.from_images([save("p.png", image)], GaussianNoise(1e-6), cache=cache)
        _, gt = PatchSampler(pairs, patch_px=2, batch=400, seed=0, augment=False).next()
        assert set(gt[:, 0, 0, 0].tolist()) == {5 * y + x for y in range(3) for x in range(4)}

    def test_every_image_once_per_epoch_whatever_its_size(self, save, cache):
        paths = [
            save(f"{i}.png", np.full((8 + 30 * i, 8 + 20 * i, 3), i, np.uint8)) for i in range(7)
        ]
        pairs = PairStore.from_images(paths, BicubicDownscale(2), cache=cache)
        sampler = PatchSampler(pairs, patch_px=4, batch=3, seed=1)
        drawn: list[int] = []
        epochs: list[int] = []
        for _ in range(14):
            drawn += sampler.next()[1][:, 0, 0, 0].tolist()
            epochs.append(sampler.epoch)
        rounds = [drawn[i : i + 7] for i in range(0, 42, 7)]
        assert all(sorted(one) == list(range(7)) for one in rounds)
        assert len({tuple(one) for one in rounds}) > 1
        assert epochs == [1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6, 6]

    def test_seed_decides(self, pairs):
        first, same, other = (
            PatchSampler(pairs, patch_px=8, batch=4, seed=seed).next() for seed in (1, 1, 2)
        )
        assert_same(first, same)
        assert not torch.equal(first[0], other[0])

    @pytest.mark.parametrize("degradation", [BicubicDownscale(2), GaussianNoise((5, 50))])
    @pytest.mark.parametrize("before", [0, 1, 3, 8])
    def test_resumes_bit_for_bit(self, paths, cache, degradation, before):
        pairs = PairStore.from_images(paths, degradation, cache=cache)
        sampler = PatchSampler(pairs, patch_px=8, batch=3, seed=5)
        for _ in range(before):
            sampler.next()
        file = io.BytesIO()
        torch.save(sampler.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert json.loads(json.dumps(state)) == state
        expected = [sampler.next() for _ in range(6)]

        resumed = PatchSampler(pairs, patch_px=8, batch=3, seed=77)
        resumed.next()
        resumed.load_state_dict(state)
        for batch in expected:
            assert_same(resumed.next(), batch)
        assert resumed.epoch == sampler.epoch

    @pytest.mark.parametrize("degradation", [BicubicDownscale(2), GaussianNoise((5, 50))])
    @pytest.mark.parametrize("ranks", [2, 3, 6])
    def test_processes_share_the_batches_that_one_would_draw(
        self, paths, cache, degradation, ranks
    ):
        pairs = PairStore.from_images(paths, degradation, cache=cache)
        alone = PatchSampler(pairs, patch_px=8, batch=6, seed=5)
        together = [
            PatchSampler(pairs, patch_px=8, batch=6, seed=5, rank=rank, ranks=ranks)
            for rank in range(ranks)
        ]
        for _ in range(4):
            shares = [sampler.next() for sampler in together]
            assert {len(images) for share in shares for images in share} == {6 // ranks}
            assert_same([torch.cat(parts) for parts in zip(*shares, strict=True)], alone.next())
        assert all(sampler.state_dict() == alone.state_dict() for sampler in together)

    def test_state_is_a_snapshot(self, pairs):
        sampler = PatchSampler(pairs, patch_px=8, batch=3, seed=5)
        sampler.next()
        state = sampler.state_dict()
        copied = json.dumps(state)
        for _ in range(4):
            sampler.next()
        assert json.dumps(state) == copied

    def test_other_images_cannot_be_resumed(self, pairs, paths, cache):
        state = PatchSampler(pairs, patch_px=8, batch=3, seed=5).state_dict()
        fewer = PairStore.from_images(paths[:4], BicubicDownscale(2), cache=cache)
        with pytest.raises(SparkirError, match="not those of the saved run"):
            PatchSampler(fewer, patch_px=8, batch=3, seed=5).load_state_dict(state)

    def test_random_degradation_is_new_for_each_crop(self, save, photo, cache):
        path = save("a.png", photo(8, 8))
        pairs = PairStore.from_images([path], GaussianNoise(10), cache=cache)
        lq, gt = PatchSampler(pairs, patch_px=8, batch=2, seed=0, augment=False).next()
        assert torch.equal(gt[0], gt[1])
        assert not torch.equal(lq[0], lq[1])

    def test_too_small_image_is_named(self, pairs):
        PatchSampler(pairs, patch_px=16, batch=1, seed=0)  # 33 x 50 at scale 2 is 16 x 25
        with pytest.raises(
            SparkirError, match=r"image 0 is 25x16 px when degraded, .* patch of 17 px"
        ):
            PatchSampler(pairs, patch_px=17, batch=1, seed=0)

    @pytest.mark.parametrize(("patch_px", "batch"), [(0, 1), (1, 0), (-4, 2)])
    def test_nothing_to_sample(self, pairs, patch_px, batch):
        with pytest.raises(SparkirError, match="both must be at least 1"):
            PatchSampler(pairs, patch_px=patch_px, batch=batch, seed=0)
