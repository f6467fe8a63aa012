"""How a call in a traced network was written."""

from __future__ import annotations

from typing import Any, cast

from torch import fx


def named(node: fx.Node, names: str) -> dict[str, Any]:
    """The arguments of a call by name, whether they were given by place or by name."""
    return dict(zip(names.split(), node.args, strict=False)) | cast("dict[str, Any]", node.kwargs)
