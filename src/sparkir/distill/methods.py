"""The distillation methods by name."""

from __future__ import annotations

from typing import Any

from sparkir.distill.at import AT
from sparkir.distill.blocks import Blocks
from sparkir.distill.dckd import DCKD
from sparkir.distill.fakd import FAKD
from sparkir.distill.fitnet import FitNet
from sparkir.distill.kd import KD
from sparkir.distill.method import Method, Setting
from sparkir.distill.skt import SKT
from sparkir.distill.slkd import SLKD

_OTHERS: dict[str, type[Method]] = {
    "fitnet": FitNet,
    "at": AT,
    "skt": SKT,
    "fakd": FAKD,
    "blocks": Blocks,
    "dckd": DCKD,
    "slkd": SLKD,
}


def methods() -> tuple[str, ...]:
    """The names that `method` knows."""
    return ("kd", *_OTHERS)


def method(name: str, setting: Setting, *, factor: float | None = None, **options: str) -> Method:
    """A method by name.

    Args:
        name: one of `methods()`.
        setting: the networks, example images and the length of the training.
        factor: of its own first term, other terms in proportion; None as published.
        options: what this method alone takes.

    Raises:
        KeyError: no such method.
        SparkirError: it cannot compare these two networks.
    """
    made: Method = KD() if name == "kd" else _kind(name)(setting, factor=factor, **options)
    return made


def title(name: str) -> str:
    """What tables call a method."""
    name_in_tables: str = _kind(name).title
    return name_in_tables


def published(name: str) -> dict[str, Any]:
    """The `[distill]` of a recipe that stands for the method as it was published.

    Every loss is the published one up to a common factor, which Adam does not see: the distance to
    the ground truth always has the factor 1.
    """
    kind = _kind(name)
    return {"method": name, "norm": kind.norm, "strength": kind.strength}


def _kind(name: str) -> Any:  # noqa: ANN401 - a class, called with options of its own
    return KD if name == "kd" else _OTHERS[name]
