"""Weights in and out of files, without running code from them and without half-loaded networks."""

import pickle
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparkir.data.atomic import atomic_file
from sparkir.data.codec import one_line
from sparkir.errors import SparkirError

_NESTS = (
    *("params_ema", "state_dict_ema", "model_ema", "ema"),
    *("params", "state_dict", "model", "net_g"),
)
"""Where the weights may lie, in order of preference: averaged ones come first."""
_COUNTERS = ("n_averaged",)  # of torch's own average, beside its `module.`
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_LISTED_KEYS = 5
# What torch.load raises, besides UnpicklingError, for files that are cut off or altered.
_CORRUPT = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint into a network, all of it or nothing.

    Understands ``.safetensors``, and ``.pth``/``.pt`` of tensors, where the weights may lie
    under ``params_ema``, ``params``, ``state_dict``, ``model`` or ``net_g`` and the like (averaged
    ones are preferred) and may carry the prefixes ``module.`` or ``_orig_mod.``. Nothing in the
    file is executed. A network may have a method ``from_published(state)`` that translates
    published keys to its own.

    Raises:
        SparkirError: the file is missing or no checkpoint, its tensors do not fit the network in
            name, shape or kind of number, or a value is NaN or infinite. The network is then
            unchanged.
    """
    state = read_weights(path)
    translate = getattr(network, "from_published", None)
    if translate is not None:
        with suppress(LookupError, RuntimeError):  # of keys or shapes that are not there
            state = translate(state)
    _require_match(state, network.state_dict(), path)
    network.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint file by name, on the CPU; see :func:`load_weights`."""
    state = _strip_prefixes(_unnest(read_checkpoint(path), path))
    require_finite(state, path)
    return state


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Return what a checkpoint file holds, nested as it is; nothing in it is executed.

    Raises:
        SparkirError: the file is missing, damaged, or holds more than plain tensors and values.
    """
    if not path.is_file():
        raise SparkirError(f"no weights at {path}; check the path")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def require_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise SparkirError, which speaks of `path`, if a value is NaN or infinite."""
    for name, tensor in state.items():
        # Not every float, such as 8-bit ones, can be asked.
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise SparkirError(
                f"{path}: {name} holds NaN or infinite values; "
                "the training diverged, use an earlier checkpoint"
            )


def read_metadata(path: Path) -> dict[str, str]:
    """Return what :func:`save_weights` was given as ``metadata``.

    Raises:
        SparkirError: the file is missing or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def save_weights(
    network_or_state: nn.Module | Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write weights as safetensors; the file appears whole or not at all.

    Args:
        network_or_state: a network, or tensors by name. Tensors that share memory are stored
            once each.
        path: must end in ``.safetensors``; missing folders are made, an older file is replaced.
        metadata: words to keep with the weights, such as the model's name and options.

    Raises:
        SparkirError: another suffix, or the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise SparkirError(f"weights are saved as .safetensors, got {path.name!r}; rename it")
    state = network_or_state
    if isinstance(state, nn.Module):
        state = state.state_dict()
    # Cloned, because safetensors refuses tensors that share memory or are not contiguous.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    content = safetensors.torch.save(tensors, metadata=dict(metadata))
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise SparkirError(
            f"cannot write weights to {path}: {one_line(error)}; free some space, or choose "
            "another place"
        ) from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SparkirError(
            f"{path} is no checkpoint of plain tensors, and anything else stays closed because it "
            "could run code; save network.state_dict() instead of the network"
        ) from error
    except _CORRUPT as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise SparkirError(
            f"{path} holds a {type(content).__name__} instead of weights by name; "
            "save network.state_dict()"
        )
    return content


def _unreadable(path: Path, error: Exception) -> SparkirError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return SparkirError(f"cannot read weights from {path}: {reason}; is the file complete?")


def _unnest(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Go down to the mapping that holds the tensors."""
    filled = (key for key in _NESTS if isinstance(content.get(key), Mapping) and content[key])
    nest = next(filled, None)
    if nest is not None:
        return _unnest(content[nest], path)
    strangers = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strangers or not content:
        found = ", ".join(strangers[:_LISTED_KEYS]) or "nothing"
        raise SparkirError(
            f"{path} holds {found} where weights by name were expected "
            f"(looked under {', '.join(_NESTS)}); save network.state_dict()"
        )
    plain = {name: tensor for name, tensor in content.items() if name not in _COUNTERS}
    for name, tensor in plain.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise SparkirError(
                f"{path}: {name} is no plain tensor; save the weights as dense float32"
            )
    return plain


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off wrappers' prefixes, however many, as long as every key has them."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _strip_prefixes({key.removeprefix(prefix): state[key] for key in state})
    return state


def _require_match(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    differing = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": differing,
        "of another kind of number": [
            f"{name} {state[name].dtype} instead of {tensor.dtype}"
            for name, tensor in expected.items()
            if name in state and _kind(state[name]) != _kind(tensor)
        ],
    }
    report = "; ".join(_listed(kind, names) for kind, names in problems.items() if names)
    if report:
        raise SparkirError(
            f"the weights in {path} are not of this network: {report}. "
            "Check the network's name and its options (scale, width, ...)"
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """What copying it into another one would lose: fractions, or an imaginary part."""
    return tensor.is_floating_point(), tensor.is_complex()


def _listed(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _LISTED_KEYS else ""
    return f"{len(names)} {kind}: {', '.join(names[:_LISTED_KEYS])}{more}"
