"""Grey images: which grey, and degradations that stay grey."""

import numpy as np
import pytest

from sparkir.data.degrade import BicubicDownscale, Degradation, GaussianNoise, JpegCompression
from sparkir.data.grey import OfGrey, full_luma, to_grey
from sparkir.data.pairs import PairStore, PatchSampler


def test_grey_by_hand():
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert to_grey(image)[0].tolist() == [[76] * 3, [150] * 3, [29] * 3, [255] * 3]
    np.testing.assert_allclose(full_luma(image)[0], [76.245, 149.685, 29.07, 255])


def test_grey_stays_what_it_is():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(to_grey(levels), levels)


@pytest.mark.parametrize(
    "inner", [BicubicDownscale(2), GaussianNoise(25), JpegCompression(10), JpegCompression((5, 50))]
)
class TestOfGrey:
    def test_is_a_degradation_that_stays_grey(self, inner, photo):
        made = OfGrey(inner)
        assert isinstance(made, Degradation)
        assert (made.scale, made.fixed) == (inner.scale, inner.fixed)
        assert repr(inner) in repr(made)  # names cached results
        lq = made(to_grey(photo(32, 48)), np.random.default_rng(0))
        assert (lq == lq[:, :, :1]).all()
        assert lq.shape == (32 // inner.scale, 48 // inner.scale, 3)

    def test_is_the_inner_one_on_a_single_channel(self, inner, photo):
        hr = to_grey(photo(32, 48))
        lq = OfGrey(inner)(hr, np.random.default_rng(1))
        expected = inner(hr[:, :, :1], np.random.default_rng(1))
        np.testing.assert_array_equal(lq[:, :, :1], expected)


def test_noise_of_grey_is_as_strong_as_asked(photo):
    """The luma of three independent noises would be of deviation 16.7."""
    hr = np.full((200, 200, 3), 128, np.uint8)
    lq = OfGrey(GaussianNoise(25))(hr, np.random.default_rng(0))
    assert full_luma(lq).std() == pytest.approx(25, rel=0.03)


def test_a_grey_jpeg_keeps_the_grey(photo):
    """JPEG of one channel, and of three equal ones, differ by rounding at most."""
    hr = to_grey(photo(48, 48))
    rng = np.random.default_rng(0)
    one, three = OfGrey(JpegCompression(30))(hr, rng), JpegCompression(30)(hr, rng)
    assert np.abs(one.astype(int) - three).max() <= 1


def test_stores_are_grey(save, photo, cache):
    paths = [save(f"{name}.png", photo(24, 30, seed=i)) for i, name in enumerate("ab")]
    pairs = PairStore.from_images(paths, GaussianNoise(25), cache=cache, grey=True)
    for index, path in enumerate(paths):
        lq, gt = pairs.pair(index)
        np.testing.assert_array_equal(gt, to_grey(photo(24, 30, seed=index)), path)
        assert (lq == lq[:, :, :1]).all()
    lq, gt = PatchSampler(pairs, patch_px=8, batch=3, seed=0).next()
    assert (lq == lq[:, :1]).all()
    assert (gt == gt[:, :1]).all()


def test_pairs_of_files_are_grey_on_both_sides(save, photo, cache, tmp_path):
    for folder, seed in (("input", 1), ("target", 2)):
        save(f"{folder}/a.png", photo(20, 20, seed=seed))
    from sparkir.data.layouts import pair_files

    pairs = PairStore.from_files(pair_files(tmp_path), cache=cache, grey=True)
    for image, seed in zip(pairs.pair(0), (1, 2), strict=True):
        np.testing.assert_array_equal(image, to_grey(photo(20, 20, seed=seed)))
