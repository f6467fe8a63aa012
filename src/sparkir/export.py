"""From a trained student to files that runtimes execute: made, checked, described, written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import GraphModule

from sparkir.data.atomic import atomic_file
from sparkir.data.codec import one_line
from sparkir.deploy.card import Card, is_card
from sparkir.deploy.onnx import require_onnx, to_onnx, write_model
from sparkir.deploy.parity import Parity, check_parity, require_parity
from sparkir.deploy.session import Runtime, require_runtime
from sparkir.errors import SparkirError
from sparkir.models.facts import facts_of
from sparkir.quant.prepare import placement_of
from sparkir.recipe import Recipe

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file's content, checked and described, not yet written."""

    model: onnx.ModelProto
    frozen: GraphModule
    parity: Parity
    card: Card

    def measured(self, metrics: str) -> Exported:
        """The same, with what was measured on its card."""
        return replace(self, card=replace(self.card, metrics=metrics))

    def write(self, path: Path) -> Path:
        """Write the model and, beside it, its card as Markdown; returns the card's path.

        Raises:
            SparkirError: one of them cannot be written.
        """
        import onnx

        beside = path.with_suffix(".md")
        onnx.helper.set_model_props(self.model, self.card.to_metadata())
        write_model(self.model, path)
        try:
            with atomic_file(beside) as file:
                file.write(self.card.to_markdown(self.layers()).encode())
        except OSError as error:
            raise SparkirError(
                f"cannot write the model card {beside}: {one_line(error)}"
            ) from error
        return beside

    def layers(self) -> list[tuple[str, str]]:
        """(layer, how it is stored and run), and what is left in floating point, and why."""
        placement = placement_of(self.frozen)
        found = [
            (name, f"{bits}-bit weights, {read}-bit input{self._kernel(name)}")
            for name, (bits, read) in placement.layers.items()
        ]
        return found + [(n, f"left in float: {why}") for n, why in placement.left_in_float.items()]

    def _kernel(self, layer: str) -> str:
        """What runs a layer, where the runtime that was asked is that of the target."""
        placement, run = placement_of(self.frozen), self.parity.fusion.layers
        if not placement.spec.runs_on.native:
            return ""
        # A runtime may have given a layer another name; that is no matter if all are alike.
        otherwise = True if len(run) >= len(placement.layers) and all(run.values()) else None
        kernels = {True: "int8 kernel", False: "**in floating point**", None: "kernel not known"}
        return ", " + kernels[run.get(layer, otherwise)]


def require_exporters(runtime: Runtime) -> None:
    """Stop now if a package is missing that makes a file, or the runtime that is to execute it."""
    require_onnx()
    require_runtime(runtime)


def require_no_other_card(path: Path) -> None:
    """Stop now if the card of a model at `path` would replace something else.

    Raises:
        SparkirError: there is a Markdown file of that name, and it is no model card.
    """
    beside = path.with_suffix(".md")
    if beside.exists() and not is_card(beside):
        raise SparkirError(
            f"{beside} is there, where the model card goes, and is none; choose another name"
        )


def export_onnx(
    frozen: GraphModule, recipe: Recipe, images: Sequence[Tensor], *, allow_mismatch: bool = False
) -> Exported:
    """Make the ONNX file of an integer network and have its runtime execute it on `images`.

    Raises:
        SparkirError: it shows other pixels than the integer network, the first layer named; with
            `allow_mismatch` its card says so instead.
    """
    import onnx

    model = to_onnx(frozen)
    parity = check_parity(model, frozen, images)
    if not allow_mismatch:
        require_parity(parity)
    spec = placement_of(frozen).spec
    card = Card(
        facts=facts_of(frozen),
        quantization=spec.label,
        target=spec.target,
        recipe=recipe.name,
        training=recipe.to_toml(),
        licence=recipe.data.licence,
        differs="; ".join(parity.failures[:3]),
    )
    onnx.helper.set_model_props(model, card.to_metadata())
    return Exported(model=model, frozen=frozen, parity=parity, card=card)


def measured_words(psnr_db: float, ssim: float, convention: str, count: int, images: str) -> str:
    """What a card says of quality, the mean of `count` images."""
    return (
        f"PSNR {psnr_db:.2f} dB, SSIM {ssim:.4f} ({convention}; SSIM alike), mean of "
        f"{count} image{'s' * (count > 1)} of {images}"
    )
