"""Steps with which every runtime rounds alike, whatever its order of operations.

Runtimes agree on integers and differ in float32: which factors they multiply first, where they add
a bias or a zero point, which way they round a tie. None of that can matter if

* the multiplier from a layer's sums to its grid is an odd fraction, 2**k / odd: no sum then comes
  near a tie (`arithmetic.to_odd_fraction`);
* additions, products and interpolations work on steps that are powers of two: all terms are then
  exact, and so is the sum. Sums of a layer that go on in real values count whole parts of the step
  of the grid that they reach, 2**15 to a step, for the same reason. The image's own step is no
  power of two: there they count an odd number of parts to a step, and a sum is near a tie no more
  than an odd fraction;
* a grid that is read as real values is symmetric: no zero point is left to be multiplied out;
* a function of one value, the slope of a LeakyReLU included, reads a grid and not sums: a product
  of sums with it has more bits than float32, and may come to lie on either side of a tie.

Weight steps are learned per channel, so that being off by a percent costs nothing; a power of two
costs a carrier of 8 bits half a bit at most.

One thing is left where steps may be anything: an entry of a function's table that comes to lie on a
tie. `leave_ties` looks for those, after calibration and when training is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import fx, nn

from sparkir.quant.fixed import Fixed
from sparkir.quant.graph import Tap
from sparkir.quant.interpolate import ExactBilinear
from sparkir.quant.layers import (
    AbsorbedReLU,
    Add,
    Concatenate,
    Dequantize,
    MatrixProduct,
    Multiply,
    PassThrough,
    QuantLayer,
    Table,
    is_linear_from_zero,
)
from sparkir.quant.quantizer import ActivationQuantizer

_IN_POWERS_OF_TWO = (Add, Multiply, MatrixProduct, Fixed)
_MOVES = (Tap, PassThrough, Concatenate)
_NEAR_TIE = 3e-5
"""Of a step. Runtimes and torch were seen to round a function otherwise within 8e-6 of half-way."""
_NUDGE, _NUDGES = 2.0**-12, 8


def restrict_steps(prepared: fx.GraphModule, *, fuses: bool, signed: bool) -> None:
    """Tell every grid and layer of a prepared, uncalibrated network what its steps may be.

    Args:
        prepared: what `prepare` made.
        fuses: whether the runtime does; it then adds the zero point to real values before it rounds
            them.
        signed: whether symmetric grids that are read as real values are stored as int8.
    """
    modules = dict(prepared.named_modules())
    calls = [node for node in prepared.graph.nodes if node.op == "call_module"]
    for node in calls:
        module = modules[str(node.target)]
        if isinstance(module, QuantLayer):
            _restrict_layer(node, module, modules)
    for node in calls:
        module = modules[str(node.target)]
        if isinstance(module, ActivationQuantizer) and module.image_step is None:
            _restrict_grid(node, module, modules, signed=signed)
            module.shift_reals = fuses and module.power_of_two


def _restrict_layer(node: fx.Node, layer: QuantLayer, modules: dict[str, nn.Module]) -> None:
    grids = {_module(reader, modules) for reader in _readers(node, modules, AbsorbedReLU, Tap)}
    if len(grids) == 1 and isinstance(grid := grids.pop(), ActivationQuantizer):
        layer.writes = (grid,)
    else:
        layer.flows_to = tuple(_grids_after(node, modules))


def _restrict_grid(
    node: fx.Node, grid: ActivationQuantizer, modules: dict[str, nn.Module], *, signed: bool
) -> None:
    (value,) = node.all_input_nodes
    maker = _module(made_by(value, modules, AbsorbedReLU, *_MOVES), modules)
    if isinstance(maker, ActivationQuantizer) and maker is not grid:
        grid.rounds_again = (maker,)
    elif not isinstance(maker, QuantLayer | ActivationQuantizer):
        grid.power_of_two = True
    for reader in _readers(node, modules, *_MOVES):
        module = _module(reader, modules)
        interpolated = added = False
        if isinstance(module, Dequantize):
            read = [_module(user, modules) for user in _readers(reader, modules, *_MOVES)]
            interpolated = any(isinstance(one, ExactBilinear) for one in read)
            behind = _readers(reader, modules, *_MOVES, ExactBilinear)
            added = any(isinstance(_module(user, modules), _IN_POWERS_OF_TWO) for user in behind)
        if isinstance(module, _IN_POWERS_OF_TWO) or added or interpolated:
            grid.power_of_two = True
        if isinstance(module, QuantLayer) and module.flows_to:
            grid.power_of_two = True
        if added:
            grid.symmetric, grid.prefers_int8 = True, signed


def _grids_after(node: fx.Node, modules: dict[str, nn.Module]) -> list[ActivationQuantizer]:
    """The grids met first downstream of `node`."""
    found, waiting, seen = [], [node], {node}
    while waiting:
        for user in waiting.pop().users:
            module = _module(user, modules)
            if isinstance(module, ActivationQuantizer):
                found.append(module)
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return found


@torch.no_grad()
def leave_ties(student: nn.Module) -> None:
    """Move steps of a calibrated network so that no table has an entry half-way between two levels.

    Of such an entry the last bit decides, in which a runtime's function and torch's differ. It is
    no accident where a function saturates on a grid that ends there. The step becomes larger by a
    part in 4,096, again if it must; where it may not be any number it is left as it is.
    """
    modules = dict(student.named_modules())
    for node in cast("fx.GraphModule", student).graph.nodes:
        table = _module(node, modules)
        if not isinstance(table, Table) or is_linear_from_zero(table.operation):
            continue  # one multiplication, which IEEE 754 rounds one way
        read = modules.get(grid_of_input(node, modules))
        if isinstance(read, ActivationQuantizer):
            for written in _grids_after(node, modules):
                if written.image_step is None and not written.power_of_two:
                    _leave_ties(table, read, written)


def _leave_ties(table: Table, read: ActivationQuantizer, written: ActivationQuantizer) -> None:
    ints = torch.arange(read.levels, device=read.log_scale.device) - read.zero_level
    values = table(ints[ints != 0] * read.scale())  # of 0 every library makes the same
    for _ in range(_NUDGES):
        stored = values / written.scale() + written.zero_level
        inside = stored[(stored > 0) & (stored < written.levels - 1)]  # beyond they are clamped
        if not bool(((inside % 1 - 0.5).abs() < _NEAR_TIE).any()):
            return
        written.log_scale.add_(_NUDGE)


def grid_of_input(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The name of the quantizer whose grid `node` reads, in a prepared network."""
    return str(made_by(node.all_input_nodes[0], modules, *_MOVES).target)


def made_by(value: fx.Node, modules: Mapping[str, nn.Module], *through: type[nn.Module]) -> fx.Node:
    """What made `value`, before it passed modules of the kinds `through`."""
    while isinstance(_module(value, modules), through):
        value = value.all_input_nodes[0]
    return value


def _readers(
    node: fx.Node, modules: dict[str, nn.Module], *through: type[nn.Module]
) -> Iterator[fx.Node]:
    """Who reads the values that `node` makes."""
    for user in node.users:
        if isinstance(_module(user, modules), through):
            yield from _readers(user, modules, *through)
        else:
            yield user


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None
