"""Bringing the student's features to the teacher's width."""

from __future__ import annotations

import torch
from torch import nn

from sparkir.distill.method import Setting
from sparkir.models.modes import device_of


def projections(setting: Setting) -> nn.ModuleList:
    """For each pair of features a 1x1 convolution, or nothing where the widths are equal.

    They are trained with the student. Their first weights are drawn without disturbing the
    generator, so that every method of one seed sees the same draws after them.
    """
    with torch.random.fork_rng(devices=[]):
        made = nn.ModuleList(
            nn.Identity() if student[1] == teacher[1] else nn.Conv2d(student[1], teacher[1], 1)
            for student, teacher in setting.shapes
        )
    return made.to(device_of(setting.student))
