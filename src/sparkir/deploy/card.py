"""What an exported file says of itself. Imports no torch: restoring needs none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import cast

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

# The facts that are not whole numbers.
_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "luma_range": (str,),
    "taps": (list,),
    "value_range": (float, int),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of a deployed network, kept in the file's metadata."""

    facts: ModelFacts
    quantization: str
    """Such as `W8A8`; `float` for a network in floating point."""
    recipe: str = ""
    """What it was trained by."""
    target: str = ""
    """Where it was made to run, such as `openvino`; empty in files that do not say."""

    def to_metadata(self) -> dict[str, str]:
        """Text by key, as ONNX files hold it."""
        return {
            "facts": json.dumps(asdict(self.facts)),
            "quantization": self.quantization,
            "recipe": self.recipe,
            "target": self.target,
        }


def read_card(metadata: Mapping[str, str], name: str) -> Card:
    """What a file with this metadata is; `name` is what messages call it.

    Raises:
        SparkirError: sparkir did not export it, or its card is damaged.
    """
    if "facts" not in metadata:
        raise SparkirError(f"{name} does not say its scale and value range; export it with sparkir")
    try:
        values = json.loads(metadata["facts"])
        _check_types(values)
        facts = ModelFacts(**values | {"taps": tuple(values["taps"])})
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise SparkirError(
            f"{name} has a damaged card ({error}); export it again with sparkir"
        ) from error
    return Card(
        facts=facts,
        quantization=metadata.get("quantization", ""),
        recipe=metadata.get("recipe", ""),
        target=metadata.get("target", ""),
    )


def _check_types(values: Mapping[str, object]) -> None:
    """Raise TypeError for a value that a computation would stumble over only later."""
    for field, value in values.items():
        if type(value) not in _TYPES.get(field, (int,)):
            raise TypeError(f"{field} is {value!r}")
    if not all(isinstance(tap, str) for tap in cast("list[object]", values["taps"])):
        raise TypeError("taps are not all names")
