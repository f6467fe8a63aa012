"""Optimizer, schedule and average: what the loop needs to take a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel

from sparkir.quant.prepare import carry_facts

Schedule = Literal["cosine", "step", "constant"]
_STEP_EVERY, _STEP_FACTOR = 0.25, 0.5
_FLOOR = 0.01


def build_optimizer(
    student: nn.Module,
    *,
    name: Literal["adam", "adamw"],
    learning_rate: float,
    grid_learning_rate: float,
    weight_decay: float,
    beside: Iterable[nn.Parameter] = (),
) -> optim.Optimizer:
    """Adam or AdamW with two groups: the network, and the steps of its grids.

    Grid steps are logarithms, so their rate is a share per step; decay would shrink the grids.
    What is trained `beside` the student, such as a projection of its features, is treated as the
    network is.
    """
    grids: list[nn.Parameter] = []
    network: list[nn.Parameter] = []
    for parameter_name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (grids if parameter_name.endswith("log_scale") else network).append(parameter)
    network += [parameter for parameter in beside if parameter.requires_grad]
    groups = [
        {"params": network, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": grids, "lr": grid_learning_rate, "weight_decay": 0.0},
    ]
    kind = optim.Adam if name == "adam" else optim.AdamW
    on_gpu = any(parameter.is_cuda for parameter in network)  # where a step is then one operation
    optimizer = kind([group for group in groups if group["params"]], fused=on_gpu or None)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def rate_factor(step: int, *, steps: int, schedule: Schedule, warmup: int) -> float:
    """What the learning rates are multiplied by at `step` of `steps`.

    `cosine` falls to 1 %; `step` halves at every quarter; both rise linearly over `warmup` steps.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    done = step / max(1, steps)
    if schedule == "cosine":
        return rise * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule == "step":
        return rise * _STEP_FACTOR ** int(done / _STEP_EVERY)
    return rise


def set_rates(optimizer: optim.Optimizer, factor: float) -> None:
    """Scale every group's learning rate from where it started."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def build_average(student: nn.Module, decay: float) -> AveragedModel | None:
    """The student's exponential moving average; None when `decay` is 0.

    The first steps are averaged over a shorter time, or the average would be of the weights that
    training started from for thousands of steps.
    """
    if decay == 0:
        return None

    @torch.no_grad()
    def move(averages: Any, currents: Any, count: Tensor | int) -> None:  # noqa: ANN401
        reached = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, currents, 1 - reached)

    average = AveragedModel(student, multi_avg_fn=move, use_buffers=False)
    carry_facts(student, average.module)
    return average


def fast_precision(device: torch.device) -> bool:
    """Whether bfloat16 is fast on `device`."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
