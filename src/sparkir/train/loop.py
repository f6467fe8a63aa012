"""The training loop, in the order of the algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkir.distill.task import DistillationTask, StepLosses
from sparkir.errors import SparkirError
from sparkir.quant.fused import fused_rounding
from sparkir.spark.batch import averaged, of_all
from sparkir.spark.reward import parameters_of, reward, undone
from sparkir.spark.weighting import Weighting
from sparkir.train.distribute import Devices
from sparkir.train.graphs import Recorded
from sparkir.train.optimize import Schedule, rate_factor, set_rates
from sparkir.train.state import TrainState

Report = Callable[[dict[str, Any]], None]
"""Receives events: flat dictionaries with a `kind`."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and did so after saving its state."""


class Diverged(SparkirError):  # noqa: N818 - what happened, as with Interrupted
    """The loss, a gradient or a reward is no longer finite: the same run would do it again."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long, and how often."""

    steps: int
    schedule: Schedule = "cosine"
    warmup: int = 0
    clip_norm: float = 0.0
    """Largest gradient norm; 0 for no limit."""
    bfloat16: bool = False
    compiled: bool = False
    """Whether grids are rounded to in compiled passes (`quant.fused`)."""
    recorded: bool = False
    """Whether passes are recorded, and then replayed (`graphs`); on a GPU."""
    float_steps: int = 0
    """Steps before rounding begins."""
    log_every: int = 10
    evaluate_every: int = 0
    """0: not before the end."""
    checkpoint_every: int = 100


def train(
    task: DistillationTask,
    state: TrainState,
    settings: LoopSettings,
    *,
    checkpoint: Path,
    evaluate: Callable[[nn.Module], float],
    report: Report,
    stop_requested: Callable[[], bool] = lambda: False,
    begin_rounding: Callable[[], None] = lambda: None,
    devices: Devices | None = None,
) -> None:
    """Train `task.student` from `state.step` to the end.

    Args:
        task: the losses.
        state: advanced in place; holds the same student, weighting and method as `task`.
        settings: how long and how often.
        checkpoint: where the state is saved, and a second file `best.pt` beside it.
        evaluate: PSNR in dB of a network on the validation images.
        report: receives `step`, `policy`, `evaluation` and `checkpoint` events.
        stop_requested: asked after each step; when true, the state is saved and `Interrupted`
            raised.
        begin_rounding: called once, after `settings.float_steps`, if there are any.
        devices: the processes that share the batches, all of which call this; alone when None.
            The first one writes the checkpoints.

    Raises:
        Diverged: the loss or a gradient is no longer finite; the last checkpoint is of before.
        Interrupted: see `stop_requested`.
    """
    device = next(task.student.parameters()).device
    weighting, optimizer = task.weighting, state.optimizer
    trained = parameters_of(optimizer)
    devices = devices or Devices()
    step_losses = devices.wrap(task, trained)
    task.train()
    if not task.recorded:
        _record(task, settings, devices, report)

    while state.step < settings.steps:
        step, began = state.step, time.perf_counter()
        if 0 < step == settings.float_steps:
            begin_rounding()
            _record(task, settings, devices, report)
        lq, gt, *teacher = (_to_unit_range(images, device) for images in state.sampler.next())
        loaded = time.perf_counter()
        set_rates(optimizer, _rate_factor(step, settings))

        with _computing(settings, device):
            losses = step_losses(lq, gt, *teacher)
        loss, gt = losses.total(), losses.gt  # as the student restores it

        if weighting.compares_at(step) and losses.teacher is not None:
            told = weighting.learn_from(losses.output.detach(), losses.teacher, gt)
            report({"kind": "policy", "step": step} | told)
        learning = weighting.learns_at(step) and losses.weights is not None
        if learning:  # the same step without spatial allocation, taken and undone
            other = averaged(
                torch.autograd.grad(
                    losses.total_without_allocation(), trained, retain_graph=True, allow_unused=True
                )
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = devices.mean(loss)
        norm = _checked_norm(trained, loss, step, settings, checkpoint, devices)
        if learning:
            without = _output_after(other, task, lq, optimizer, trained, settings)
        optimizer.step()
        if learning:
            output = _output(task, lq, settings)
            gain = _gain(weighting, output, without, gt, step, checkpoint, devices)
            report({"kind": "policy", "step": step} | weighting.learn(gain))
        if state.average is not None:
            state.average.update_parameters(task.student)

        state.step += 1
        if state.step % settings.log_every == 0 or state.step == settings.steps:
            summary = _summary(losses, loss, norm, optimizer, devices)
            took_s = time.perf_counter() - began
            times = {"step_s": took_s, "data_share": (loaded - began) / took_s}
            report({"kind": "step", "step": state.step} | summary | times)
        if _is_due(state.step, settings.evaluate_every, settings.steps):
            _evaluate(state, evaluate, checkpoint, report, devices)
        stopping = devices.any(stop_requested()) and state.step < settings.steps
        if stopping or _is_due(state.step, settings.checkpoint_every, settings.steps):
            if devices.first:
                state.save(checkpoint)
            report({"kind": "checkpoint", "step": state.step, "path": checkpoint.name})
        if stopping:
            devices.wait()  # where one process is gone, torchrun ends the others, saved or not
            raise Interrupted


def _record(
    task: DistillationTask, settings: LoopSettings, devices: Devices, report: Report
) -> None:
    """Let the networks as they are now be recorded, if that is wanted."""

    def refused(why: str) -> None:
        message = f"a network cannot be recorded, which is slower on a GPU: {why}"
        report({"kind": "warning", "message": message})

    if settings.recorded and devices.ranks == 1:
        task.record(partial(Recorded, refused=refused))


def _to_unit_range(images: Tensor, device: torch.device) -> Tensor:
    """uint8 -> float32 in [0, 1]; what is float32 already stays."""
    return images.to(device).float() / 255 if images.dtype == torch.uint8 else images.to(device)


@contextmanager
def _computing(settings: LoopSettings, device: torch.device) -> Iterator[None]:
    """How a forward pass of training computes."""
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16),
        fused_rounding(settings.compiled),
    ):
        yield


def _rate_factor(step: int, settings: LoopSettings) -> float:
    return rate_factor(
        step, steps=settings.steps, schedule=settings.schedule, warmup=settings.warmup
    )


def _checked_norm(
    trained: Iterable[Tensor],
    loss: Tensor,
    step: int,
    settings: LoopSettings,
    checkpoint: Path,
    devices: Devices,
) -> float:
    """Clip the gradients, return their norm; refuse to step on anything that is not finite."""
    limit = settings.clip_norm or float("inf")
    norm = float(torch.nn.utils.clip_grad_norm_(list(trained), limit))
    if torch.isfinite(loss) and norm < float("inf"):
        return norm
    what = f"the loss is {float(loss.detach())} and the gradient norm {norm}"
    raise devices.alike(_diverged(what, step, checkpoint))


def _diverged(what: str, step: int, checkpoint: Path) -> Diverged:
    kept = f"the last saved state is {checkpoint}" if checkpoint.exists() else "nothing was saved"
    return Diverged(
        f"{what} at step {step}; {kept}. Start a new run with a lower train.learning_rate, or with "
        "train.clip_norm"
    )


def _output_after(
    gradients: Iterable[Tensor | None],
    task: DistillationTask,
    lq: Tensor,
    optimizer: torch.optim.Optimizer,
    trained: list[Tensor],
    settings: LoopSettings,
) -> Tensor:
    """The student's output after a step with `gradients`, which is then undone."""
    with undone(optimizer):
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
        return _output(task, lq, settings)


@torch.no_grad()
def _output(task: DistillationTask, lq: Tensor, settings: LoopSettings) -> Tensor:
    """The student's output, leaving its buffers (batch statistics) and the generators alone."""
    devices = [lq.device] if lq.device.type == "cuda" else []
    # A recording knows no other buffers than the student's own, and changes none.
    aside = nullcontext() if task.replays_student else _buffers_aside(task.student)
    with torch.random.fork_rng(devices), _computing(settings, lq.device), aside:
        return task.run_student(lq)


@contextmanager
def _buffers_aside(student: nn.Module) -> Iterator[None]:
    """Copies stand in for the buffers, which a backward pass that is still to come may need.

    Writing the old values back would not do: autograd refuses a tensor that was written to.
    """
    own = [
        (module, name, buffer)
        for module in student.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


def _gain(
    weighting: Weighting,
    output: Tensor,
    without: Tensor,
    gt: Tensor,
    step: int,
    checkpoint: Path,
    devices: Devices,
) -> Tensor:
    """Each image's reward; refuse to learn from anything that is not finite."""
    gain = reward(output, without, gt, alpha=weighting.alpha, beta=weighting.beta)
    found = of_all(gain)
    if not found.isfinite().all():
        raise devices.alike(_diverged(f"the reward is {found.tolist()}", step, checkpoint))
    return gain


def _summary(
    losses: StepLosses,
    loss: Tensor,
    norm: float,
    optimizer: torch.optim.Optimizer,
    devices: Devices,
) -> dict[str, float]:
    """What the log says of a step, of the whole batch."""
    summary = {
        "loss": float(loss),
        "reconstruction": float(devices.mean(losses.reconstruction)),
        "distillation": float(devices.mean(losses.distillation())),
        "gradient_norm": norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
    }
    parts = losses.parts()
    if len(parts) > 1:
        summary |= {f"distillation_{name}": float(loss.detach()) for name, loss in parts.items()}
    if losses.weights is not None:
        weights = of_all(losses.weights)
        summary["mean_weight"] = float(weights.mean())
        summary["weight_deviation"] = float(weights.std())
    return summary


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _evaluate(
    state: TrainState,
    evaluate: Callable[[nn.Module], float],
    checkpoint: Path,
    report: Report,
    devices: Devices,
) -> None:
    network: nn.Module = state.student if state.average is None else state.average.module
    psnr_db = evaluate(network)
    is_best = psnr_db > state.best.get("psnr_db", float("-inf"))
    if is_best:
        state.best = {"step": float(state.step), "psnr_db": psnr_db}
        if devices.first:
            state.save(checkpoint.with_name("best.pt"))
    report({"kind": "evaluation", "step": state.step, "psnr_db": psnr_db, "best": is_best})
