"""An integer network as an ExecuTorch program (.pte) that XNNPACK's int8 kernels run on phones."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import fx

from sparkir.data.atomic import atomic_file
from sparkir.deploy.card import Card
from sparkir.deploy.decomposed import to_decomposed
from sparkir.deploy.delegation import Delegation, delegation_of
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, facts_of
from sparkir.quant.prepare import example_px, placement_of

LARGEST_PX = (256, 256)
_METADATA = "metadata"
_SIZES = "sizes"


@dataclass(frozen=True)
class MobileProgram:
    """A program, and what it asks the runtime to do."""

    content: bytes
    """The .pte file."""
    delegation: Delegation
    """Which operations run as int8 kernels, and which do not."""


def require_executorch() -> None:
    """Say how to install ExecuTorch, if it is missing."""
    try:
        with _quiet():
            import executorch.exir  # noqa: F401 - also registers quantized_decomposed
    except ImportError as error:
        raise SparkirError(
            f'the mobile export needs {error.name}, which is not installed: pip install "sparkir'
            '[mobile]"'
        ) from error


def to_executorch(
    frozen: fx.GraphModule,
    metadata: Mapping[str, str] | None = None,
    *,
    largest_px: tuple[int, int] = LARGEST_PX,
    fixed_size: bool = False,
    with_grids: bool = False,
) -> MobileProgram:
    """The ExecuTorch program of an integer network, lowered to XNNPACK.

    Its method `forward` maps `lq` (1, C, H, W) to the restored image (1, C, sH, sW), both float32
    in the network's value range; its method `metadata` returns what the file says of itself.

    Args:
        frozen: what `freeze` returned.
        metadata: further entries, text by key.
        largest_px: greatest height and width that the program can take. Its memory is planned for
            this size, whatever the size of an image.
        fixed_size: take images of exactly that size: the whole network is then one delegate.
        with_grids: also return the signed bytes of every grid, for inspection.

    Raises:
        SparkirError: ExecuTorch is not installed, the network cannot take images of this size, is
            placed for a runtime that fuses, or cannot be exported with sizes left open.
    """
    require_executorch()
    facts = facts_of(frozen)
    _require_possible(largest_px, facts)
    spec = placement_of(frozen).spec
    if spec.runs_on.fuses:
        raise SparkirError(
            f"the network is placed for {spec.runs_on.title}, which goes on in real values where "
            'XNNPACK has integer kernels; train it with quant.target = "onnxruntime" for phones'
        )
    card = Card(facts=facts, quantization=spec.label, target=spec.target)
    sizes = {"largest_px": largest_px, "fixed_size": fixed_size}
    said = {**card.to_metadata(), **(metadata or {}), _SIZES: json.dumps(sizes)}
    view = to_decomposed(frozen, with_grids=with_grids)
    with _quiet():
        edge = _lower(_exported(view, facts, largest_px, fixed_size=fixed_size), said)
        delegation = delegation_of(edge.exported_program().graph_module)
        return MobileProgram(content=edge.to_executorch().buffer, delegation=delegation)


def write_program(program: MobileProgram, path: Path) -> None:
    """Write a program, whole or not at all.

    Raises:
        SparkirError: the file cannot be written.
    """
    try:
        with atomic_file(path) as file:
            file.write(program.content)
    except OSError as error:
        raise SparkirError(f"cannot write the program {path}: {error}") from error


class ExecuTorchSession:
    """A program ready to run, here, by the runtime that phones have."""

    runtime: Literal["executorch"] = "executorch"

    def __init__(self, program: bytes | Path) -> None:
        """Open a file or its bytes.

        Raises:
            SparkirError: ExecuTorch is not installed, or cannot open the program.
        """
        require_executorch()
        try:
            with _quiet():
                from executorch.runtime import Runtime

                content = program if isinstance(program, bytes) else program.read_bytes()
                self._program = Runtime.get().load_program(content)
                self._forward = self._program.load_method("forward")
                (said,) = self._program.load_method(_METADATA).execute([])
                self.metadata: Mapping[str, str] = json.loads(said)
                sizes = json.loads(self.metadata[_SIZES])
        except (RuntimeError, OSError, ValueError, LookupError) as error:
            name = program if isinstance(program, Path) else "the exported program"
            raise SparkirError(f"ExecuTorch cannot open {name}: {_first_line(error)}") from error
        self.largest_px: tuple[int, int] = tuple(sizes["largest_px"])
        self.fixed_size: bool = sizes["fixed_size"]

    def run(self, lq: np.ndarray) -> list[np.ndarray]:
        """All outputs for `lq` (N, C, H, W) float32 in the network's value range, one by one.

        The first is the restored image; a program made for inspection has more.

        Raises:
            SparkirError: the program cannot take images of this size.
        """
        self._require_size(lq.shape[-2], lq.shape[-1])
        images = torch.from_numpy(np.ascontiguousarray(lq)).split(1)
        try:
            each = [self._forward.execute([image]) for image in images]
        except RuntimeError as error:  # some operations do not follow a changed size
            raise SparkirError(
                f"ExecuTorch cannot run this program on {lq.shape[-2]} x {lq.shape[-1]} px "
                f"({_first_line(error)}); an operation does not fit XNNPACK, or not a size that "
                "changes: try fixed_size=True, and read the program's delegation"
            ) from error
        return [torch.cat(outputs).numpy() for outputs in zip(*each, strict=True)]

    def _require_size(self, height: int, width: int) -> None:
        largest_height, largest_width = self.largest_px
        same = (height, width) == self.largest_px
        if same or (not self.fixed_size and height <= largest_height and width <= largest_width):
            return
        limit = "exactly" if self.fixed_size else "at most"
        raise SparkirError(
            f"this program takes images of {limit} {largest_height} x {largest_width} px, but got "
            f"{height} x {width}; cut the image into tiles, or export with another largest_px"
        )


def _require_possible(largest_px: tuple[int, int], facts: ModelFacts) -> None:
    if any(side < facts.min_size_px or side % facts.size_multiple for side in largest_px):
        raise SparkirError(
            f"{facts.name} cannot take images of {largest_px[0]} x {largest_px[1]} px; choose "
            f"sides of at least {facts.min_size_px} px that are multiples of {facts.size_multiple}"
        )


def _exported(
    view: fx.GraphModule, facts: ModelFacts, largest_px: tuple[int, int], *, fixed_size: bool
) -> torch.export.ExportedProgram:
    example = torch.zeros(1, facts.channels, *largest_px)
    if fixed_size:
        return torch.export.export(view, (example,))
    smallest = example_px(facts, at_least=1)
    sides = {
        dim: torch.export.Dim.DYNAMIC(min=smallest, max=most)
        for dim, most in zip((2, 3), largest_px, strict=True)
    }
    try:
        return torch.export.export(view, (example,), dynamic_shapes=(sides,))
    except (RuntimeError, ValueError) as error:
        raise SparkirError(
            f"{facts.name} cannot be exported with sizes left open ({_first_line(error)}); "
            "pass fixed_size=True"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _lower(exported: torch.export.ExportedProgram, said: Mapping[str, str]) -> Any:  # noqa: ANN401
    """An EdgeProgramManager with XNNPACK's delegates in it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lower = cast("Callable[..., Any]", to_edge_transform_and_lower)
    return lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        constant_methods={_METADATA: json.dumps(dict(said))},
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep deprecations and advice of the exporter's own off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
