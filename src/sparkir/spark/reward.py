"""What the policy is rewarded for: one step with W against the same step without allocation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, optim

from sparkir.spark.difficulty import _luma

_SSIM_WINDOW_PX, _SSIM_SIGMA_PX = 11, 1.5


def psnr_db(
    image: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, " b"]:
    """PSNR of each image in dB, all channels, values in [0, 1], no rounding."""
    error = (image.double() - target.double()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(image: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """SSIM of each image's luma, 11 x 11 Gaussian window, values in [0, 1]."""
    a, b = _luma(image).double(), _luma(target).double()
    size = min(_SSIM_WINDOW_PX, *a.shape[-2:])
    offsets = torch.arange(size, device=a.device, dtype=a.dtype) - (size - 1) / 2
    window = torch.exp(-0.5 * (offsets / _SSIM_SIGMA_PX).square())
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a.square() + mean_b.square() + 1e-4)
    structure = (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)
    return (luminance * structure).mean(dim=(1, 2, 3))


@torch.no_grad()
def reward(
    with_weights: Float[Tensor, "b c h w"],
    without: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    *,
    alpha: float,
    beta: float,
) -> Float[Tensor, " b"]:
    """SPARK eq. 1 for each image: alpha * dPSNR (dB) + beta * dSSIM.

    Args:
        with_weights: the student's output after a step with the policy's weights.
        without: its output after the same step without spatial weighting.
        target: the ground truth.
        alpha: reward per dB.
        beta: reward per unit of SSIM.
    """
    gain_db = psnr_db(with_weights, target) - psnr_db(without, target)
    return alpha * gain_db + beta * (ssim(with_weights, target) - ssim(without, target))


def parameters_of(optimizer: optim.Optimizer) -> list[Any]:
    """All that it moves, group by group.

    Of Any, because the tests' type checker would draw one at random to look at, with Python's own
    generator, which a training must find as it left it.
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def undone(optimizer: optim.Optimizer) -> Iterator[None]:
    """Whatever steps `optimizer` takes inside, its parameters and state are put back after.

    For looking one step ahead: unspecified in the paper, how the student that "learns without
    spatial weighting" comes about. Here it is a real step of the real optimizer, from the same
    weights on the same batch, with each image's W replaced by its mean.
    """
    parameters = parameters_of(optimizer)
    saved = _copies([p.detach() for p in parameters])
    gradients = [p.grad for p in parameters]
    before = _copies([g for g in gradients if g is not None])
    kept = [p for p in parameters if p in optimizer.state]
    state = dict(zip(kept, _copied([optimizer.state[p] for p in kept]), strict=True))
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    groups = _copied(settings)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)
            if before:
                torch._foreach_copy_([g for g in gradients if g is not None], before)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
            if parameter in state:
                optimizer.state[parameter] = state[parameter]
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            for key in group.keys() - values.keys() - {"params"}:
                del group[key]
            group.update(values)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """In a few operations, however many they are; a GPU waits for each."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    if tensors:
        torch._foreach_copy_(copies, tensors)
    return copies


def _copied(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tensors = [v for values in states for v in values.values() if isinstance(v, Tensor)]
    copies = iter(_copies(tensors))
    return [
        {k: next(copies) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}
        for values in states
    ]
