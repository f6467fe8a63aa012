"""The README of a model on the Hub: what its search reads, and what people read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparkir.deploy.card import Card


def hub_readme(
    card: str,
    facts: Card,
    *,
    repo: str,
    results: str = "",
    metrics: Mapping[str, float] | None = None,
    measured_on: str = "",
    convention: str = "",
    licence: str = "",
    onnx: bool = False,
) -> str:
    """A model card with the metadata that the Hub asks for.

    Args:
        card: for people, Markdown.
        facts: the same for programs.
        repo: OWNER/NAME.
        results: a table of what was measured, Markdown.
        metrics: `psnr` and `ssim` of the model.
        measured_on: the images of these.
        convention: what these were computed on.
        licence: of the model, by the Hub's name for it, such as `apache-2.0`.
        onnx: whether there is a file for runtimes.
    """
    metadata: dict[str, Any] = {"license": licence} if licence else {}
    metadata |= {
        "library_name": "sparkir",
        "pipeline_tag": "image-to-image",
        "tags": _tags(facts, onnx=onnx),
    }
    if metrics:
        metadata["metrics"] = list(metrics)
        metadata["model-index"] = _index(facts, metrics, measured_on, convention)
    title, _, rest = card.partition("\n")
    parts = [
        f"---\n{_yaml(metadata)}---\n\n{title}\n",
        _usage(repo, onnx=onnx),
        rest.strip() + "\n",
    ]
    if results:
        parts.append(f"## Measured\n\n{results.strip()}\n")
    return "\n".join(parts)


def _yaml(values: Mapping[str, Any]) -> str:
    """A line for each key; YAML understands JSON's values."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


def _tags(card: Card, *, onnx: bool) -> Sequence[str]:
    task = "super-resolution" if card.facts.scale > 1 else "image-restoration"
    tags = [task, card.facts.name]
    if card.quantization != "float":
        tags += ["quantization", card.quantization.lower()]
    return [*tags, "onnx"] if onnx else tags


def _index(
    card: Card, metrics: Mapping[str, float], measured_on: str, convention: str
) -> list[dict[str, Any]]:
    """One result, in the form that the Hub shows in its tables."""
    found = [
        {"type": name, "value": round(value, 4), "name": f"{name.upper()} ({convention})"}
        for name, value in metrics.items()
    ]
    result = {
        "task": {"type": "image-to-image"},
        "dataset": {"type": measured_on, "name": measured_on},
        "metrics": found,
    }
    return [{"name": card.recipe or card.facts.name, "results": [result]}]


def _usage(repo: str, *, onnx: bool) -> str:
    extras = "hub,onnx" if onnx else "hub"
    return (
        "```sh\n"
        f"pip install 'sparkir[{extras}]'\n"
        f"sparkir pull {repo} model\n"
        "sparkir restore model photos/ restored/\n"
        "```\n"
    )
