"""The table a run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparkir.evaluate.benchmark import ImageScore, mean

Arithmetic = Literal["float", "training", "integer", "runtime", ""]
"""What computed the pictures: a float network, the training forward of a quantized one, the
integer network, or a runtime executing the exported file."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of restoring the test images."""

    name: str
    arithmetic: Arithmetic
    scores: list[ImageScore]
    size_bytes: int | None = None
    """Of the weights as stored."""

    @property
    def psnr_db(self) -> float:
        """Mean over images."""
        return mean(self.scores).psnr_db

    @property
    def ssim(self) -> float:
        """Mean over images."""
        return mean(self.scores).ssim

    def as_values(self) -> dict[str, Any]:
        """Plain values, image by image."""
        return asdict(self) | {"psnr_db": self.psnr_db, "ssim": self.ssim}


HEADER = ("", "computed in", "PSNR dB", "SSIM", "weights")


def cells(row: Row) -> tuple[str, ...]:
    """The text of one row, in the order of `HEADER`."""
    size = "" if row.size_bytes is None else f"{row.size_bytes / 1024:.0f} KiB"
    return (row.name, row.arithmetic, f"{row.psnr_db:.3f}", f"{row.ssim:.4f}", size)


def to_markdown(rows: Sequence[Row], caption: str) -> str:
    """A Markdown table with its metric convention above it."""
    rule = markdown_line(("---", "---", "---:", "---:", "---:"))
    lines = [caption, "", markdown_line(HEADER), rule]
    return "\n".join([*lines, *(markdown_line(cells(row)) for row in rows)]) + "\n"


def markdown_line(texts: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"
