"""The methods that `sparkir compare` sets side by side: what each changes in the recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sparkir.compare.controls import WeightRecord, like_constant, like_random, like_truth, to_truth
from sparkir.distill.methods import methods as distillation_methods
from sparkir.distill.methods import published, title
from sparkir.errors import SparkirError
from sparkir.recipe import Distill, Recipe, _unknown, changed
from sparkir.spark.difficulty import FEATURES
from sparkir.spark.weighting import weightings

Kind = Literal["input", "teacher", "calibrated", "trained"]
"""What a row shows: the input, the teacher, a student that was only calibrated, a trained one."""

STRENGTHS = (1.0, 20.0, 100.0)
"""Factors of uniform distillation's squared error; a table takes it at its best of them."""
_FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "kd": ("KD, {} x L1", {"norm": "l1"}),
    "kd-mse": ("KD, {} x MSE", {"norm": "mse"}),
    "kd-matched": ("KD, {} x MSE as strong as L1", {"norm": "matched"}),
    "truth": ("QAT, {} x MSE to truth", {"norm": "mse", "target": "truth"}),
}
"""What may be had at any strength, as in `kd@20`: its label, and its keys of [distill]."""
_STRENGTH_NAME = re.compile(r"(kd|kd-mse|kd-matched|truth)@(\d+\.?\d*|\.\d+)")
_CONTROLS: dict[str, tuple[str, Callable[[Recipe, WeightRecord], Recipe]]] = {
    "truth": ("loss of {}, to truth", like_truth),
    "constant": ("constant W like {}", like_constant),
    "random": ("random W like {}", like_random),
}
"""What a SPARK has to be better than: a label, and what makes it like a finished training of it."""
_PUBLISHED = {
    "spark-paper": Distill(norm="mse"),
    "spark": Distill(norm="matched", strength=10.0, target="both"),
}
"""The distillation that each SPARK was made for."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison."""

    name: str
    """On the command line."""
    label: str
    """In tables."""
    change: Callable[[Recipe], Recipe]
    """From the comparison's recipe to that of this method."""
    match: Callable[[Recipe, WeightRecord], Recipe] | None = None
    """From the changed recipe, and what `after` did with its weights, to the final one."""
    after: str = ""
    """The method that has to be finished first."""
    kind: Kind = "trained"
    needs_teacher: bool = True

    @property
    def per_seed(self) -> bool:
        """Whether another seed gives another result."""
        return self.kind in ("calibrated", "trained")


# What a method changes ------------------------------------------------------------------------


def _float(recipe: Recipe) -> Recipe:
    """The same training in floating point, alone."""
    whole = recipe.train.model_copy(update={"float_steps": 0})
    return changed(recipe, quant=None, distill=None, weighting={}, train=whole)


def _qat(recipe: Recipe) -> Recipe:
    """Quantized, on the ground truth alone."""
    return changed(recipe, distill=None, weighting={})


def _uniform(**distill: Any) -> Callable[[Recipe], Recipe]:  # noqa: ANN401 - keys of [distill]
    """Quantized, distilled everywhere alike, with these keys of [distill] and no others."""
    return lambda recipe: changed(recipe, distill=distill, weighting={})


def _published(name: str) -> Callable[[Recipe], Recipe]:
    """A distillation method as published; looking through the recipe's own encoder, if it has one.

    Rows of one table that look at images with an encoder then use the same.
    """

    def change(recipe: Recipe) -> Recipe:
        own = _own(recipe)
        encoder = {"encoder": own.encoder} if own.method == name and own.encoder else {}
        return changed(recipe, distill=published(name) | encoder, weighting={})

    return change


def _truth(recipe: Recipe) -> Recipe:
    """The recipe's own loss, pulled to the ground truth."""
    return to_truth(changed(recipe, weighting={}))


def _weighted(name: str) -> Callable[[Recipe], Recipe]:
    """The recipe's own distillation under other weights."""
    return lambda recipe: changed(recipe, distill=_own(recipe), weighting={"name": name})


def _spark(name: str) -> Callable[[Recipe], Recipe]:
    """SPARK as the recipe has it; where the recipe has another method, as published."""

    def change(recipe: Recipe) -> Recipe:
        if recipe.weighting.name == name:
            return changed(recipe)
        return changed(recipe, distill=_PUBLISHED[name], weighting={"name": name})

    return change


def _own(recipe: Recipe) -> Distill:
    return recipe.distill or Distill()


# The table ------------------------------------------------------------------------------------


def methods() -> dict[str, Method]:
    """Every method by name, in the order of a table's rows."""
    rows = [
        Method(
            name="degraded", label="degraded input", change=_qat, kind="input", needs_teacher=False
        ),
        Method(name="teacher", label="teacher, float", change=_qat, kind="teacher"),
        Method(name="float", label="student, float", change=_float, needs_teacher=False),
        Method(name="ptq", label="PTQ", change=_qat, kind="calibrated", needs_teacher=False),
        Method(name="qat", label="QAT", change=_qat, needs_teacher=False),
        Method(name="truth", label="QAT, same loss to truth", change=_truth),
        Method(name="kd", label="KD, L1", change=_uniform(norm="l1", strength=1.0)),
        *(_at_strength("kd-mse", strength) for strength in STRENGTHS),
        Method(
            name="kd-matched",
            label="KD, MSE as strong as L1",
            change=_uniform(norm="matched", strength=1.0),
        ),
    ]
    rows += [
        Method(name=name, label=title(name), change=_published(name))
        for name in distillation_methods()
        if name != "kd"
    ]
    for spark, words in sparks().items():
        rows += [
            Method(
                name=f"{kind}:{spark}",
                label=label.format(words),
                change=_spark(spark),
                match=match,
                after=spark,
            )
            for kind, (label, match) in sorted(_CONTROLS.items())
        ]
    rows += [
        Method(
            name=f"fixed:{feature}",
            label=f"fixed W, {feature.replace('_', ' ')}",
            change=_weighted(f"fixed:{feature}"),
        )
        for feature in FEATURES
    ]
    rows.append(
        Method(name="confidence", label="W, teacher's confidence", change=_weighted("confidence"))
    )
    rows += [
        Method(name=spark, label=words, change=_spark(spark)) for spark, words in sparks().items()
    ]
    return {row.name: row for row in rows}


def sparks() -> dict[str, str]:
    """The learning sources of W, and what tables call them."""
    titles = {"spark-paper": "SPARK (paper)", "spark": "SPARK"}
    return {name: title for name, title in titles.items() if name in weightings()}


def _at_strength(family: str, strength: float) -> Method:
    """A uniform distance with a factor, to the teacher or to the truth."""
    label, distill = _FAMILIES[family]
    return Method(
        name=f"{family}@{_written(strength)}",
        label=label.format(_written(strength)),
        change=_uniform(**distill, strength=strength),
    )


def _written(strength: float) -> str:
    """As `_STRENGTH_NAME` reads it: every digit, no exponent."""
    return np.format_float_positional(strength, trim="-")


# Choosing -------------------------------------------------------------------------------------


def default_names(recipe: Recipe) -> list[str]:
    """The rows that every table of quality should have, and the recipe's own SPARK."""
    own = _own_spark(recipe)
    controls = [f"{kind}:{own}" for kind in _CONTROLS]
    strengths = [f"kd-mse@{_written(strength)}" for strength in STRENGTHS]
    return [
        *("degraded", "teacher", "float", "ptq", "qat", "kd"),
        *(*strengths, *controls, "fixed:student_error", own),
    ]


def choose(names: str | None, recipe: Recipe) -> list[Method]:
    """The methods of a comma-separated list, `all`, or None for the default, as rows in order.

    A method that takes its numbers from another brings that one along.

    Raises:
        SparkirError: there is no such method, or the recipe lacks what one needs.
    """
    if recipe.quant is None:
        raise SparkirError("compare is for quantized students; add a [quant] to the recipe")
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if names is None:
        wanted = default_names(recipe)
    elif "all" in wanted:
        wanted = [*methods(), *(name for name in wanted if name != "all")]
    chosen = {method.name: method for name in wanted for method in [find(name, recipe)]}
    for method in list(chosen.values()):
        for name in requirements(method, recipe):
            chosen.setdefault(name, find(name, recipe))
    if not chosen:
        raise SparkirError("--methods names no method; write them as in ptq,qat,kd, or all")
    lacking = [m.name for m in chosen.values() if m.needs_teacher and recipe.teacher is None]
    if lacking:
        raise SparkirError(
            f"the recipe has no [teacher], which is needed by {', '.join(lacking)}; add one, or "
            "choose others with --methods: degraded, float, ptq, qat"
        )
    return sorted(chosen.values(), key=_place)


def find(name: str, recipe: Recipe) -> Method:
    """A method by name; `constant` and `random` are those of the recipe's own SPARK.

    Raises:
        SparkirError: there is none; the message has the nearest.
    """
    if name in ("constant", "random"):
        name = f"{name}:{_own_spark(recipe)}"
    known = methods()
    found = _STRENGTH_NAME.fullmatch(name)
    if found and 0 < float(found[2]) < float("inf"):
        family, strength = found[1], float(found[2])
        if strength == 1 and family in known and family != "truth":  # the recipe's own, that is
            return known[family]
        return _at_strength(family, strength)
    if name not in known:
        raise SparkirError(_unknown("method", name, [*known, "constant", "random", "all"]))
    return known[name]


def requirements(method: Method, recipe: Recipe) -> list[str]:
    """The methods that must be finished before this one."""
    if method.kind == "calibrated" and not recipe.student.weights:
        return ["float"]  # a fresh student has nothing that could be calibrated
    return [method.after] if method.after else []


def recipe_of(method: Method, recipe: Recipe, record: WeightRecord | None = None) -> Recipe:
    """The recipe of one row; `record` is of the method that it comes after."""
    own = method.change(recipe)
    if method.match is None:
        return own
    assert record is not None
    return method.match(own, record)


def missing_rows(rows: Sequence[str], recipe: Recipe) -> list[str]:
    """What a table with these methods lacks of the rows that a claim about quality needs."""
    own = [name for name in sparks() if name in rows]
    needed = [name for name in default_names(recipe) if name not in rows]
    if own:  # any SPARK will do, but it needs its own controls
        needed = [name for name in needed if name.partition(":")[0] not in _of_spark(recipe)]
        controls = [f"{kind}:{name}" for name in own for kind in _CONTROLS]
        needed += [name for name in controls if name not in rows]
    if any(name.startswith("fixed:") for name in rows):
        needed = [name for name in needed if not name.startswith("fixed:")]
    return needed


def _of_spark(recipe: Recipe) -> tuple[str, ...]:
    return (*_CONTROLS, _own_spark(recipe))


def _own_spark(recipe: Recipe) -> str:
    """The recipe's own, or the newest that there is."""
    own = recipe.weighting.name
    return own if own in sparks() else list(sparks())[-1]


def _place(method: Method) -> tuple[int, float]:
    """Rows of one family stand together, by strength."""
    order = list(methods())
    family, _, strength = method.name.partition("@")
    if not strength:
        return order.index(method.name), 0.0
    first = f"{family}@{_written(STRENGTHS[0])}" if family == "kd-mse" else family
    return order.index(first), float(strength)
