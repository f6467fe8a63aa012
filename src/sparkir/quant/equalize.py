"""Factors for channels with which rounding costs the output least.

A tensor has one grid, and its widest channel decides the step of all. A channel may be multiplied
where it is made and divided where it is read (`channels`), which changes nothing but how much of
its grid it fills. Nagel et al. (ICCV 2019, arXiv 1906.04721) make pairs of layers alike; here all
channels of any graph are chosen together, for the least noise that is to be expected in the output:

    sum over tensors and channels c   (range of the grid / levels)^2 / 12   * G_c / f_c^2
    + sum over weights o, i           (range of row o / levels)^2 / 12      * G_oi * f_i^2

with the factors f, ranges of what is stored, and G the squared gradient of the output by what
is rounded, which backward passes with random signs measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from sparkir.errors import SparkirError
from sparkir.models.modes import evaluating
from sparkir.quant.calibrate import NO_IMAGES
from sparkir.quant.channels import FIXED, ChannelReader
from sparkir.quant.graph import Tap
from sparkir.quant.layers import QuantConv2d
from sparkir.quant.quantizer import ActivationQuantizer, leave_in_float
from sparkir.quant.ranges import NOT_FINITE

_ROUNDS, _RATE = 300, 0.1
_WITH_GRADIENTS = 3
"""Batches; ranges want all of them, as what is not seen is cut off."""
_TO_ONE = 0.2
"""What the mean squared logarithm of the factors costs, beside the logarithm of the noise."""


class NoiseShare(NamedTuple):
    """Expected squared error of the output, in squares of the network's own values."""

    tensors: float
    weights: float


def equalize(student: fx.GraphModule, batches: Iterable[Tensor]) -> tuple[NoiseShare, NoiseShare]:
    """Scale the channels of a prepared network, which computes the same, for its coming grids.

    Args:
        student: what `prepare` returned, its grids not yet fitted or to be fitted again.
        batches: images (B, C, H, W) in the network's value range.

    Returns:
        What rounding is expected to cost the output with factors of 1, and with those chosen.

    Raises:
        SparkirError: there are no images, or the network computes NaN on them; nothing was scaled.
    """
    leave_in_float(student, on=True)
    try:
        with evaluating(student), _gradients_asked_for(student):
            noise = _Noise(student, batches)
    finally:
        leave_in_float(student, on=False)
    factors = noise.least()
    if not bool(factors.isfinite().all()):
        raise SparkirError(NOT_FINITE)
    noise.scale(factors)
    return noise.share(torch.ones_like(factors)), noise.share(factors)


@contextmanager
def _gradients_asked_for(student: nn.Module) -> Iterator[None]:
    """Of all parameters, frozen ones too; then everything as it was, gradients included."""
    kept = {p: (p.requires_grad, p.grad) for p in student.parameters()}
    student.requires_grad_(True)
    student.zero_grad()
    try:
        yield
    finally:
        for parameter, (asked, gradient) in kept.items():
            parameter.requires_grad_(asked)
            parameter.grad = gradient


@dataclass
class _Seen:
    """What was seen of one tensor in front of its grid."""

    channels: list[int]
    low: Tensor
    high: Tensor
    squared_gradient: Tensor | float = 0.0


class _Convolution(NamedTuple):
    """A convolution whose weights may be scaled, and the classes of its channels."""

    layer: QuantConv2d
    made: Tensor
    """(O,)"""
    read: Tensor
    """(O, I / groups), or (1, I) where there are no groups"""


class _Tensors(NamedTuple):
    """T tensors of C channels, as they are in front of their grids."""

    classes: Tensor
    """(T, C), of their channels."""
    low: Tensor
    """(T, C), 0 or less."""
    high: Tensor
    costs: Tensor
    """(T, C), noise of the output for a grid's range of 1."""
    symmetric: Tensor
    """(T,), whether the grid is, where anything is negative."""

    def noise(self, factors: Tensor) -> Tensor:
        """(), of the output."""
        scaled = factors[self.classes]
        low, high = (scaled * self.low).amin(1), (scaled * self.high).amax(1)
        middle = 2 * torch.maximum(-low, high)
        width = torch.where(self.symmetric & (low < 0), middle, high - low)
        return (width.square() * (self.costs / scaled.square()).sum(1)).sum()


class _Weights(NamedTuple):
    """The weights of K convolutions of one shape."""

    read: Tensor
    """(K, O or 1, I), the classes of what is read."""
    sizes: Tensor
    """(K, O, I), the largest weight of each kernel."""
    costs: Tensor
    """(K, O, I), noise of the output for a row's range of 1."""

    def noise(self, factors: Tensor) -> Tensor:
        """(), of the output."""
        read = factors[self.read].expand_as(self.sizes)
        widest = (self.sizes / read.detach()).argmax(2, keepdim=True)
        half = self.sizes.gather(2, widest) / read.gather(2, widest)  # rows are symmetric
        return (4 * half.squeeze(2).square() * (read.square() * self.costs).sum(2)).sum()


class _Observer(ChannelReader):
    """Also keeps ranges in front of grids, and lets gradients be asked for there."""

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__(student)
        self.tensors: dict[fx.Node, _Seen] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - torch's own signature
        """Run it; a grid's node gives a copy that has a gradient of its own."""
        result = super().run_node(n)
        grid = self.module_of(n)
        if not isinstance(grid, ActivationQuantizer) or grid.image_step or result.dim() != 4:
            return result
        self._note(n, result.detach())
        copy = result.clone()
        if copy.requires_grad:
            copy.register_hook(lambda gradient: self._note_gradient(n, gradient))
        return copy

    def _note(self, node: fx.Node, x: Tensor) -> None:
        low, high = x.amin((0, 2, 3)).clamp_max(0), x.amax((0, 2, 3)).clamp_min(0)
        seen = self.tensors.setdefault(node, _Seen(self.channels[node], low, high))
        seen.low, seen.high = seen.low.minimum(low), seen.high.maximum(high)

    def _note_gradient(self, node: fx.Node, gradient: Tensor) -> None:
        self.tensors[node].squared_gradient += gradient.double().square().sum((0, 2, 3))


class _Noise:
    """What rounding costs the output, as a function of the factors."""

    def __init__(self, student: fx.GraphModule, batches: Iterable[Tensor]) -> None:
        reader, draw = _Observer(student), torch.Generator().manual_seed(0)
        count = 0
        for batch in batches:
            if count == _WITH_GRADIENTS:
                with torch.no_grad():
                    reader.run(batch)
                continue
            count += 1
            with torch.enable_grad():
                output = reader.run(batch)
                signs = torch.randint(2, output.shape, generator=draw).to(output) * 2 - 1
                if output.requires_grad:
                    (output * signs).sum().div(output.numel() ** 0.5).backward()
        if not count:
            raise SparkirError(NO_IMAGES)
        self.student, self.classes = student, reader.classes
        self.taps = {
            module: self._classes_of(channels)
            for node, channels in reader.channels.items()
            if isinstance(module := reader.module_of(node), Tap)
        }
        self._take_tensors(reader, count)
        self._take_convolutions(reader, count)

    def _take_tensors(self, reader: _Observer, batches: int) -> None:
        grids: dict[str, list[_Seen]] = {}
        for node, one in reader.tensors.items():
            if isinstance(one.squared_gradient, Tensor):
                grids.setdefault(str(node.target), []).append(one)
        rows = []
        for name, parts in grids.items():
            grid = self._quantizer(reader, name)
            per_step = 12 * (grid.levels - 1) ** 2 * batches
            gradient = torch.cat([torch.as_tensor(part.squared_gradient) for part in parts])
            rows.append(
                (
                    torch.cat([self._classes_of(part.channels) for part in parts]),
                    torch.cat([part.low for part in parts]).double().cpu(),
                    torch.cat([part.high for part in parts]).double().cpu(),
                    gradient.cpu() / per_step,
                    torch.tensor(grid.symmetric),
                )
            )
        self.tensors = [_Tensors(*alike) for alike in _stacked(rows)]

    @staticmethod
    def _quantizer(reader: _Observer, name: str) -> ActivationQuantizer:
        found = reader.module.get_submodule(name)
        assert isinstance(found, ActivationQuantizer)
        return found

    def _take_convolutions(self, reader: _Observer, batches: int) -> None:
        self.convolutions, rows = [], []
        for node, made in reader.channels.items():
            layer = reader.module_of(node)
            if not isinstance(layer, QuantConv2d) or layer.weight.grad is None:
                continue
            outputs, inputs = layer.weight.shape[:2]
            read = self._classes_of(reader.channels[node.all_input_nodes[0]])
            if layer.phases is not None or read.numel() != layer.groups * inputs:
                continue  # all its channels are fixed
            read = read.view(layer.groups, inputs)
            if layer.groups > 1:
                read = read.repeat_interleave(outputs // layer.groups, 0)
            self.convolutions.append(_Convolution(layer, self._classes_of(made), read))
            per_step = (2**layer.weight_quantizer.bits - 1) ** 2 * 12 * batches
            sizes = layer.real_weight().detach().double().cpu().flatten(2).abs().amax(2)
            gradient = layer.weight.grad.double().cpu().flatten(2)
            rows.append((read, sizes, gradient.square().sum(2) / per_step))
        self.weights = [_Weights(*alike) for alike in _stacked(rows)]

    def _classes_of(self, channels: Iterable[int]) -> Tensor:
        return torch.tensor([self.classes.of(channel) for channel in channels])

    def least(self) -> Tensor:
        """The factor of every class with which the sum is least."""
        logarithms = torch.zeros(len(self.classes), dtype=torch.float64, requires_grad=True)
        moves = torch.ones_like(logarithms)
        moves[FIXED] = 0
        if sum(self.share(moves.exp())) == 0:  # an output that depends on nothing
            return torch.ones_like(moves)
        optimizer = torch.optim.Adam([logarithms], lr=_RATE)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _ROUNDS)
        with torch.enable_grad():
            for _ in range(_ROUNDS):
                factors = (logarithms * moves).exp()
                noise = _sum(self.tensors, factors) + _sum(self.weights, factors)
                loss = noise.log() + _TO_ONE * logarithms.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                slower.step()
        return (logarithms.detach() * moves).exp()

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Put the factors into the weights."""
        for one in self.convolutions:
            weight, bias = one.layer.weight, one.layer.bias
            by = factors[one.made][:, None] / factors[one.read]
            weight.mul_(by[..., None, None].to(weight))
            if bias is not None:
                bias.mul_(factors[one.made].to(bias))
        like = next(iter(self.student.parameters()))
        for tap, classes in self.taps.items():
            tap.factor = factors[classes].view(-1, 1, 1).to(like)

    @torch.no_grad()
    def share(self, factors: Tensor) -> NoiseShare:
        """Both parts."""
        return NoiseShare(float(_sum(self.tensors, factors)), float(_sum(self.weights, factors)))


def _stacked(rows: Iterable[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """Rows whose tensors have the same shapes, as one: few operations then do for all."""
    alike: dict[tuple[torch.Size, ...], list[tuple[Tensor, ...]]] = {}
    for row in rows:
        alike.setdefault(tuple(tensor.shape for tensor in row), []).append(row)
    return [[torch.stack(one) for one in zip(*some, strict=True)] for some in alike.values()]


def _sum(parts: Iterable[_Tensors | _Weights], factors: Tensor) -> Tensor:
    return sum((part.noise(factors) for part in parts), factors.new_zeros(()))
