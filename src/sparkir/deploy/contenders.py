"""What takes part in a benchmark: one file in one runtime and one arithmetic.

Opening a contender imports its runtime and nothing else, so that a child process can measure what
the runtime alone needs.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from sparkir.deploy.session import (
    RUNTIMES,
    TITLES,
    OpenVinoSession,
    Runtime,
    open_session,
    openvino_core,
)
from sparkir.errors import SparkirError
from sparkir.quant.spec import STORED_BITS
from sparkir.quant.targets import TARGETS, TargetName

if TYPE_CHECKING:
    from torch import fx

    from sparkir.deploy.card import Card

Engine = Literal["torch", "onnxruntime", "openvino", "executorch"]
Arithmetic = Literal[
    "float32", "float32 channels_last", "bfloat16 channels_last", "bfloat16", "integer"
]
Run = Callable[[np.ndarray], object]
"""(1, C, H, W) float32 in the network's value range -> the restored image, in the engine's form."""

ENGINES: dict[Engine, str] = {
    "torch": "torch",
    "onnxruntime": TITLES["onnxruntime"],
    "openvino": TITLES["openvino"],
    "executorch": "ExecuTorch",
}
_REMEDIES: dict[Engine, str] = {
    "onnxruntime": 'pip install "sparkir[onnx]"',
    "openvino": 'pip install "sparkir[openvino]"',
    "executorch": 'pip install "sparkir[mobile]"',
}
_MADE_FOR: dict[Engine, tuple[TargetName, ...]] = {
    "onnxruntime": ("onnxruntime", "portable"),
    "openvino": ("openvino",),
    "executorch": ("onnxruntime", "portable"),
}
_LONGEST_REASON = 200


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One file in one runtime and one arithmetic."""

    engine: Engine
    arithmetic: Arithmetic
    file: str
    """An .onnx or .pte file; for torch, a module that `torch.save` wrote."""
    file_bytes: int | None = None
    """Size of the deployed file; None for torch, which has none."""
    size_px: tuple[int, int] | None = None
    """Height and width of the only input it takes; None for any."""
    integer_share: float | None = None
    """Operators that the runtime runs on integers, of all; None where nobody asked."""
    layers: int = 0
    """Convolutions and linear layers."""
    float_layers: int = 0
    """How many of them run in floating point."""
    notes: tuple[str, ...] = ()
    """What a reader must know of its speed."""
    failure: str = ""
    """Why it cannot run at all."""

    @property
    def label(self) -> str:
        """Such as `ONNX Runtime integer`."""
        return f"{ENGINES[self.engine]} {self.arithmetic}"


def installed(engine: Engine) -> bool:
    """Whether this engine can be used here."""
    return find_spec(engine) is not None


def missing() -> list[str]:
    """Each engine that is not installed, with the remedy."""
    return [f"{ENGINES[e]} ({how})" for e, how in _REMEDIES.items() if not installed(e)]


def versions() -> dict[str, str]:
    """The version of every engine here, of Python and the system, and what computes."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    found["processor"] = _processor()
    for engine in ENGINES:
        try:
            found[engine] = version(engine)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Its name where the system tells, and its instructions for integers and bfloat16."""
    from torch.cpu import get_capabilities

    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        named = re.search(r"model name\s*:\s*(.+)", facts.read_text("utf-8", "replace"))
        name = named[1].strip() if named else name
    there = [kind for kind, has in get_capabilities().items() if has is True]
    fast = sorted(
        kind for kind in there if kind.startswith("amx") or kind.endswith(("vnni", "bf16"))
    )
    return f"{name}: {' '.join(fast) or 'none of VNNI, AMX, bf16'}"


def reason_of(error: BaseException) -> str:
    """An engine's complaint, on one line of a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."


def torch_contenders(file: Path) -> list[Contender]:
    """Eager torch, of a float module that `torch.save` wrote."""
    kinds: tuple[Arithmetic, ...] = (
        "float32",
        "float32 channels_last",
        "bfloat16 channels_last",
    )
    return [Contender(engine="torch", arithmetic=kind, file=str(file)) for kind in kinds]


def float_contenders(file: Path) -> list[Contender]:
    """A float .onnx in every runtime that is installed."""
    kinds: tuple[tuple[Runtime, Arithmetic], ...] = (
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
    )
    return [
        Contender(engine=engine, arithmetic=kind, file=str(file), file_bytes=file.stat().st_size)
        for engine, kind in kinds
        if installed(engine)
    ]


def integer_contenders(file: Path, card: Card) -> list[Contender]:
    """An integer .onnx in every runtime that is installed, with what each makes of it."""
    here = [engine for engine in RUNTIMES if installed(engine)]
    return [_integer_contender(file, card, engine) for engine in here]


def _integer_contender(file: Path, card: Card, engine: Runtime) -> Contender:
    import onnx

    from sparkir.deploy.runtime import fusion_of

    plain = Contender(
        engine=engine, arithmetic="integer", file=str(file), file_bytes=file.stat().st_size
    )
    try:
        fusion = fusion_of(onnx.load(file), engine)
    except Exception as error:  # noqa: BLE001 - each runtime raises its own
        return replace(plain, failure=reason_of(error))
    layers, in_float = len(fusion.layers), len(fusion.float_layers)
    return replace(
        plain,
        integer_share=fusion.integer_share,
        layers=layers,
        float_layers=in_float,
        notes=notes_on(card, engine, layers=layers, float_layers=in_float),
    )


def executorch_contender(
    frozen: fx.GraphModule, size_px: tuple[int, int], folder: Path
) -> Contender:
    """The ExecuTorch program of an integer network for inputs of one size, written to `folder`."""
    from sparkir.deploy.card import read_card
    from sparkir.deploy.executorch import ExecuTorchSession, to_executorch, write_program

    file = folder / f"{size_px[0]}x{size_px[1]}.pte"
    plain = Contender(engine="executorch", arithmetic="integer", file=str(file), size_px=size_px)
    try:
        program = to_executorch(frozen, largest_px=size_px, fixed_size=True)
        write_program(program, file)
        card = read_card(ExecuTorchSession(program.content).metadata, file.name)
    except Exception as error:  # noqa: BLE001 - the exporter raises many kinds
        return replace(plain, failure=reason_of(error))
    ran = program.delegation
    kernels = [kinds.total() for kinds in (ran.int8, ran.float, ran.conversion, ran.portable)]
    layers, in_float = len(ran.layers), len(ran.float_layers)
    return replace(
        plain,
        file_bytes=len(program.content),
        integer_share=kernels[0] / max(1, sum(kernels)),
        layers=layers,
        float_layers=in_float,
        notes=notes_on(card, "executorch", layers=layers, float_layers=in_float),
    )


def notes_on(card: Card, engine: Engine, *, layers: int, float_layers: int) -> tuple[str, ...]:
    """What keeps the speed of an integer file from being that of its integers."""
    found = []
    if card.target not in _MADE_FOR[engine]:
        target = TARGETS.get(cast("TargetName", card.target))
        made = f"made for {target.title}" if target else "does not say what it was made for"
        found.append(f"{made}, not for {ENGINES[engine]}" if target else made)
    if float_layers and float_layers == layers:
        found.append("every convolution runs in float: an integer network simulated")
    elif float_layers:
        found.append(f"{float_layers} of {layers} convolutions run in float")
    bits = re.match(r"W(\d+)", card.quantization)
    if bits and int(bits[1]) < 8:
        packed = next(width for width in STORED_BITS if width >= int(bits[1]))
        stored = 8 if engine == "executorch" else packed
        found.append(f"weights of {bits[1]} bits, stored in {stored} bits, computed in int8")
    return tuple(found)


def open_contender(contender: Contender, *, threads: int) -> Run:
    """Import the engine and open the file; for torch, `threads` holds for the whole process.

    Raises:
        SparkirError: the file or the arithmetic does not fit the engine, or the engine cannot be
            held to so many threads. Engines raise errors of their own, too.
    """
    match contender.engine:
        case "torch":
            return _open_torch(contender, threads)
        case "executorch":
            return _open_executorch(contender, threads)
        case "openvino" if contender.arithmetic == "bfloat16":
            return _open_openvino_bfloat16(contender, threads)
        case engine:
            return open_session(Path(contender.file), runtime=engine, threads=threads).run


def _open_torch(contender: Contender, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    plain = contender.arithmetic == "float32"
    layout: Any = torch.contiguous_format if plain else torch.channels_last
    half = contender.arithmetic == "bfloat16 channels_last"
    # Our own file, made a moment ago; weights alone would not say how to run them.
    network = torch.load(contender.file, weights_only=False).to(memory_format=layout).eval()

    def run(lq: np.ndarray) -> object:
        image = torch.from_numpy(lq).contiguous(memory_format=layout)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(image)

    return run


def _open_openvino_bfloat16(contender: Contender, threads: int) -> Run:
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise SparkirError("this processor has no bfloat16 arithmetic for OpenVINO")
    return OpenVinoSession(Path(contender.file), threads=threads, precision="bf16").run


def _open_executorch(contender: Contender, threads: int) -> Run:
    import os

    all_of_them = os.cpu_count() or threads
    if threads != all_of_them:
        raise SparkirError(
            f"ExecuTorch takes all {all_of_them} cores, not {threads}; measure it without "
            "--threads, in a process that may use all of them"
        )
    from sparkir.deploy.executorch import ExecuTorchSession

    return ExecuTorchSession(Path(contender.file)).run
