"""A picture cut into overlapping tiles, and put together again without seams.

Each tile is computed with a margin of `halo` pixels that is thrown away, because near a tile's own
border the network sees padding instead of the picture. What is kept of neighbouring tiles overlaps
by `blend` pixels, over which the later tile fades in. Where the halo holds all that the network
looks at, tiles agree there and the fading changes nothing; where it does not (a network that looks
at the whole picture), it hides the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

Piece = Callable[[np.ndarray], np.ndarray]
"""(h, w, c) uint8 or uint16 -> (s*h, s*w, c) float32 in the same levels, not rounded."""

_BLEND_PX = 16
_BICUBIC_REACH_PX = 3  # alpha and the colours of luma networks are enlarged bicubically


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How to cut, in input pixels. Both `side` and `overlap` are multiples of `step`."""

    side: int
    """Of the square tiles that the network is given, halo included."""
    halo: int
    blend: int
    step: int
    """The corners of tiles are multiples of this."""
    smallest: int
    """No tile may be smaller."""

    @property
    def overlap(self) -> int:
        """By how much neighbouring tiles overlap, halos included."""
        return _up(2 * self.halo + self.blend, self.step)

    def halved(self) -> Tiling | None:
        """Tiles of half the side, or the smallest that can be; None if these are those."""
        if self.side <= self.smallest:
            return None
        return replace(self, side=max(self.smallest, _up(self.side // 2, self.step)))

    def at_most(self, area_px: float) -> Tiling:
        """Square tiles of at most this area, but no smaller than can be."""
        side = math.isqrt(max(0, int(area_px))) // self.step * self.step
        return replace(self, side=max(self.smallest, side))


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in input pixels: it sees start..stop and gives first..last."""

    start: int
    stop: int
    first: int
    last: int


def tiling_for(facts: ModelFacts, side: int) -> Tiling:
    """The tiling that these facts ask for, with tiles of about `side` pixels."""
    halo = max(facts.halo_px, _BICUBIC_REACH_PX if facts.scale > 1 else 0)
    step = math.lcm(facts.size_multiple, facts.tile_phase_px)
    overlap = _up(2 * halo + _BLEND_PX, step)
    # Smaller ones would be nearly all overlap, and their number without end.
    smallest = max(overlap + _up(_BLEND_PX, step), _up(facts.min_size_px, step) + step)
    return Tiling(
        side=max(smallest, _up(side, step)),
        halo=halo,
        blend=_BLEND_PX,
        step=step,
        smallest=smallest,
    )


def spans(length: int, tiling: Tiling) -> list[Span]:
    """Cut one axis into as few tiles as needed, of one size but for the last's remainder.

    A tile at the border of the picture keeps that side whole: the network sees there what it would
    see in the whole picture. The last tile is moved back to end with the picture.
    """
    if length <= tiling.side:
        return [Span(0, length, 0, length)]
    count = math.ceil((length - tiling.overlap) / (tiling.side - tiling.overlap))
    even = _up(math.ceil((length + (count - 1) * tiling.overlap) / count), tiling.step)
    side = max(even, tiling.smallest)
    furthest = _up(length - side, tiling.step)
    starts = [min(i * (side - tiling.overlap), furthest) for i in range(count)]
    stops = [*(start + side for start in starts[:-1]), length]
    return [
        Span(
            start,
            stop,
            0 if start == 0 else start + tiling.halo,
            length if stop == length else stop - tiling.halo,
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


def restore_tiled(
    pixels: np.ndarray,
    piece: Piece,
    *,
    scale: int,
    tiling: Tiling,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Restore (h, w, c) uint8 or uint16 to (s*h, s*w, c) of the same type, tile by tile.

    Besides the result, which is assembled in whole numbers, only one tile is held. `progress` is
    told after each tile how many are done, and of how many.

    Raises:
        SparkirError: the network gives NaN.
    """
    height, width, channels = pixels.shape
    rows, columns = spans(height, tiling), spans(width, tiling)
    canvas = np.empty((scale * height, scale * width, channels), pixels.dtype)
    done = 0
    for y in rows:
        band = canvas[_whole(y, scale)]
        upper = band[: _faded(y, tiling, scale)]
        above = upper.copy()
        for x in columns:
            tile = piece(pixels[y.start : y.stop, x.start : x.stop])
            kept = tile[_inside(y, scale), _inside(x, scale)]
            _paint(band[:, _whole(x, scale)], kept, _faded(x, tiling, scale))
            done += 1
            progress(done, len(rows) * len(columns))
        # Whole rows are faded, and not tiles: at a corner four of them meet.
        upper[:] = _mixed(above, upper, _share(len(upper))[:, None, None])
    return canvas


def _paint(canvas: np.ndarray, tile: np.ndarray, faded: int) -> None:
    """Write a tile (h, w, c) in levels; its first `faded` columns fade in over what is there."""
    if bool(np.isnan(tile).any()):
        raise SparkirError("the restored image holds NaN; the network or its weights are broken")
    levels = np.clip(tile, 0, np.iinfo(canvas.dtype).max)
    left = canvas[:, :faded]
    left[:] = _mixed(left, levels[:, :faded], _share(faded)[:, None])
    canvas[:, faded:] = np.rint(levels[:, faded:])


def _mixed(old: np.ndarray, new: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`share` of the new in the old, rounded.

    The old is whole numbers already. Of two values that round alike any mixture does so, too: tiles
    that agree leave no trace of the mixing.
    """
    mixed: np.ndarray = np.rint((1 - share) * old + share * new)
    return mixed


def _share(length: int) -> np.ndarray:
    """(length,) from 0 to 1."""
    return (np.arange(length, dtype=np.float32) + np.float32(0.5)) / np.float32(max(length, 1))


def _faded(span: Span, tiling: Tiling, scale: int) -> int:
    """Over how many pixels of the result this tile fades in: none at the border of the picture."""
    return 0 if span.first == 0 else scale * tiling.blend


def _inside(span: Span, scale: int) -> slice:
    return slice(scale * (span.first - span.start), scale * (span.last - span.start))


def _whole(span: Span, scale: int) -> slice:
    return slice(scale * span.first, scale * span.last)


def _up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step
