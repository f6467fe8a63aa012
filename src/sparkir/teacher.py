"""The teacher's outputs on the training images, computed once instead of at every step.

A frozen teacher on fixed inputs has fixed outputs. They are computed on whole images, in tiles that
fit the memory, and crops are cut from them as from the ground truth.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from sparkir.assemble import Materials, Report, cache_folder
from sparkir.data.outputs import OutputStore, bytes_of, fill, output_store, to_levels
from sparkir.data.pairs import PairStore, PatchSampler
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import device_of, evaluating
from sparkir.models.facts import facts_of, restore
from sparkir.recipe import Recipe
from sparkir.restore.engine import Engine
from sparkir.restore.memory import shown_bytes
from sparkir.restore.network import Restorer
from sparkir.tools import Opened, restorer_of

_WHITE = 2**16 - 1
_CROPS = 16
_ENOUGH_DB = 10.0
"""Between what a crop cannot show and the teacher's own error: a tenth of its power."""


def teacher_outputs(
    recipe: Recipe, materials: Materials, report: Report, *, features: bool = False
) -> OutputStore | None:
    """What the recipe's teacher makes of the training images, from an earlier run or computed now.

    None, with the reason reported, where it has to run at every step; `features` says that the
    method looks into it.

    Raises:
        SparkirError: it would take more of the disk than the recipe allows, or than there is.
    """
    teacher, pairs = materials.teacher, materials.train
    if recipe.distill is None or teacher is None or not recipe.train.teacher_cache:
        return None
    reason = _why_not(pairs, teacher, features=features)
    if reason:
        report({"kind": "warning", "message": f"the teacher runs at every step: {reason}"})
        return None
    restorer = restorer_of(Opened(network=teacher, label="the teacher"))
    sizes = [_output_size(pairs, index) for index in range(len(pairs))]
    _require_room(sizes, recipe.train.teacher_cache_gb)
    key = (restorer.identity, _code_of(teacher), pairs.identity)
    store = output_store(cache_folder(), key, sizes)
    if store.missing():
        todo = f"{len(store.missing())} images, {shown_bytes(store.missing_bytes())} of disk"
        report({"kind": "stage", "name": f"teacher on {todo}", "steps": len(store)})
        engine = Engine(_Storing(**vars(restorer)))
        fill(store, partial(_stored_output, engine, pairs), progress=partial(_tell, report))
    if doubt := _of_crops(recipe, pairs, teacher, store):
        report({"kind": "warning", "message": doubt})
    return store


def _of_crops(recipe: Recipe, pairs: PairStore, teacher: nn.Module, store: OutputStore) -> str:
    """A warning, where it makes another thing of whole images than of crops; empty if it does not.

    A student that sees a crop cannot learn what was made of all that lies around it.
    """
    side = recipe.data.patch_px
    sampler = PatchSampler(pairs, patch_px=side, batch=_CROPS, seed=0, augment=False, outputs=store)
    lq, gt, stored = sampler.next()
    with torch.no_grad(), evaluating(teacher):
        ran = restore(teacher, lq.to(device_of(teacher)).float() / 255).cpu()
    margin = ran.shape[-1] // 4  # beyond it the padding of a crop is seen
    if margin == 0:
        return ""
    inside = (..., slice(margin, -margin), slice(margin, -margin))
    apart_db, wrong_db = (
        float(-10 * (stored - other)[inside].square().mean().log10())
        for other in (ran, gt.float() / 255)
    )
    if apart_db > wrong_db + _ENOUGH_DB:
        return ""
    return (
        f"what the teacher makes of whole images and of crops of {side} px is {apart_db:.1f} dB "
        f"apart, where it is {wrong_db:.1f} dB from the truth: it looks further than a crop; "
        "set train.teacher_cache = false, or a larger data.patch_px"
    )


def _why_not(pairs: PairStore, teacher: nn.Module, *, features: bool) -> str:
    """Why its outputs cannot be kept, or not be enough; empty if they can."""
    if features:
        return "the distillation method looks at its features"
    if facts_of(teacher).channels != 3:
        return "it restores one channel"
    if not pairs.identity:
        return "degraded images are drawn anew for each crop"
    if not _code_of(teacher):
        return "the source code of its network cannot be read, so a change would go unseen"
    return ""


def _output_size(pairs: PairStore, index: int) -> tuple[int, int]:
    height, width = pairs.lq_size(index)
    return height * pairs.scale, width * pairs.scale


def _require_room(sizes: list[tuple[int, int]], limit_gb: float) -> None:
    needed = sum(bytes_of(height, width) for height, width in sizes)
    if needed > limit_gb * 10**9:
        raise SparkirError(
            f"the teacher's outputs on {len(sizes)} training images take {shown_bytes(needed)} of "
            f"disk, more than train.teacher_cache_gb = {limit_gb:g} allows; raise it, or set "
            "train.teacher_cache = false"
        )


class _Storing(Restorer):
    """Gives what an `OutputStore` keeps of a picture of 16 bits."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint16 -> levels (s*h, s*w, 3), neither clipped nor rounded."""
        return to_levels(super().__call__(pixels) / np.float32(_WHITE))


def _stored_output(engine: Engine, pairs: PairStore, index: int) -> np.ndarray:
    lq, _ = pairs.pair(index)
    return engine(lq.astype(np.uint16) * np.uint16(_WHITE // 255))


def _tell(report: Report, done: int, total: int) -> None:
    report({"kind": "teacher", "done": done, "total": total})


def _code_of(network: nn.Module) -> str:
    """A hash of the source files that define the network's modules, torch's own left out.

    Those of their base classes too, and those that a file of the user's reads names from. Empty if
    one of them cannot be read.
    """
    kinds = {kind for module in network.modules() for kind in type(module).__mro__}
    names = {kind.__module__ for kind in kinds}
    waiting = [name for name in names if name.partition(".")[0] not in ("torch", "builtins")]
    sources: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name not in sources:
            try:
                sources[name] = _source_of(sys.modules[name])
            except (OSError, TypeError, KeyError):
                return ""
            waiting += _reads_from(sys.modules[name])
    known = hashlib.sha256()
    for name in sorted(sources):
        known.update(sources[name].encode())
    return known.hexdigest()[:16]


def _source_of(module: ModuleType) -> str:
    """Its text; of an empty `__init__.py`, of which inspect knows none, an empty one."""
    file = Path(getattr(module, "__file__", None) or "-")
    return "" if file.is_file() and file.stat().st_size == 0 else inspect.getsource(module)


def _reads_from(module: ModuleType) -> Iterator[str]:
    """The modules that a file of the user's has names from; of what is installed, nothing.

    Another version of a library would be another file of those that define the network, or is
    trusted to compute the same.
    """
    if not _is_users_own(module):
        return
    for value in vars(module).values():
        name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
        read = sys.modules.get(name) if isinstance(name, str) else None
        if read is not None and _is_users_own(read):
            yield read.__name__


def _is_users_own(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is None or module.__name__.partition(".")[0] in sys.stdlib_module_names | {"sparkir"}:
        return False
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)
