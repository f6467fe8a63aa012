import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tapped import Tapped, seen, setting

import sparkir
from sparkir.distill import fakd
from sparkir.distill.fakd import FAKD, affinity_distance

STATUS = Path("/proc/self/status")
PEAK = """
import re, sys, torch
from pathlib import Path
from sparkir.distill.fakd import affinity_distance

def mib(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) / 1024

def run(side):
    student = torch.rand(1, 4, side, side, requires_grad=True)
    affinity_distance(student, torch.rand(1, 3, side, side)).mean().backward()
    assert student.grad.abs().max() > 0

run(16)
before = mib("VmHWM")
run(int(sys.argv[1]))
print(mib("VmHWM") - before)
"""


def slow(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The whole of both affinity matrices, as the published code makes them."""
    matrices = []
    for feature in (student, teacher):
        vectors = feature.flatten(2)
        vectors = vectors / (vectors.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        matrices.append(vectors.transpose(1, 2) @ vectors)
    rows = (matrices[0] - matrices[1]).abs().mean(2)
    return rows.view(student.shape[0], 1, *student.shape[-2:])


def test_by_hand():
    """Three locations: the student's point along x, x, y; the teacher's along x, y, y."""
    student = torch.tensor([[2.0, 1, 0], [0, 0, 5]]).view(1, 2, 1, 3)
    teacher = torch.tensor([[1.0, 0, 0], [0, 3, 4]]).view(1, 2, 1, 3)
    # A_s: 110 110 001, A_t: 100 011 011; they differ in 1, 2 and 1 entries of each row.
    (term,) = FAKD(setting(Tapped(width=2, blocks=1), Tapped(width=2, blocks=1)))(
        seen([student], [teacher])
    )
    assert term.distance.flatten().tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    assert term.loss(torch.ones(1, 1, 1, 3)).item() == pytest.approx(4 / 9 * 20 / 255)


@pytest.mark.parametrize("piece", [1, 50, 2**20])
def test_against_the_whole_matrices(monkeypatch, piece):
    """Other widths, several images, however many rows make a piece."""
    monkeypatch.setattr(fakd, "_PIECE", piece)
    student = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    weights = torch.rand(2, 1, 5, 6, dtype=torch.float64)
    found, expected = affinity_distance(student, teacher), slow(student, teacher)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad((weights * distance).mean(), student) for distance in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_its_mean_is_the_published_loss():
    student, teacher = torch.randn(2, 2, 8, 6, 6)
    expected = slow(student, teacher).mean()  # rows of equal length
    torch.testing.assert_close(affinity_distance(student, teacher).mean(), expected)


def test_alike_and_scaled_is_no_distance():
    feature = torch.randn(1, 4, 3, 5)
    assert affinity_distance(feature, 255 * feature).abs().max() < 1e-6


def test_locations_of_zeros_have_a_gradient():
    """As a ReLU makes them; the published code divides zero by zero there."""
    feature = torch.randn(1, 4, 3, 3)
    feature[..., 1, 1] = 0
    feature.requires_grad_()
    affinity_distance(feature, torch.randn(1, 4, 3, 3)).sum().backward()
    assert feature.grad.isfinite().all()


@pytest.mark.skipif(not STATUS.is_file(), reason="this system does not tell a process's peak")
def test_memory_does_not_grow_with_the_matrices():
    """96 x 96: one of the two matrices alone, without its gradient, is 324 MiB."""
    source = Path(sparkir.__file__).parents[1]
    said = subprocess.run(
        [sys.executable, "-c", PEAK, "96"],
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < float(said.stdout) < 40
