"""A network as a function of pixels, whatever runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from sparkir.data.degrade import bicubic_resize
from sparkir.deploy.card import Card, read_card
from sparkir.deploy.session import (
    RUNTIMES,
    TITLES,
    Runtime,
    Session,
    cannot_compute,
    installed,
    open_session,
)
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, require_size
from sparkir.quant.targets import TARGETS, TargetName
from sparkir.restore.memory import is_allocation_failure

Run = Callable[[np.ndarray], np.ndarray]
"""(N, C, H, W) float32 in [0, value_range] -> (N, C, sH, sW) float32, not clipped."""

_FULL_RANGE_WEIGHTS = np.array((0.299, 0.587, 0.114))  # BT.601
_STUDIO_BLACK, _STUDIO_SWING = 16.0, 219.0
_TRIAL_PX, _LARGEST_TRIAL_PX = 16, 2048


@dataclass(frozen=True, kw_only=True)
class Restorer:
    """A network that restores pictures."""

    facts: ModelFacts
    run: Run
    label: str
    """What messages call it."""
    identity: str
    """Known by this, its results are found again: a hash of all that decides what it computes."""
    doubt: str = ""
    """What is to be said of its results before they are made."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Restore (h, w, c) uint8 or uint16 to (s*h, s*w, c) float32 in the same levels.

        c is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha). Grey is given to the
        network as three equal channels and what comes back is its luma; a network of 1 channel
        restores the luma, and the colours come from the bicubically enlarged picture. Alpha is
        enlarged bicubically. The result is neither clipped nor rounded.

        16-bit pixels are given to the network at their full precision. An integer network rounds
        its input to a grid of at most 256 levels, though, so that it sees no more than 8 bits of
        them; what 16 bits then keep are the steps between its own output levels.

        Raises:
            SparkirError: the picture is too small for the network, or the network does not do
                what its card says.
        """
        white = np.iinfo(pixels.dtype).max
        grey, transparent = pixels.shape[2] < 3, pixels.shape[2] % 2 == 0
        colours = pixels[..., :-1] if transparent else pixels
        rgb = np.repeat(colours, 3, axis=2) if grey else colours
        restored = self._luma(rgb) if self.facts.channels == 1 else self._colours(rgb)
        if grey:
            restored = (restored @ _FULL_RANGE_WEIGHTS)[..., None].astype(np.float32)
        levels: np.ndarray = restored * np.float32(white)
        if not transparent:
            return levels
        return np.concatenate([levels, self._enlarged(pixels[..., -1:])], axis=2)

    def _colours(self, rgb: np.ndarray) -> np.ndarray:
        """(h, w, 3) in levels -> (s*h, s*w, 3) around [0, 1]."""
        return self._fitted(rgb.astype(np.float32) / np.float32(np.iinfo(rgb.dtype).max))

    def _luma(self, rgb: np.ndarray) -> np.ndarray:
        """The same by a network of brightness alone; as `evaluate.infer` measures it."""
        enlarged = self._enlarged(rgb)
        plane = self._luma_like(rgb)[..., None].astype(np.float32) / 255
        restored = self._fitted(plane)[..., 0].astype(np.float64) * 255
        change = restored - self._luma_like(enlarged)
        if self.facts.luma_range == "studio":
            change *= 255 / _STUDIO_SWING
        mixed: np.ndarray = enlarged * (255 / np.iinfo(rgb.dtype).max) + change[..., None]
        return (mixed / 255).astype(np.float32)

    def _luma_like(self, rgb: np.ndarray) -> np.ndarray:
        """(h, w, 3) in levels -> (h, w) float64 in 0..255, of the range the network wants."""
        full: np.ndarray = (rgb * (255 / np.iinfo(rgb.dtype).max)) @ _FULL_RANGE_WEIGHTS
        if self.facts.luma_range == "full":
            return full
        return _STUDIO_BLACK + full * (_STUDIO_SWING / 255)

    def _enlarged(self, pixels: np.ndarray) -> np.ndarray:
        scale = self.facts.scale
        return bicubic_resize(pixels, scale=scale, border="replicate") if scale > 1 else pixels

    def _fitted(self, lq: np.ndarray) -> np.ndarray:
        """(h, w, C) in [0, 1] -> (s*h, s*w, C), whatever sizes and range the network wants."""
        height, width, channels = lq.shape
        padded = _padded(lq, self.facts) * np.float32(self.facts.value_range)
        batch = np.ascontiguousarray(padded.transpose(2, 0, 1)[None], np.float32)
        restored = self.run(batch)
        scale = self.facts.scale
        expected = (1, channels, scale * padded.shape[0], scale * padded.shape[1])
        if restored.shape != expected:
            raise SparkirError(
                f"{self.label}: its facts say {channels} channels and x{scale}, but an input of "
                f"{batch.shape} gives {restored.shape} instead of {expected}; mend them, or export "
                "it again"
            )
        image = restored[0].transpose(1, 2, 0)[: scale * height, : scale * width]
        return np.asarray(image, np.float32) / np.float32(self.facts.value_range)


def _padded(lq: np.ndarray, facts: ModelFacts) -> np.ndarray:
    """Reflect at the bottom and right up to the size multiple, as `models.facts.restore` does."""
    height, width = lq.shape[:2]
    bottom, right = -height % facts.size_multiple, -width % facts.size_multiple
    require_size(facts, height, width)
    return np.pad(lq, ((0, bottom), (0, right), (0, 0)), mode="reflect")


def open_exported(path: Path, runtime: str | None = None) -> Restorer:
    """Open an exported .onnx file in a runtime, and see that it does what its card says.

    The runtime is the one that the file was made for, if it is installed, unless given.

    Raises:
        SparkirError: it is missing, damaged, not exported by sparkir, or its card is wrong.
    """
    if runtime is None:
        runtime = runtime_for(path)
    known = next((name for name in RUNTIMES if name == runtime), None)
    if known is None:
        raise SparkirError(f"--runtime {runtime!r}: choose one of {', '.join(RUNTIMES)}")
    session = _Reopening(path, known)
    card = read_card(session.metadata, str(path))
    doubt = _doubt(card, known)
    restorer = Restorer(
        facts=card.facts,
        run=session,
        label=f"{path} in {TITLES[known]}",
        identity=f"{_hash_of(path)}{f' {known}' * bool(doubt)}",
        doubt=doubt,
    )
    _try_out(restorer, path)
    return restorer


def runtime_for(path: Path) -> Runtime:
    """What the card asks for, if it is installed and computes right here; else what is."""
    present = [name for name in RUNTIMES if installed(name)]
    if len(present) < 2:
        return present[0] if present else RUNTIMES[0]
    card = read_card(open_session(path, runtime=present[0]).metadata, str(path))
    wanted = _runtime_of(card) or present[0]
    return RUNTIMES[0] if _saturates(card, wanted) else wanted


def _runtime_of(card: Card) -> Runtime | None:
    return next((t.runtime for name, t in TARGETS.items() if name == card.target), None)


def _doubt(card: Card, runtime: Runtime) -> str:
    """Why a runtime may show other pixels than the integer network has."""
    if _saturates(card, runtime):
        return (
            "OpenVINO shows other pixels on this processor, an x86 without VNNI, unless trained "
            "with quant.reduce_range = true; ONNX Runtime does not"
        )
    made_for = _runtime_of(card)
    if made_for in (None, runtime) or card.target == "openvino":  # that one is right in both
        return ""
    return (
        f"the file was made for {TARGETS[cast('TargetName', card.target)].title}; "
        f"{TITLES[runtime]} may show slightly other pixels"
    )


def _saturates(card: Card, runtime: Runtime) -> bool:
    """Whether sums of two 8-bit products would not fit; see `deploy.runtime.saturates`."""
    held = "reduce_range = true" in card.training.splitlines() or card.quantization == "float"
    return runtime == "openvino" and not held and lacks_vnni()


def lacks_vnni() -> bool:
    """Whether this is an x86 without VNNI, by what Linux says; elsewhere it is not known.

    Without torch, which `deploy.runtime` asks.
    """
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return "sse2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags)


class _Reopening:
    """A session that starts anew when it got no memory, to give back what it holds."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.path, self.runtime = path, runtime
        self.session: Session | None = open_session(path, runtime=runtime)
        self.metadata = self.session.metadata

    def __call__(self, lq: np.ndarray) -> np.ndarray:
        try:
            if self.session is None:
                self.session = open_session(self.path, runtime=self.runtime)
            return np.asarray(self.session.run(lq)[0])
        except Exception as error:  # each runtime raises its own, and they share no base
            if not is_allocation_failure(error):
                raise cannot_compute(self.path, lq.shape, error) from error
            reason = " ".join(str(error).split())[:300]
        # Only here, where nothing refers to the error: its traceback holds the session.
        self.session = None
        raise MemoryError(reason)


def _hash_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise SparkirError(f"cannot read {path}: {error.strerror}") from error


def _try_out(restorer: Restorer, path: Path) -> None:
    """Run a small picture through: a card that does not fit shows here, not after an hour."""
    facts = restorer.facts
    step = facts.size_multiple
    side = -(-max(facts.min_size_px, _TRIAL_PX) // step) * step
    if side > _LARGEST_TRIAL_PX:
        raise SparkirError(
            f"the card of {path} says that the network needs pictures of {side} x {side} px; if "
            "that is not so, export it again"
        )
    try:
        restorer(np.zeros((side, side, 3), np.uint8))
    except MemoryError as error:
        raise SparkirError(
            f"there is no memory to run {path} on {side} x {side} px; close other programs"
        ) from error
