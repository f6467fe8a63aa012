"""One picture through a network, in tiles as large as the memory allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from sparkir.errors import SparkirError
from sparkir.restore.memory import (
    default_bytes,
    is_allocation_failure,
    peak_bytes_of,
    shown_bytes,
)
from sparkir.restore.network import Restorer
from sparkir.restore.tiles import Tiling, restore_tiled, tiling_for

Progress = Callable[[int, int], None]  # tiles done, tiles in all

_LARGEST_PX = 1024  # larger tiles save hardly any halo and show no progress
_WHOLE_PX = 2**16
_PROBE_PX = 96
_MARGIN = 1.35  # a tile may take more than the probe said by this factor (1.3 without VNNI)
_ASSEMBLY_BYTES = 32  # of putting a tile in its place, for every pixel of the result
_CODEC_BYTES = 4  # of a decoder or encoder, for every byte of a pixel: Pillow keeps RGB in 4


class Engine:
    """Restores pictures one after another; learns what a pixel costs, and what does not fit."""

    def __init__(self, restorer: Restorer, memory_bytes: int | None = None) -> None:
        """`memory_bytes` bounds what pictures and tiles may take; None: half of what is free."""
        self.restorer = restorer
        self.memory_bytes = memory_bytes
        # Where tiles come out otherwise than the whole, they are as large as the memory allows.
        largest_px = _LARGEST_PX if restorer.facts.exact_tiles else _WHOLE_PX
        self.tiling = tiling_for(restorer.facts, largest_px)
        self.bytes_per_px: float | None = None

    def __call__(
        self, pixels: np.ndarray, progress: Progress = lambda done, total: None
    ) -> np.ndarray:
        """Restore (h, w, c) uint8 or uint16 to (s*h, s*w, c) of the same type.

        When the runtime gets no memory for a tile, the tile is halved, for the pictures that
        follow as well, and the picture begun again.

        Raises:
            SparkirError: the picture is too small, or there is not even memory for small tiles.
        """
        tiling = self._tiling_for(pixels)
        while True:
            try:
                return restore_tiled(
                    pixels,
                    self.restorer,
                    scale=self.restorer.facts.scale,
                    tiling=tiling,
                    progress=progress,
                )
            except (MemoryError, RuntimeError) as error:
                if not is_allocation_failure(error):
                    raise
                tiling = self._smaller(tiling, pixels.shape, error)

    def _smaller(self, tiling: Tiling, shape: tuple[int, ...], error: Exception) -> Tiling:
        """Tiles of half the size of those which failed; pictures may be smaller than a tile."""
        used = min(tiling.side, max(shape[:2]))
        halved = tiling.at_most(used**2).halved() if used > tiling.smallest else None
        if halved is None:
            raise SparkirError(
                f"there is not even memory for tiles of {tiling.smallest} px, the smallest that "
                f"{self.restorer.facts.name} can be given; close other programs"
            ) from error
        self.tiling = halved
        return halved

    def _tiling_for(self, pixels: np.ndarray) -> Tiling:
        """Tiles that fit into the memory that the pictures themselves leave."""
        area = pixels.shape[0] * pixels.shape[1]
        if area <= (2 * _PROBE_PX) ** 2:  # less than measuring takes
            return self.tiling
        left = self.left_for_tiles(pixels.shape, pixels.itemsize)
        if self.bytes_per_px is None:
            self.bytes_per_px = self._measured()
        fitting = left / self.bytes_per_px
        if fitting < min(area, self.tiling.smallest**2):
            needed = self.tiling.smallest**2 * self.bytes_per_px
            raise SparkirError(
                f"the smallest tiles of {self.restorer.facts.name} ({self.tiling.smallest} px) "
                f"take about {shown_bytes(needed)}, and {shown_bytes(left)} are left for them; "
                "give it more with --memory"
            )
        return self.tiling.at_most(min(fitting, self.tiling.side**2))

    def left_for_tiles(self, shape: tuple[int, ...], itemsize: int) -> float:
        """The bytes that a picture (h, w, c) and its result leave of the memory.

        Raises:
            SparkirError: they take all of it; found from the header, before anything is decoded.
        """
        memory = self.memory_bytes if self.memory_bytes is not None else default_bytes()
        height, width, channels = shape
        scale = self.restorer.facts.scale
        one = height * width * channels * itemsize
        held = one * (1 + scale**2)
        coded = _CODEC_BYTES * height * width * itemsize * scale**2
        if held + coded >= memory:
            raise SparkirError(
                f"a picture of {width} x {height} px and its result take "
                f"{shown_bytes(held + coded)}, and restoring may use {shown_bytes(memory)}; "
                "give it more with --memory, or cut the picture"
            )
        return memory - held - _CODEC_BYTES * height * width * itemsize

    def _measured(self) -> float:
        """What a pixel of a tile costs in bytes, by the process's growth on two small tiles."""
        facts = self.restorer.facts
        smallest = -(-max(_PROBE_PX, facts.min_size_px) // self.tiling.step) * self.tiling.step
        grown = 0
        for side in (smallest, 2 * smallest):
            probe = np.zeros((side, side, 3), np.uint8)
            try:
                peak = peak_bytes_of(partial(self.restorer, probe))
            except (MemoryError, RuntimeError) as error:
                if not is_allocation_failure(error):
                    raise
                peak = None
            if peak is None:
                return _guessed(facts.scale)
            grown += peak
        return _MARGIN * grown / (2 * smallest) ** 2 + _ASSEMBLY_BYTES * facts.scale**2


def _guessed(scale: int) -> float:
    """Bytes per pixel where nothing can be measured: four features of 64 channels in float32,
    and two at the output's size."""
    return 64 * 4 * (4 + 2 * scale**2)
