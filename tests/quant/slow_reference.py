"""Fake quantization as the papers write it: real values, plain torch, in float64.

Slow and obvious; the integers in src/ must give the same values and the same gradients.
"""

import torch
from torch import Tensor


def rounded(v: Tensor) -> Tensor:
    """round(v) with the gradient of v."""
    return v + (v.round() - v).detach()


def lsq(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Learned step size quantization (Esser 2020, equations 1 and 2)."""
    return rounded((x / step).clamp(low, high)) * step


def pams(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """A learned bound (Li 2020, equation 6): the step moves by what is clipped, and only by it."""
    v = x / step.detach()
    inside = (v >= low) & (v <= high)
    kept = x + (v.detach().round() * step.detach() - x).detach()
    return torch.where(inside, kept, v.detach().clamp(low, high) * step)


FAKE_QUANTIZE = {"lsq": lsq, "pams": pams}
