"""What the cells of a comparison share in one process: a seed's materials, and the test sets.

Decoded images are memory-mapped, so that several processes share them; the networks and the
calibration crops of a seed are built once in each process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparkir.assemble import (
    Materials,
    Report,
    convention_of,
    device_for,
    gather,
    network_hash,
    open_pairs,
    require_measurable,
    silent,
)
from sparkir.compare.cell import Cell, carry_out, start_file
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.errors import SparkirError
from sparkir.recipe import Recipe
from sparkir.run import write_text


@dataclass(kw_only=True)
class Workspace:
    """Opens what cells need when they need it, and keeps it for the next one."""

    comparison: Path
    sets: Mapping[str, str]
    """Name of each test set -> where its images are."""
    report: Report = silent
    _seed: int | None = None
    _materials: Materials | None = None
    _start: dict[str, str | None] = field(default_factory=dict)
    _pairs: dict[str, PairStore] = field(default_factory=dict)

    def materials(self, base: Recipe) -> Materials:
        """Networks, images and crops of the recipe's seed.

        Raises:
            SparkirError: they cannot be opened, or are not those of the seed's finished cells.
        """
        if self._materials is None or self._seed != base.seed:
            self._materials = None  # its memory, before the next one's
            materials = gather(base, self.report)
            self._start = _start_of(base, materials)
            _require_same(self._start, self.comparison, base.seed)
            self._materials, self._seed = materials, base.seed
        return self._materials

    def forget(self) -> None:
        """Give the memory back."""
        self._materials = None

    def _noted_materials(self, base: Recipe) -> Materials:
        """The same, written down for the comparisons that go on in this folder."""
        materials = self.materials(base)
        file = start_file(self.comparison, base.seed)
        if not file.is_file():
            text = json.dumps(self._start, indent=1)
            write_text(file, text, then="give the same command again")
        return materials

    def pairs(self, where: str, base: Recipe) -> PairStore:
        """The images of a test set, checked to be large enough to measure."""
        if where not in self._pairs:
            pairs = open_pairs(base.data, where, self.report)
            require_measurable(pairs, convention_of(base))
            self._pairs[where] = pairs
        return self._pairs[where]

    def attempt(self, cell: Cell, report: Report, stop_requested: Callable[[], bool]) -> str:
        """Carry out a cell; returns why it failed, or nothing. All events carry its title.

        Raises:
            Interrupted: `stop_requested` said so.
        """

        def tell(event: dict[str, Any]) -> None:
            report(event | {"cell": cell.title})

        tell({"kind": "cell", "steps": cell.base.train.steps})
        if "torch._dynamo" in sys.modules:  # it stops compiling after some networks of one class
            torch.compiler.reset()
        try:
            carry_out(
                cell,
                self.sets,
                materials=lambda: self._noted_materials(cell.base),
                pairs=lambda where: self.pairs(where, cell.base),
                report=tell,
                stop_requested=stop_requested,
            )
        except (SparkirError, torch.OutOfMemoryError) as error:
            return " ".join(str(error).split())
        return ""


_OF_ALL_SEEDS = ("the teacher", "the set of training images")


def _start_of(base: Recipe, materials: Materials) -> dict[str, str | None]:
    """What all methods of a seed have in common."""
    sampler = PatchSampler(
        materials.train, patch_px=base.data.patch_px, batch=base.data.batch, seed=base.seed
    )
    return {
        "the student's first weights": network_hash(materials.student),
        "the teacher": None if materials.teacher is None else network_hash(materials.teacher),
        "the set of training images": sampler.state_dict()["images"],
        "the device": device_for(base).type,
    }


def _require_same(start: Mapping[str, str | None], comparison: Path, seed: int) -> None:
    """Compare with what was written when the first cells of this seed and of others were made.

    Raises:
        SparkirError: something has changed since.
    """
    for written in sorted(comparison.glob("seed-*/materials.json")):
        own = written == start_file(comparison, seed)
        before = json.loads(written.read_text("utf-8"))
        changed = [
            what
            for what, value in start.items()
            if (own or what in _OF_ALL_SEEDS) and before.get(what) != value
        ]
        if changed:
            raise SparkirError(
                f"not what the finished methods in {written.parent} had: {', '.join(changed)}. "
                "New ones could not be compared with them; restore that, or choose another --out"
            )
