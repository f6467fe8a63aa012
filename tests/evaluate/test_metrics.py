import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from sparkir.errors import SparkirError
from sparkir.evaluate.metrics import Convention, luma, psnr_db, ssim, to_uint8

Y4 = Convention(space="y", crop_px=4)
Y0 = Convention(space="y", crop_px=0)
RGB0 = Convention(space="rgb", crop_px=0)
GREY0 = Convention(space="grey", crop_px=0)
CONVENTIONS = [Y4, Y0, RGB0, Convention(space="rgb", crop_px=3), GREY0]


def image_and_noisy(height=29, width=33, seed=0):
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 4)[..., None] + [0, 20, 40]
    image = np.clip(ramp, 0, 255).astype(np.uint8)
    noisy = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    return image, noisy


def planes_slowly(image, convention):
    """The compared channels as lists of rows of numbers."""
    crop, (height, width, _) = convention.crop_px, image.shape
    planes = []
    for channel in range(3 if convention.space == "rgb" else 1):
        rows = []
        for i in range(crop, height - crop):
            row = []
            for j in range(crop, width - crop):
                red, green, blue = (float(value) for value in image[i, j])
                y = 16 + 65.481 / 255 * red + 128.553 / 255 * green + 24.966 / 255 * blue
                grey = 0.299 * red + 0.587 * green + 0.114 * blue
                colours = float(image[i, j, channel])
                row.append({"y": y, "grey": grey, "rgb": colours}[convention.space])
            rows.append(row)
        planes.append(rows)
    return np.array(planes)


def ssim_slowly(x, y):
    """One window after another, each statistic from its definition."""
    weights = np.array(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
         for i in range(11)]
    )  # fmt: skip
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a = (weights * (a - mean_a) ** 2).sum()
            variance_b = (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )  # fmt: skip
    return np.mean(values)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: c.label)
def test_psnr_equals_its_definition(convention):
    image, noisy = image_and_noisy()
    x, y = planes_slowly(noisy, convention), planes_slowly(image, convention)
    expected = 20 * math.log10(255) - 10 * math.log10(((x - y) ** 2).mean())
    assert psnr_db(noisy, image, convention) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: c.label)
def test_ssim_equals_its_definition(convention):
    image, noisy = image_and_noisy()
    x, y = planes_slowly(noisy, convention), planes_slowly(image, convention)
    expected = np.mean([ssim_slowly(a, b) for a, b in zip(x, y, strict=True)])
    assert ssim(noisy, image, convention) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("space", ["y", "rgb"])
def test_ssim_equals_scikit_image_on_the_valid_region(space):
    image, noisy = image_and_noisy(80, 70, seed=1)
    convention = Convention(space=space, crop_px=0)
    pairs = [(luma(noisy), luma(image))]
    if space == "rgb":
        pairs = [(noisy[..., c].astype(float), image[..., c].astype(float)) for c in range(3)]
    maps = [
        structural_similarity(
            x,
            y,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1][5:-5, 5:-5]
        for x, y in pairs
    ]
    assert ssim(noisy, image, convention) == pytest.approx(np.mean(maps), abs=1e-9)


def test_equal_images():
    image, _ = image_and_noisy()
    for convention in CONVENTIONS:
        assert psnr_db(image, image, convention) == math.inf
        assert ssim(image, image, convention) == pytest.approx(1)


def test_crop_leaves_exactly_the_border_out():
    image, _ = image_and_noisy()
    broken = image.copy()
    broken[:4], broken[-4:], broken[:, :4], broken[:, -4:] = 0, 0, 0, 0
    assert psnr_db(broken, image, Y4) == math.inf
    broken[4, 10] ^= 128
    assert psnr_db(broken, image, Y4) < 60


def test_luma_of_known_colours():
    """16 and 235 for black and white; red, green and blue as in ITU-R BT.601."""
    colours = np.array([[[0] * 3, [255] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(colours), [[16, 235, 81.481, 144.553, 40.966]])


def test_labels():
    assert Y4.label == "PSNR-Y studio range, uint8, crop 4 px"
    assert RGB0.label == "PSNR-RGB, uint8, no crop"
    assert Y4.label_of("SSIM") == "SSIM-Y studio range, uint8, crop 4 px"


def test_to_uint8_clips_and_rounds_half_to_even():
    levels = torch.tensor([-3.0, 0.49, 0.5, 1.5, 2.5, 254.5, 255.4, 999.0, math.inf, -math.inf])
    image = (levels.double() / 255).reshape(1, 1, 10)
    # 0.5 / 255 times 255 is exactly 0.5 again in float32, and so are the other halves.
    assert to_uint8(image)[0, :, 0].tolist() == [0, 0, 0, 2, 2, 254, 255, 255, 255, 0]


def test_to_uint8_returns_what_a_file_holds():
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    batch = torch.from_numpy(image).movedim(-1, 1).float() / 255
    assert np.array_equal(to_uint8(batch.requires_grad_()), image)
    assert np.array_equal(to_uint8(batch[0]), image[0])


def test_to_uint8_refuses_nan():
    with pytest.raises(SparkirError, match="holds NaN"):
        to_uint8(torch.tensor([[[0.0, math.nan]]]))


@pytest.mark.parametrize("metric", [psnr_db, ssim])
def test_images_that_cannot_be_compared_are_refused(metric):
    image, _ = image_and_noisy()
    with pytest.raises(SparkirError, match="output 28 x 33, target 29 x 33 px"):
        metric(image[:-1], image, Y0)
    with pytest.raises(SparkirError, match="crop of 4 px leaves nothing of an image of 8 x 33"):
        metric(image[:8], image[:8], Y4)


def test_ssim_of_less_than_a_window_is_refused():
    image, _ = image_and_noisy()
    with pytest.raises(SparkirError, match=r"at least 11 x 11 px after cropping 4 px.* 18 x 33"):
        ssim(image[:18], image[:18], Y4)
    assert ssim(image[:19], image[:19], Y4) == pytest.approx(1)


@pytest.mark.parametrize(("field", "value"), [("space", "Y"), ("crop_px", -1)])
def test_conventions_that_do_not_exist_are_refused(field, value):
    convention = Convention(space="y", crop_px=0)
    object.__setattr__(convention, field, value)  # past the type checker that runs in tests
    with pytest.raises(SparkirError, match=field):
        convention.__post_init__()


def test_a_grey_image_is_compared_as_it_is():
    """One level of error everywhere weighs 1.32 dB less on Y of studio range."""
    image = np.full((20, 20, 3), 100, np.uint8)
    other = image + np.uint8(1)
    assert psnr_db(other, image, GREY0) == pytest.approx(10 * math.log10(255**2))
    assert psnr_db(other, image, GREY0) == pytest.approx(psnr_db(other, image, RGB0))
    studio = psnr_db(other, image, Y0)
    assert studio - psnr_db(other, image, GREY0) == pytest.approx(20 * math.log10(255 / 219))
    assert psnr_db(image, image, GREY0) == float("inf")
    assert GREY0.label == "PSNR-grey, uint8, no crop"
