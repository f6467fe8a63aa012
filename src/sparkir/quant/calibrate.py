"""Calibration: every grid starts where real images put it.

Done alone, without training, this is post-training quantization (PTQ).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.modes import evaluating
from sparkir.quant.layers import QuantLayer
from sparkir.quant.prepare import placement_of
from sparkir.quant.quantizer import activation_quantizers, leave_in_float
from sparkir.quant.ranges import RangeObserver
from sparkir.quant.spec import Calibration
from sparkir.quant.steps import leave_ties

NO_IMAGES = "calibration was given no images; it needs at least one"


@torch.no_grad()
def calibrate(
    student: nn.Module, batches: Iterable[Tensor], *, method: Calibration | None = None
) -> None:
    """Fit every grid of a prepared network to its own floating-point values, as it restores.

    Where the spec wants channels of like range, `equalize` comes before.

    Args:
        student: what `prepare` returned.
        batches: images (B, C, H, W) in the network's value range; a few dozen crops suffice.
        method: least squared error, the 99.9th percentile, or the extremes; that of the spec that
            it was prepared with, unless given.

    Raises:
        SparkirError: there are no images, or the network computes NaN on them.
    """
    method = method or placement_of(student).spec.calibration
    quantizers = activation_quantizers(student)
    for quantizer in quantizers.values():
        quantizer.observer = RangeObserver()
    images = 0
    try:
        with evaluating(student):  # statistics of batches would be others, and be learned
            for batch in batches:
                student(batch)
                images += len(batch)
        if not images:
            raise SparkirError(NO_IMAGES)
        for quantizer in quantizers.values():
            quantizer.calibrate(method)
    finally:
        leave_in_float(student, on=False)
    leave_ties(student)
    for layer in student.modules():
        if isinstance(layer, QuantLayer):
            layer.weight_quantizer.calibrate(layer.real_weight(), method)
