import math
from fractions import Fraction

import numpy as np
import pytest

from sparkir.data.degrade import (
    SCALES,
    BicubicDownscale,
    Degradation,
    GaussianNoise,
    JpegCompression,
    bicubic_resize,
    mod_crop,
)
from sparkir.data.images import find_images, read_image
from sparkir.errors import SparkirError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# The reference: imresize as its documentation describes it, one output value at a time. It works
# in exact fractions, so where the true value ends in .5 double precision may fall on either side.


def cubic(x: Fraction) -> Fraction:
    x = abs(x)
    if x <= 1:
        return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
    if x <= 2:
        return -Fraction(1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2
    return Fraction(0)


def outside(j: int, size: int, border: str) -> int:
    if border == "replicate":
        return min(max(j, 0), size - 1)
    while not 0 <= j < size:
        j = -1 - j if j < 0 else 2 * size - 1 - j
    return j


def resized_line(line: list[int], scale: Fraction, border: str) -> list[Fraction]:
    stretch = min(scale, Fraction(1))
    values = []
    for i in range(math.ceil(len(line) * scale)):
        centre = (i + Fraction(1, 2)) / scale - Fraction(1, 2)
        reach = math.ceil(2 / stretch) + 1
        total = weight_sum = Fraction(0)
        for j in range(math.floor(centre) - reach, math.floor(centre) + reach + 1):
            weight = cubic(stretch * (centre - j))
            total += weight * line[outside(j, len(line), border)]
            weight_sum += weight
        values.append(min(max(total / weight_sum, Fraction(0)), Fraction(255)))
    return values


def assert_rounds_to(actual: np.ndarray, exact: list[Fraction]) -> None:
    for level, value in zip(actual.tolist(), exact, strict=True):
        assert abs(level - value) <= Fraction(1, 2), (level, float(value))


SCALES_TESTED = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(1, 8), Fraction(2, 3)]
SCALES_TESTED += [Fraction(1), Fraction(2), Fraction(3), Fraction(4), Fraction(5, 2)]


@pytest.mark.parametrize("border", ["symmetric", "replicate"])
@pytest.mark.parametrize("scale", SCALES_TESTED)
@pytest.mark.parametrize("size", [(13, 8), (7, 17), (1, 3)])
def test_bicubic_against_the_slow_reference(size, scale, border):
    image = rng().integers(0, 256, (*size, 2), dtype=np.uint8)
    resized = bicubic_resize(image, scale=scale, border=border)
    assert resized.shape == (math.ceil(size[0] * scale), math.ceil(size[1] * scale), 2)
    for c in range(2):
        # Columns of the rows-first result, through the intermediate that only height changes.
        between = np.stack(
            [
                bicubic_resize(image[:, [x]], scale=scale, border=border)[:, 0, c]
                for x in range(size[1])
            ],
            axis=1,
        )
        for x in range(size[1]):
            assert_rounds_to(between[:, x], resized_line(image[:, x, c].tolist(), scale, border))
        for y, row in enumerate(between):
            assert_rounds_to(resized[y, :, c], resized_line(row.tolist(), scale, border))


def test_bicubic_takes_halves_up():
    # At scale 1/2 all weights are multiples of 1/128, so double precision is exact.
    line = rng().integers(0, 256, 2000, dtype=np.uint8)
    exact = resized_line(line.tolist(), Fraction(1, 2), "symmetric")
    resized = bicubic_resize(line[:, np.newaxis, np.newaxis], scale=Fraction(1, 2))[:, 0, 0]
    halves = [i for i, value in enumerate(exact) if value % 1 == Fraction(1, 2)]
    assert len(halves) > 2
    assert [resized[i] for i in halves] == [math.ceil(exact[i]) for i in halves]


def test_bicubic_at_scale_one_changes_nothing(photo):
    np.testing.assert_array_equal(bicubic_resize(photo(9, 6), scale=1), photo(9, 6))


def test_bicubic_keeps_a_constant_and_clips_overshoot():
    flat = np.full((10, 9, 3), 77, np.uint8)
    for scale in (Fraction(1, 3), 0.37, 3):
        assert (bicubic_resize(flat, scale=scale) == 77).all()
    edge = np.repeat(np.array([0, 255], np.uint8), 8)[:, np.newaxis, np.newaxis]
    assert bicubic_resize(edge, scale=3)[:, 0, 0].min() == 0
    assert bicubic_resize(edge, scale=3)[:, 0, 0].max() == 255


@pytest.mark.parametrize(("folder", "border"), [("Set5", "symmetric"), ("Set14", "replicate")])
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.data
def test_bicubic_is_matlab_bit_for_bit(development_data, folder, border, scale):
    images = find_images(development_data / "test" / folder / "HR")
    assert len(images) == {"Set5": 5, "Set14": 14}[folder]
    other_border = "replicate" if border == "symmetric" else "symmetric"
    differ_with_other_border = 0
    for path in images:  # the grey `bridge` of Set14 included, as three equal channels
        hr = mod_crop(read_image(path), scale)
        name = f"{path.stem}x{scale}.png"
        lr = read_image(path.parents[1] / "LR_bicubic" / f"X{scale}" / name)
        degraded = BicubicDownscale(scale, border)(hr, rng())
        np.testing.assert_array_equal(degraded, lr, err_msg=path.stem)
        wrong = BicubicDownscale(scale, other_border)(hr, rng())
        differ_with_other_border += not np.array_equal(wrong, lr)
    assert differ_with_other_border > 0


def test_mod_crop_takes_from_the_bottom_and_right(photo):
    image = photo(11, 13)
    np.testing.assert_array_equal(mod_crop(image, 4), image[:8, :12])
    np.testing.assert_array_equal(mod_crop(image, 1), image)
    assert np.shares_memory(mod_crop(image, 4), image)


@pytest.mark.parametrize(
    ("degradation", "fixed", "scale"),
    [
        (BicubicDownscale(2), True, 2),
        (BicubicDownscale(8, border="replicate"), True, 8),
        (GaussianNoise(25), False, 1),
        (GaussianNoise((5.0, 50)), False, 1),
        (JpegCompression(40), True, 1),
        (JpegCompression((40, 40)), True, 1),
        (JpegCompression((10, 90)), False, 1),
    ],
)
def test_protocol(degradation, fixed, scale, photo):
    assert isinstance(degradation, Degradation)
    assert (degradation.fixed, degradation.scale) == (fixed, scale)
    first, second = (degradation(photo(32, 48), rng(seed)) for seed in (0, 1))
    assert first.shape == (32 // scale, 48 // scale, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second) == fixed
    np.testing.assert_array_equal(first, degradation(photo(32, 48), rng(0)))


def test_repr_tells_degradations_apart():
    every = [BicubicDownscale(s, b) for s in SCALES for b in ("symmetric", "replicate")]
    every += [GaussianNoise(15), GaussianNoise((15, 25)), JpegCompression(15), JpegCompression(16)]
    assert len({repr(one) for one in every}) == len(every)


def test_noise_has_the_asked_deviation_and_no_bias_or_correlation():
    grey = np.full((200, 200, 3), 128, np.uint8)
    noise = GaussianNoise(15)(grey, rng()).astype(float) - 128
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - math.sqrt(15**2 + 1 / 12)) < 0.15  # rounding adds 1/12
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.02


def test_noise_is_clipped_and_does_not_wrap():
    dark, bright = (np.full((50, 50, 1), v, np.uint8) for v in (0, 255))
    assert 0 < GaussianNoise(20)(dark, rng()).max() < 130
    assert 125 < GaussianNoise(20)(bright, rng()).min() < 255


def test_noise_range_draws_one_sigma_per_image():
    grey = np.full((64, 64, 3), 128, np.uint8)
    generator, noise = rng(), GaussianNoise((5, 25))
    drawn = [noise(grey, generator).astype(float) for _ in range(60)]
    deviations = np.array([image.std() for image in drawn])
    assert 4.7 < deviations.min() < 7
    assert 23 < deviations.max() < 25.7
    halves = np.array([(image[:32].std(), image[32:].std()) for image in drawn])
    np.testing.assert_allclose(halves[:, 0], halves[:, 1], rtol=0.1)


def test_jpeg_is_worse_at_lower_quality(photo):
    image = photo(64, 64).astype(float)
    errors = [np.abs(JpegCompression(q)(photo(64, 64), rng()) - image).mean() for q in (10, 50, 95)]
    assert errors[0] > 1.2 * errors[1] > 1.44 * errors[2] > 0


def test_jpeg_range_stays_within_and_reaches_both_ends(photo):
    image, generator = photo(32, 32), rng()
    possible = {q: JpegCompression(q)(image, rng()).tobytes() for q in (30, 31, 32)}
    drawn = {JpegCompression((30, 32))(image, generator).tobytes() for _ in range(40)}
    assert drawn == set(possible.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: BicubicDownscale(5),
        lambda: BicubicDownscale(1),
        lambda: BicubicDownscale(0),
        lambda: GaussianNoise(0),
        lambda: GaussianNoise(-1.0),
        lambda: GaussianNoise((20, 10)),
        lambda: GaussianNoise((0, 10)),
        lambda: GaussianNoise(math.nan),
        lambda: GaussianNoise(math.inf),
        lambda: JpegCompression(0),
        lambda: JpegCompression(101),
        lambda: JpegCompression((90, 10)),
    ],
)
def test_bad_arguments_are_explained(make):
    with pytest.raises(SparkirError, match=r"choose one of|give "):
        make()
