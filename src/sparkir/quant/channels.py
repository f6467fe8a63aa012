"""Which channels of a prepared network must share a factor, if it is to compute the same.

A channel may be multiplied by a positive factor where a convolution makes it and divided by it
where convolutions read it, as long as everything between commutes with that: sums, (leaky) ReLUs,
shuffles, averages. What does not, such as a sigmoid or a normalisation, keeps its channels as they
are. The network is run once, and channel numbers with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from sparkir.quant.interpolate import ExactBilinear
from sparkir.quant.layers import (
    AbsorbedReLU,
    Add,
    Concatenate,
    Dequantize,
    GlobalAverage,
    Multiply,
    PassThrough,
    QuantConv2d,
    Table,
    is_linear_from_zero,
)
from sparkir.quant.quantizer import ActivationQuantizer, ConstantQuantizer

FIXED = 0
"""The class of channels that have to stay as they are."""


class Classes:
    """Numbers of channels, and which of them share a factor: sets that grow together."""

    def __init__(self) -> None:
        """Nothing but the fixed one."""
        self._parents = [FIXED]

    def __len__(self) -> int:
        """How many numbers were given out."""
        return len(self._parents)

    def new(self, count: int) -> list[int]:
        """So many channels that share with none."""
        first = len(self._parents)
        self._parents += range(first, first + count)
        return list(range(first, first + count))

    def of(self, channel: int) -> int:
        """The number that stands for all with which this one shares."""
        while self._parents[channel] != channel:
            self._parents[channel] = self._parents[self._parents[channel]]
            channel = self._parents[channel]
        return channel

    def join(self, channels: Iterable[int]) -> None:
        """Let these share; the smallest number leads, so that what is fixed stays so."""
        first, *others = sorted({self.of(channel) for channel in channels})
        for other in others:
            self._parents[other] = first


class ChannelReader(fx.Interpreter):
    """Runs a prepared network in floating point and notes the channels of every tensor."""

    def __init__(self, student: fx.GraphModule) -> None:
        """Nothing run yet."""
        super().__init__(student)
        self.classes = Classes()
        self.channels: dict[fx.Node, list[int]] = {}
        """Of every tensor that was seen: a number for each channel."""
        self._free = _convolutions_that_can_change(student)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """What a node calls, if it is a module."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - torch's own signature
        """Run it, and find out where its channels come from."""
        result = super().run_node(n)
        if n in self.channels:  # of an image before: a channel keeps its number
            return result
        if isinstance(result, Tensor):
            count = result.shape[1] if result.dim() > 1 else 1
            found = self._channels(n, result)
            self.channels[n] = self._fix(n.all_input_nodes, count) if found is None else found
        elif not isinstance(result, int):  # several tensors
            self._fix(n.all_input_nodes, 0)
        return result

    def _channels(self, node: fx.Node, result: Tensor) -> list[int] | None:
        """The numbers of its channels; None if it does not commute with factors."""
        inputs = [self.channels[n] for n in node.all_input_nodes if n in self.channels]
        alike = len(inputs) == 2 and len(inputs[0]) == len(inputs[1])
        match module := self.module_of(node):
            case QuantConv2d() if str(node.target) in self._free:
                return self.classes.new(result.shape[1])
            case ActivationQuantizer():
                return inputs[0] if module.image_step is None else None
            case AbsorbedReLU() | Dequantize() | GlobalAverage() | ExactBilinear() | nn.Identity():
                return inputs[0]
            case Table() if is_linear_from_zero(module.operation):
                return inputs[0]
            case Concatenate() if result.dim() == 4 and module.dim in (1, -3):
                parts = cast("tuple[fx.Node, ...]", node.args)  # one may be there twice
                return [channel for part in parts for channel in self.channels[part]]
            case Add() if alike:
                for pair in zip(*inputs, strict=True):
                    self.classes.join(pair)
                return inputs[0]
            case Multiply() if alike:  # by what is fixed: a gate
                for factor, other in (inputs, inputs[::-1]):
                    if all(self.classes.of(channel) == FIXED for channel in factor):
                        return other
                return None
            case PassThrough():
                return self._moved(node, module, result)
            case _:
                return None

    def _moved(self, node: fx.Node, module: PassThrough, result: Tensor) -> list[int] | None:
        """Where each channel went, seen by its number."""
        (image, *sizes), words = self.fetch_args_kwargs_from_env(node)
        if image.dim() != 4 or result.dim() != 4:
            return None
        mine = [self.classes.of(channel) for channel in self.channels[node.all_input_nodes[0]]]

        def arrived(numbers: list[int]) -> list[list[int]]:
            """For each channel of the result, which of these positive numbers it holds."""
            planes = torch.tensor(numbers, dtype=torch.float64, device=image.device)
            planes = planes.view(1, -1, 1, 1).expand(image.shape).contiguous()
            moved = module(planes, *sizes, **words).transpose(0, 1)
            return [[int(n) for n in plane.unique().tolist() if n > 0] for plane in moved]

        end = len(self.classes) + 1
        forth, back = arrived([n + 1 for n in mine]), arrived([end - n for n in mine])
        found = []
        for there, reverse in zip(forth, back, strict=True):
            classes = [number - 1 for number in there]
            if set(classes) != {end - number for number in reverse}:
                return None  # it chose by size, as the largest of all channels
            self.classes.join(classes)
            found.append(classes[0] if classes else FIXED)  # nothing but padding
        return found

    def _fix(self, nodes: Iterable[fx.Node], count: int) -> list[int]:
        for node in nodes:
            self.classes.join([FIXED, *self.channels.get(node, ())])
        return [FIXED] * count


def _convolutions_that_can_change(student: fx.GraphModule) -> set[str]:
    """Those whose weights and biases are their own: no constants, nobody else's, parts of none."""
    owned = [id(p) for module in student.modules() for p in module._parameters.values()]
    read = [n.target for n in student.graph.nodes if n.op == "get_attr"]  # by a function
    owners = Counter([*owned, *(id(attrgetter(str(name))(student)) for name in read)])
    return {
        name
        for name, one in student.named_modules()
        if isinstance(one, QuantConv2d)
        and owners[id(one.weight)] == 1
        and (one.bias is None or owners[id(one.bias)] == 1)
        and one.phases is None
        and not isinstance(one.weight_quantizer, ConstantQuantizer)
    }
