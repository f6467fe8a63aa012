"""The next batch, cut while the GPU is at work on this one."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sparkir.data.pairs import Batch, PatchSampler

_Drawn = tuple[Batch, dict[str, Any]]
"""A batch, and where the sampler was then."""


class SampledAhead:
    """A sampler whose next batch is cut by another thread: the same batches, in the same order.

    Its state is that after the last batch it gave away, so that one which is cut already is cut
    again after a resume. The thread runs while the caller waits for the GPU, or computes in torch
    or NumPy; where all is computed by the processor itself, there is nothing to be gained.
    """

    def __init__(self, sampler: PatchSampler) -> None:
        """Take over `sampler`, which nobody else may use from here on."""
        self._sampler = sampler
        self._state = sampler.state_dict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._pending: Future[_Drawn] | None = None

    def next(self) -> Batch:
        """As `PatchSampler.next`; an error of the other thread is raised here."""
        pending = self._pending or self._thread.submit(self._drawn)
        batch, self._state = pending.result()
        self._pending = self._thread.submit(self._drawn)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """As that of a `PatchSampler` which has given the same batches."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `PatchSampler.load_state_dict`; what was cut ahead is dropped."""
        if self._pending is not None:
            self._pending.exception()  # it is done then, and nobody uses the sampler
            self._pending = None
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()

    def _drawn(self) -> _Drawn:
        return self._sampler.next(), self._sampler.state_dict()
