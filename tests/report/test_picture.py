"""The picture: where it looks, how weights are painted, and how panels are laid out."""

import numpy as np
import pytest

from sparkir.report.picture import Panel, compose, crop, paint_weights, sharpest_corner

PANEL_PX = 240


def luma(image: np.ndarray) -> np.ndarray:
    return image.astype(float) @ np.array([0.299, 0.587, 0.114])


def panel(shade: int, height: int = 6, width: int = 6) -> Panel:
    image = np.full((height, width, 3), shade, np.uint8)
    return Panel(title=f"method {shade}", note="30.00 dB", image=image)


# Where to look --------------------------------------------------------------------------------


@pytest.mark.parametrize("corner", [(0, 0), (37, 12), (8, 70), (60, 80)])
def test_the_textured_patch_is_found(corner):
    top, left = corner
    y, x = np.mgrid[:92, :112]
    image = np.repeat((y + x)[..., None], 3, axis=2).astype(np.uint8)  # a smooth slope
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    image[top : top + 32, left : left + 32] = board[..., None]
    found = np.array(sharpest_corner(image, 32))
    assert np.abs(found - corner).max() <= 1  # the edge of the patch is detail as well


def slow_sharpest(image: np.ndarray, side: int) -> float:
    """The most detail that any window has, by looking at every one."""
    grey = image.astype(float).mean(-1)
    return max(
        detail_in(grey, top, left, side)
        for top in range(image.shape[0] - side)
        for left in range(image.shape[1] - side)
    )


def detail_in(grey: np.ndarray, top: int, left: int, side: int) -> float:
    """Differences to the next pixel below and to the right, of side x side pixels."""
    window = grey[top : top + side + 1, left : left + side + 1]
    down, right = np.diff(window, axis=0)[:, :-1], np.diff(window, axis=1)[:-1]
    return float(np.abs(down).sum() + np.abs(right).sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_window_has_more_detail(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (17, 23, 3)).astype(np.uint8)
    side = int(rng.integers(2, 12))
    top, left = sharpest_corner(image, side)
    found = detail_in(image.astype(float).mean(-1), top, left, side)
    assert found == pytest.approx(slow_sharpest(image, side))


@pytest.mark.parametrize("shape", [(40, 40), (41, 40), (40, 64), (30, 50), (2, 9)])
def test_the_window_lies_inside_the_image(shape):
    """Also when it is as large as the image."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    side = min(40, *shape)
    corner = sharpest_corner(image, side)
    assert crop(image, corner, side).shape == (side, side, 3)


def test_an_image_without_detail():
    assert sharpest_corner(np.full((20, 30, 3), 7, np.uint8), 8) == (0, 0)


def test_crop_is_the_window():
    image = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    assert np.array_equal(crop(image, (2, 3), 4), image[2:6, 3:7])


# Weight maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_more_weight_is_brighter(shade):
    weights = np.linspace(0.2, 0.8, 200, dtype=np.float32)[None]
    painted = paint_weights(weights, np.full((1, 200, 3), shade, np.uint8))
    brightness = luma(painted)[0]
    # Each channel is cut to a whole level, so two neighbours may differ by less than one.
    assert np.all(np.diff(brightness) > -1)
    assert np.all(np.diff(brightness[::10]) > 0)
    assert brightness[-1] - brightness[0] > 100


def test_the_map_is_stretched_to_its_own_extremes():
    image = np.full((4, 4, 3), 100, np.uint8)
    weights = np.arange(16, dtype=np.float32).reshape(4, 4)
    one, other = paint_weights(weights, image), paint_weights(5 + weights / 9, image)
    assert np.abs(one.astype(int) - other).max() <= 1  # roundings


def test_the_image_shows_through():
    weights = np.full((1, 2), 0.5, np.float32)
    weights[0, 0] = 0.5
    image = np.array([[[0] * 3, [255] * 3]], np.uint8)
    dark, light = luma(paint_weights(weights, image))[0]
    assert 50 < light - dark < 100


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_constant_map(value):
    painted = paint_weights(np.full((5, 7), value, np.float32), np.zeros((5, 7, 3), np.uint8))
    assert painted.shape == (5, 7, 3)
    assert painted.dtype == np.uint8
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 1


def test_colours_do_not_wrap_around():
    weights = np.array([[0.0, 1.0]], np.float32)
    painted = paint_weights(weights, np.full((1, 2, 3), 255, np.uint8))
    assert painted[0, 1, 0] > 240  # red of the brightest colour, over white


# Layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 12))
def test_every_panel_has_its_place(count):
    panels = [panel(20 * index) for index in range(count)]
    sheet = compose(panels, title="title", subtitle="subtitle")
    assert sheet.dtype == np.uint8
    places = []
    for index in range(count):
        same = np.all(sheet == 20 * index, axis=-1)
        rows, columns = (
            np.flatnonzero(same.sum(1) >= PANEL_PX),
            np.flatnonzero(same.sum(0) >= PANEL_PX),
        )
        assert rows[-1] - rows[0] + 1 == PANEL_PX
        assert columns[-1] - columns[0] + 1 == PANEL_PX
        places.append((rows[0], columns[0]))
    assert len(set(places)) == count
    assert places == sorted(places)  # row by row, from left to right
    assert len({top for top, _ in places}) == -(-count // 5)


def test_rows_make_the_sheet_taller_and_columns_do_not():
    shapes = {
        count: compose([panel(0)] * count, title="", subtitle="").shape for count in (1, 5, 6)
    }
    assert shapes[1] == shapes[5]
    assert shapes[6][0] - shapes[5][0] > PANEL_PX
    assert shapes[6][1] == shapes[5][1]
    assert 5 * PANEL_PX < shapes[5][1] < 5 * PANEL_PX + 100


def test_columns_can_be_chosen():
    one = compose([panel(0)] * 4, title="", subtitle="", columns=2)
    other = compose([panel(0)] * 4, title="", subtitle="", columns=4)
    assert one.shape[0] > other.shape[0]
    assert one.shape[1] < other.shape[1]


def test_pixels_are_enlarged_without_smoothing():
    image = (np.indices((4, 4)).sum(0) % 2 * 200).astype(np.uint8)
    image = np.repeat(image[..., None], 3, axis=2)
    sheet = compose([Panel(title="", note="", image=image)], title="", subtitle="", columns=1)
    shades = set(np.unique(sheet[70:310, 12:252]))
    assert shades == {0, 200}


@pytest.mark.parametrize(("height", "width"), [(30, 60), (60, 30), (700, 350)])
def test_an_image_keeps_its_shape(height, width):
    sheet = compose([panel(0, height, width)], title="", subtitle="")
    rows, columns = np.nonzero(np.all(sheet == 0, axis=-1))
    shown = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1])
    assert shown.tolist() == (np.array([height, width]) * PANEL_PX // max(height, width)).tolist()


def test_titles_and_notes_are_written():
    texts = {"title": "", "subtitle": ""}
    empty = compose([Panel(title="", note="", image=panel(0).image)], **texts)
    for changed in (
        compose([Panel(title="QAT", note="", image=panel(0).image)], **texts),
        compose([Panel(title="", note="30 dB", image=panel(0).image)], **texts),
        compose([Panel(title="", note="", image=panel(0).image)], title="demo", subtitle=""),
        compose([Panel(title="", note="", image=panel(0).image)], title="", subtitle="PSNR"),
    ):
        assert changed.shape == empty.shape
        assert not np.array_equal(changed, empty)


def test_long_titles_stay_in_their_panel():
    """A name that ran on would be written over the next one."""
    long = Panel(
        title="QAT + KD, fixed:student_error W4A4 in ONNX Runtime",
        note="n" * 80,
        image=panel(0).image,
    )
    short = Panel(title="", note="", image=panel(0).image)
    sheet = compose([long, short], title="", subtitle="")
    alone = compose([short, short], title="", subtitle="")
    second = slice(12 + PANEL_PX + 6, None)
    assert np.array_equal(sheet[:, second], alone[:, second])
    assert not np.array_equal(sheet, alone)
