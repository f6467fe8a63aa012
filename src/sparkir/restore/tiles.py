"""A picture cut into overlapping tiles, and put together again without seams.

Each tile is computed with a margin of `halo` pixels that is thrown away, because near a tile's own
border the network sees padding instead of the picture. What is kept of neighbouring tiles overlaps
by `blend` pixels, over which the later tile fades in. Where the halo holds all that the network
looks at, tiles agree there and the fading changes nothing; where it does not (a network that looks
at the whole picture), it hides the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
    smallest = max(overlap + step, _up(facts.min_size_px, step) + step)
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
    for done, (y, x) in enumerate(_pairs(rows, columns), 1):
        tile = piece(pixels[y.start : y.stop, x.start : x.stop])
        kept = tile[_inside(y, scale), _inside(x, scale)]
        _paint(canvas[_whole(y, scale), _whole(x, scale)], kept, y, x, scale * tiling.blend)
        progress(done, len(rows) * len(columns))
    return canvas


def _paint(canvas: np.ndarray, tile: np.ndarray, y: Span, x: Span, blend: int) -> None:
    """Write a tile (h, w, c) in levels over what is there; its upper and left edges fade in.

    What is there is whole numbers already. Of two equal values any mixture rounds as they do, so
    that tiles which agree leave no trace of the mixing.
    """
    if bool(np.isnan(tile).any()):
        raise SparkirError("the restored image holds NaN; the network or its weights are broken")
    levels = np.clip(tile, 0, np.iinfo(canvas.dtype).max)
    for axis, span in ((0, y), (1, x)):
        assert span.first == 0 or tile.shape[axis] >= blend
    share = _fade(len(levels), blend, y)[:, None, None] * _fade(levels.shape[1], blend, x)[:, None]
    top, left = _faded(blend, y), _faded(blend, x)
    for part in (np.s_[:top], np.s_[top:, :left]):  # the strips where something is there already
        mixed = (1 - share[part]) * canvas[part] + share[part] * levels[part]
        canvas[part] = np.rint(mixed).astype(canvas.dtype)
    canvas[top:, left:] = np.rint(levels[top:, left:]).astype(canvas.dtype)


def _faded(blend: int, span: Span) -> int:
    return 0 if span.first == 0 else blend


def _fade(length: int, blend: int, span: Span) -> np.ndarray:
    """(length,) the new tile's share along an axis: from 0 to 1 over the first `blend`, then 1."""
    share = np.ones(length, np.float32)
    faded = _faded(blend, span)
    share[:faded] = (np.arange(faded) + 0.5) / max(faded, 1)
    return share


def _pairs(rows: list[Span], columns: list[Span]) -> Iterator[tuple[Span, Span]]:
    return ((y, x) for y in rows for x in columns)


def _inside(span: Span, scale: int) -> slice:
    return slice(scale * (span.first - span.start), scale * (span.last - span.start))


def _whole(span: Span, scale: int) -> slice:
    return slice(scale * span.first, scale * span.last)


def _up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step
