"""Looking inside a network while it restores: hooks that live for one forward and no longer."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, as_seen, facts_of, restore
from sparkir.quant.arithmetic import Value, real_values


def observe(
    network: nn.Module, taps: tuple[str, ...], lq: Float[Tensor, "b k h w"]
) -> tuple[Float[Tensor, "b c H W"], tuple[Tensor, ...]]:
    """Restore `lq` and look at the features on the way.

    Args:
        network: a network with facts, in floating point or prepared for quantization.
        taps: names from its facts.
        lq: images in [0, 1], RGB; a network of one channel restores their luma.

    Returns:
        The output in [0, 1], and for each tap its feature map (b, channels, h', w') in units of the
        network's white level, so that networks of [0, 1] and of [0, 255] speak of the same thing.
        What belongs to padding of the image is cut off. All float32; gradients flow.

    Raises:
        SparkirError: a tap is no part of the network, was not reached or is no feature map.
    """
    found: dict[str, Tensor] = {}
    facts = facts_of(network)
    with ExitStack() as hooks:
        for tap in taps:
            handle = _tapped(network, tap).register_forward_hook(partial(_keep, found, tap))
            hooks.callback(handle.remove)
        output = restore(network, as_seen(lq, facts)).float()
    return output, tuple(_feature(found.get(tap), tap, facts, lq) for tap in taps)


def _keep(
    found: dict[str, Tensor], tap: str, module: nn.Module, inputs: object, output: object
) -> None:
    """A forward hook; a quantized network's values are brought back from their grids."""
    values = real_values(cast("Value", output))
    factor = getattr(module, "factor", None)  # of channels that were scaled
    found[tap] = values if factor is None else values / factor


def _tapped(network: nn.Module, tap: str) -> nn.Module:
    """The module whose output the tap is; a traced network marks it with one of its own."""
    for name in (f"taps.{tap.replace('.', '_')}", tap):
        with suppress(AttributeError):
            return network.get_submodule(name)
    facts = facts_of(network)
    raise SparkirError(
        f"{facts.name} has no module {tap!r}, which its facts name as a tap; correct facts.taps"
    )


def _feature(found: Tensor | None, tap: str, facts: ModelFacts, lq: Tensor) -> Tensor:
    if found is None:
        raise SparkirError(
            f"nothing passed through {tap!r} of {facts.name}, so its features cannot be compared; "
            "name another tap in its facts, and do not compile a network that is looked into"
        )
    if not isinstance(found, Tensor) or found.dim() != 4:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise SparkirError(
            f"the tap {tap!r} of {facts.name} gives {shape}; name one that gives a feature map "
            "(batch, channels, height, width)"
        )
    height, width = (
        _without_padding(inside, side, facts.size_multiple)
        for inside, side in zip(found.shape[-2:], lq.shape[-2:], strict=True)
    )
    return found[..., :height, :width].float() / facts.value_range


def _without_padding(inside: int, side: int, multiple: int) -> int:
    """Rows of a feature that belong to the image itself, of `inside` for the padded image."""
    padded = side + -side % multiple
    return -(-inside * side // padded)


def paired_taps(
    student: tuple[str, ...], teacher: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As many taps of either as the shorter list has, spread evenly, the last with the last."""
    count = min(len(student), len(teacher))
    return _spread(student, count), _spread(teacher, count)


def _spread(taps: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(taps[round((i + 1) * len(taps) / count) - 1] for i in range(count))


def at_one_size(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b d H W"]
) -> tuple[Float[Tensor, "b c g k"], Float[Tensor, "b d g k"]]:
    """Two maps at the smaller of their sizes; the larger is averaged down.

    Networks that enlarge at their beginning (SRCNN) have larger features than those that enlarge
    at their end; no publication says what to compare then.
    """
    size = (
        min(student.shape[-2], teacher.shape[-2]),
        min(student.shape[-1], teacher.shape[-1]),
    )
    return _averaged(student, size), _averaged(teacher, size)


def _averaged(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if feature.shape[-2:] == size else F.adaptive_avg_pool2d(feature, size)
