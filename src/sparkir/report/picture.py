"""The picture a run ends with: the same detail by every method, and where the policy looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_PANEL_PX, _GAP_PX, _CAPTION_PX = 240, 12, 46
_SMALLEST_TEXT_PX = 11
_PAPER, _INK, _FAINT = (250, 250, 248), (24, 24, 27), (110, 110, 115)
# Dark blue to warm yellow, evenly brighter: readable in grey print and with any colour vision.
_SCALE = np.array(
    [(13, 22, 66), (58, 38, 118), (124, 47, 121), (190, 64, 100), (236, 110, 69), (250, 205, 95)],
    dtype=np.float64,
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One cell of the picture."""

    title: str
    note: str
    image: UInt8[np.ndarray, "h w 3"]


def sharpest_corner(image: UInt8[np.ndarray, "h w 3"], side_px: int) -> tuple[int, int]:
    """(top, left) of the window with the most detail: where methods can differ at all."""
    grey = image.astype(np.float64).mean(-1)
    detail = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    total = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = min(side_px, *detail.shape)
    windows = (
        total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    )
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return int(top), int(left)


def crop(
    image: UInt8[np.ndarray, "h w 3"], corner: tuple[int, int], side_px: int
) -> UInt8[np.ndarray, "p q 3"]:
    """A window of the image."""
    top, left = corner
    return image[top : top + side_px, left : left + side_px]


def paint_weights(
    weights: Float[np.ndarray, "h w"], image: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A weight map in colour over the image's own luma; its extremes span the colour scale."""
    low, high = float(weights.min()), float(weights.max())
    level = (weights - low) / max(high - low, 1e-6) * (len(_SCALE) - 1)
    below = np.clip(level.astype(int), 0, len(_SCALE) - 2)
    share = (level - below)[..., None]
    colour = _SCALE[below] * (1 - share) + _SCALE[below + 1] * share
    grey = image.astype(np.float64).mean(-1, keepdims=True)
    painted: np.ndarray = np.clip(0.72 * colour + 0.28 * grey, 0, 255).astype(np.uint8)
    return painted


def compose(
    panels: Sequence[Panel], *, title: str, subtitle: str, columns: int = 5
) -> UInt8[np.ndarray, "h w 3"]:
    """Lay panels out in rows, each as large as its place, with its title and note.

    Pixels are enlarged without smoothing; text that is too long is written smaller, then cut.
    """
    rows = -(-len(panels) // columns)
    head = 70
    width = columns * (_PANEL_PX + _GAP_PX) + _GAP_PX
    height = head + rows * (_PANEL_PX + _CAPTION_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    inner = width - 2 * _GAP_PX
    _write(draw, (_GAP_PX, 12), title, colour=_INK, size_px=22, width_px=inner)
    _write(draw, (_GAP_PX, 42), subtitle, colour=_FAINT, size_px=14, width_px=inner)
    for index, panel in enumerate(panels):
        left = _GAP_PX + index % columns * (_PANEL_PX + _GAP_PX)
        top = head + index // columns * (_PANEL_PX + _CAPTION_PX + _GAP_PX)
        sheet.paste(_fitted(panel.image), (left, top))
        below = top + _PANEL_PX
        _write(draw, (left, below + 5), panel.title, colour=_INK, size_px=16, width_px=_PANEL_PX)
        _write(draw, (left, below + 26), panel.note, colour=_FAINT, size_px=14, width_px=_PANEL_PX)
    return np.asarray(sheet)


def _fitted(image: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """The image with its longer side as long as a panel's."""
    factor = _PANEL_PX / max(image.shape[:2])
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    kind = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    return Image.fromarray(np.ascontiguousarray(image)).resize((width, height), kind)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    *,
    colour: tuple[int, int, int],
    size_px: int,
    width_px: int,
) -> None:
    """Write one line that stays within `width_px`."""
    sizes = range(size_px, _SMALLEST_TEXT_PX - 1, -1)
    fonts = [ImageFont.load_default(size) for size in sizes]
    font = next((f for f in fonts if f.getlength(text) <= width_px), fonts[-1])
    while font.getlength(text) > width_px:
        text = text[:-4] + "..."
    draw.text(place, text, colour, font)
