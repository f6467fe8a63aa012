"""What an exported file says of itself. Imports no torch: restoring needs none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts

# The facts that are not whole numbers.
_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "exact_tiles": (bool,),
    "luma_range": (str,),
    "taps": (list,),
    "value_range": (float, int),
}


_ON_X86_WITHOUT_VNNI = {
    "openvino": "shows another image: its weights do not keep to 7 bits (`quant.reduce_range`)",
    "tensorrt": "",
}
_ONNX_RUNTIME_THERE = 'in ONNX Runtime, needs the session option `session.x64quantprecision` = "1"'
_ANYWHERE = "as elsewhere: its weights keep to 7 bits"


_TERMS = "licence of the training images"
_NEEDS = "ONNX Runtime 1.23 or OpenVINO 2025.0, or later"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of a deployed network, kept in the file's metadata."""

    facts: ModelFacts
    quantization: str
    """Such as `W8A8`; `float` for a network in floating point."""
    target: str = ""
    """What it was trained to run on; a name of `quant.targets`; empty if the file does not say."""
    recipe: str = ""
    """The name of the recipe that it was trained by."""
    training: str = ""
    """That recipe in full, as TOML."""
    metrics: str = ""
    """What was measured on what, with the convention."""
    licence: str = ""
    """Terms of the images it was trained on."""
    differs: str = ""
    """How the file differs from the network that was trained, if it was written all the same."""

    def to_metadata(self) -> dict[str, str]:
        """Text by key, as ONNX files hold it; what is not known is left out."""
        words = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "facts"}
        words["layout"] = f"{self._tensors()}; {self._values()}"
        return {"facts": json.dumps(asdict(self.facts))} | {k: v for k, v in words.items() if v}

    def _tensors(self) -> str:
        facts = self.facts
        colours = "RGB" if facts.channels == 3 else f"luma of {facts.luma_range} range"
        return f"float32 (N, {facts.channels}, H, W), {colours}"

    def _values(self) -> str:
        white = f"{self.facts.value_range:g}"
        return f"black 0, white {white}; what is restored may lie beyond: clip it, then round"

    def to_markdown(self, layers: Sequence[tuple[str, str]] = ()) -> str:
        """For people; `layers` says of each layer how it is stored and run."""
        facts = self.facts
        task = f"enlarges {facts.scale} times" if facts.scale > 1 else "restores at the same size"
        rows = [
            ("task", task),
            ("input and output", self._tensors()),
            ("values", self._values()),
            ("sizes", f"at least {facts.min_size_px} px, multiples of {facts.size_multiple}"),
            ("quantization", self.quantization),
            ("made for", self.target or "not stated"),
            ("needs, as .onnx", _NEEDS),
            *[("x86 without VNNI", words) for words in [self._without_vnni()] if words],
            ("measured", self.metrics or "not stated"),
            (_TERMS, self.licence or "not stated"),
        ]
        parts = [f"# {self.recipe or facts.name}\n"]
        if self.differs:
            parts.append(f"**Not what was trained:** {self.differs}\n")
        parts.append("| | |\n|---|---|\n" + "".join(f"| {k} | {_cell(v)} |\n" for k, v in rows))
        if layers:
            lines = "".join(f"| `{name}` | {what} |\n" for name, what in layers)
            parts.append(f"## Layers\n\n| layer | stored and run |\n|---|---|\n{lines}")
        if self.training:
            parts.append(f"## Training\n\n```toml\n{self.training.strip()}\n```\n")
        return "\n".join(parts)

    def _without_vnni(self) -> str:
        """What the file's own runtime shows where sums of two products saturate."""
        if self.quantization == "float":
            return ""
        if self.target == "openvino" and "reduce_range = true" in self.training.splitlines():
            return _ANYWHERE
        return _ON_X86_WITHOUT_VNNI.get(self.target, _ONNX_RUNTIME_THERE)


def _cell(text: str) -> str:
    """On one line, and without what would end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def is_card(path: Path) -> bool:
    """Whether `to_markdown` wrote a file."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return text.startswith("# ") and f"| {_TERMS} |" in text


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
            f"{name} has a card that is damaged, or of another version ({error}); export it again "
            "with this sparkir"
        ) from error
    known = {f.name for f in fields(Card)} - {"facts"}
    words = {key: text for key, text in metadata.items() if key in known}
    return Card(facts=facts, **{"quantization": ""} | words)


def _check_types(values: object) -> None:
    """Raise TypeError for a value that a computation would stumble over only later."""
    if not isinstance(values, dict):
        raise TypeError(f"it is a {type(values).__name__}")
    for field, value in values.items():
        if type(value) not in _TYPES.get(field, (int,)):
            raise TypeError(f"{field} is {value!r}")
    if not all(isinstance(tap, str) for tap in cast("list[object]", values["taps"])):
        raise TypeError("taps are not all names")
