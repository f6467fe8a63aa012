"""Cutting and assembling, against a pixel by pixel reference."""

import itertools

import numpy as np
import pytest
from small_networks import facts

from sparkir.errors import SparkirError
from sparkir.restore.tiles import Span, Tiling, restore_tiled, spans, tiling_for

SIZES = [(37, 41), (40, 200), (130, 90), (64, 64), (1, 300)]


def random_tiling(rng: np.random.Generator) -> Tiling:
    step, halo, blend = (int(rng.integers(1, top)) for top in (6, 8, 7))
    base = tiling_for(
        facts(halo_px=halo, size_multiple=step, min_size_px=int(rng.integers(1, 9))), 1
    )
    tiling = Tiling(side=base.smallest, halo=halo, blend=blend, step=step, smallest=base.smallest)
    return tiling.at_most(int(rng.integers(10, 90)) ** 2)


@pytest.mark.parametrize("seed", range(60))
def test_spans_cover_the_axis_and_keep_their_distance(seed):
    rng = np.random.default_rng(seed)
    tiling, length = random_tiling(rng), int(rng.integers(1, 500))
    cut = spans(length, tiling)
    assert cut[0].first == cut[0].start == 0
    assert cut[-1].last == cut[-1].stop == length
    for span in cut:
        assert span.start % tiling.step == 0
        assert span.stop - span.start <= tiling.side
        assert span.stop - span.start >= min(length, tiling.smallest - tiling.step + 1)
        assert span.start == 0 or span.first == span.start + tiling.halo
        assert span.stop == length or span.last == span.stop - tiling.halo
        assert span.stop == length or span.stop % tiling.step == 0
    for one, other in itertools.pairwise(cut):
        assert other.start > one.start
        assert one.last - other.first >= tiling.blend
        assert other.last >= one.last
        assert other.first + tiling.blend <= one.last


def reference(pixels: np.ndarray, piece, scale: int, tiling: Tiling) -> np.ndarray:
    """Every pixel by itself: tiles side by side make rows, and rows above each other the image."""

    def weight(at: int, span: Span) -> float:
        depth = (at - scale * span.first + 0.5) / (scale * tiling.blend)
        return 1.0 if span.first == 0 else min(1.0, depth)

    height, width, channels = pixels.shape
    canvas = np.zeros((scale * height, scale * width, channels))
    for y in spans(height, tiling):
        row = np.zeros((scale * (y.last - y.first), scale * width, channels))
        for x in spans(width, tiling):
            tile = piece(pixels[y.start : y.stop, x.start : x.stop]).clip(0, 255)
            for at in range(scale * x.first, scale * x.last):
                new = tile[scale * (y.first - y.start) :][: len(row), at - scale * x.start]
                row[:, at] = np.rint(weight(at, x) * new + (1 - weight(at, x)) * row[:, at])
        for index, new in enumerate(row):
            at = scale * y.first + index
            canvas[at] = np.rint(weight(at, y) * new + (1 - weight(at, y)) * canvas[at])
    return canvas


@pytest.mark.parametrize("seed", range(6))
def test_against_the_reference(seed):
    rng = np.random.default_rng(seed)
    tiling = random_tiling(rng)
    scale = int(rng.integers(1, 4))
    pixels = rng.integers(0, 256, (*rng.integers(20, 70, 2), 2), np.uint8)

    def piece(crop: np.ndarray) -> np.ndarray:  # tiles differ, as do those of no network
        shift = 1.7 * np.sin(crop.astype(float).sum())
        return crop.repeat(scale, 0).repeat(scale, 1).astype(np.float32) + np.float32(shift)

    made = restore_tiled(pixels, piece, scale=scale, tiling=tiling).astype(int)
    difference = np.abs(made - reference(pixels, piece, scale, tiling))
    assert difference.max() <= 1  # float32 against float64, on an exact half
    assert (difference > 0).mean() < 1e-3


def blur(crop: np.ndarray, reach: int) -> np.ndarray:
    """A convolution with zeros outside: what a network with this halo does at most."""
    padded = np.pad(crop.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2, (0, 1))
    return windows.mean((-1, -2)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", SIZES)
def test_with_its_halo_a_convolution_comes_out_as_in_the_whole_image(dtype, size):
    top = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(0, top, (*size, 3), dtype, endpoint=True)
    tiling = tiling_for(facts(halo_px=3), 1)
    made = restore_tiled(pixels, lambda crop: blur(crop, 3), scale=1, tiling=tiling)
    assert len(spans(size[0], tiling)) > 1 or len(spans(size[1], tiling)) > 1
    np.testing.assert_array_equal(made, np.rint(blur(pixels, 3)).astype(dtype))


def test_with_less_than_its_halo_it_does_not():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 1), np.uint8)
    made = restore_tiled(pixels, lambda c: blur(c, 9), scale=1, tiling=tiling_for(facts(), 30))
    assert np.abs(made.astype(int) - np.rint(blur(pixels, 9))).max() > 1


def test_a_step_between_tiles_is_faded():
    """A network that looks at the whole image gives every tile another brightness."""
    shifts = iter([100, 160] * 50)
    tiling = tiling_for(facts(halo_px=2), 60)
    flat = np.zeros((150, 150, 1), np.uint8)
    made = restore_tiled(
        flat,
        lambda crop: np.full(crop.shape, next(shifts), np.float32),
        scale=1,
        tiling=tiling,
    ).astype(int)
    assert {100, 160} <= set(np.unique(made))
    steps = [np.abs(np.diff(made, axis=axis)).max() for axis in (0, 1)]
    assert max(steps) <= 60 / tiling.blend + 1


def on_a_grid(crop: np.ndarray) -> np.ndarray:
    """Every pixel becomes the upper left one of its 4 x 4 cell."""
    rows, columns = (np.arange(n) // 4 * 4 for n in crop.shape[:2])
    return crop[rows][:, columns].astype(np.float32)


def test_tiles_start_on_the_phase_that_the_facts_name():
    pixels = np.random.default_rng(0).integers(0, 256, (111, 93, 1), np.uint8)
    exact = tiling_for(facts(halo_px=4, tile_phase_px=4), 30)
    made = restore_tiled(pixels, on_a_grid, scale=1, tiling=exact)
    np.testing.assert_array_equal(made, on_a_grid(pixels))
    free = tiling_for(facts(halo_px=4), 30 + 1)
    assert (restore_tiled(pixels, on_a_grid, scale=1, tiling=free) != made).any()


def test_phase_and_multiple_both_hold():
    tiling = tiling_for(facts(size_multiple=4, tile_phase_px=6), 30)
    assert tiling.step == 12
    assert tiling.side % 12 == 0


def test_values_are_clipped_and_rounded_half_to_even():
    values = np.array([[[-3.0], [0.5], [1.5], [254.6], [400.0], [np.inf]]], np.float32)
    tiling = tiling_for(facts(), 100)
    made = restore_tiled(np.zeros((1, 6, 1), np.uint8), lambda _: values, scale=1, tiling=tiling)
    assert made.ravel().tolist() == [0, 0, 2, 255, 255, 255]


def test_nan_is_refused():
    bad = np.full((4, 4, 1), np.nan, np.float32)
    with pytest.raises(SparkirError, match="NaN"):
        restore_tiled(
            np.zeros((4, 4, 1), np.uint8), lambda _: bad, scale=1, tiling=tiling_for(facts(), 99)
        )


def test_halving_ends_at_the_smallest():
    tiling, sides = tiling_for(facts(halo_px=10, min_size_px=7), 1000), []
    while tiling is not None:
        sides.append(tiling.side)
        last, tiling = tiling, tiling.halved()
    assert sides == [1000, 500, 250, 125, 62, 52]
    assert last.smallest == 52
    assert last.at_most(3).side == 52


def test_progress_counts_tiles():
    told = []
    tiling = tiling_for(facts(), 40)
    restore_tiled(
        np.zeros((100, 50, 3), np.uint8),
        lambda crop: crop.astype(np.float32),
        scale=1,
        tiling=tiling,
        progress=lambda done, total: told.append((done, total)),
    )
    total = len(spans(100, tiling)) * len(spans(50, tiling))
    assert told == [(i + 1, total) for i in range(total)]
