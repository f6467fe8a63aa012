"""The steps of all grids in one operation, where training rounds in compiled passes.

A network has a grid or two for each layer, and each grid a parameter of its own. To take them one
by one is hundreds of operations on a handful of numbers, which cost a GPU as much as the images do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sparkir.quant.fused import rounds_fused
from sparkir.quant.quantizer import Given, Stepped


def take_steps_together(prepared: nn.Module) -> None:
    """Give every quantizer of a prepared network its step when a forward pass begins.

    A copy of the network does not: its quantizers take their steps themselves.
    """
    prepared.register_forward_pre_hook(_give)
    prepared.register_forward_hook(_take_back, always_call=True)


def _give(network: nn.Module, inputs: object) -> None:
    grids = _learned(network)
    if not grids:
        return
    sizes = tuple(grid.log_scale.numel() for grid in grids)
    factors = [1.0] * len(grids)
    together = torch.cat([grid.log_scale.reshape(-1) for grid in grids])
    steps: Tensor = _Steps.apply(together, sizes, factors)
    for index, (grid, step) in enumerate(zip(grids, steps.split(sizes), strict=True)):
        grid.given = Given(step.view(grid.log_scale.shape), factors, index)


def _take_back(network: nn.Module, inputs: object, output: object) -> None:
    for grid in _learned(network):
        grid.given = None


def _learned(network: nn.Module) -> list[Stepped]:
    """The grids that this pass takes together; none unless it trains in compiled passes."""
    if not (network.training and rounds_fused()):
        return []
    stepped = (module for module in network.modules() if isinstance(module, Stepped))
    return [grid for grid in stepped if grid.log_scale.requires_grad]


class _Steps(torch.autograd.Function):
    """exp, with gradients multiplied by what the grids have written down until then (LSQ)."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        together: Tensor,
        sizes: tuple[int, ...],
        factors: list[float],
    ) -> Tensor:
        steps = together.exp()
        ctx.save_for_backward(steps)
        ctx.sizes, ctx.factors = sizes, factors
        return steps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        (steps,) = ctx.saved_tensors
        factors = _as_tensor(tuple(ctx.factors), ctx.sizes, steps.device)
        return gradient * factors * steps, None, None


@lru_cache(maxsize=16)
def _as_tensor(factors: tuple[float, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Each factor as often as its grid has steps; made once, for a recording cannot wait for it."""
    values = torch.tensor(factors).repeat_interleave(torch.tensor(sizes))
    return values.to(device)
