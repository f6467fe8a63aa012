import math

import pytest
import torch
from tapped import Tapped, lq_images, seen, setting

from sparkir.distill.features import observe
from sparkir.distill.slkd import (
    SLKD,
    blurred,
    deviation,
    edges_and_textures,
    natural_statistics,
)


def window() -> torch.Tensor:
    line = torch.exp(-0.5 * (torch.arange(-3.0, 4) / (7 / 6)) ** 2)
    line = line / line.sum()
    return line[:, None] * line[None, :]


class TestStatistics:
    def test_blur_is_the_window_of_brisque(self):
        """One point spreads as the 7 x 7 Gaussian of 7/6 px."""
        image = torch.zeros(1, 1, 9, 9)
        image[..., 4, 4] = 1
        torch.testing.assert_close(blurred(image)[0, 0, 1:8, 1:8], window())
        flat = torch.full((1, 2, 3, 3), 0.7)
        torch.testing.assert_close(blurred(flat), flat)

    def test_deviation_by_hand(self):
        """Of a point of height 1: sqrt(w - w^2) where the window gives it the weight w."""
        image = torch.zeros(1, 1, 9, 9)
        image[..., 4, 4] = 1
        expected = (window() - window() ** 2).sqrt()
        torch.testing.assert_close(deviation(image)[0, 0, 1:8, 1:8], expected, rtol=1e-3, atol=1e-4)

    def test_flat_parts_are_finite_and_alike(self):
        """A variance as the difference of two means comes out below zero there."""
        flat = torch.full((1, 1, 12, 12), 0.37, requires_grad=True)
        natural, edges = natural_statistics(flat), edges_and_textures(flat)
        assert natural.abs().max() < 0.1 and edges.abs().max() < 1e-2
        (natural.sum() + edges.sum()).backward()
        assert flat.grad.isfinite().all()

    def test_natural_statistics_of_noise(self):
        """MSCN coefficients of white noise: E|m| near sqrt(2/pi), neighbours unrelated.

        The variance is near 0.8, not 1: the middle pixel is part of its own mean and deviation.
        """
        statistics = natural_statistics(torch.randn(1, 1, 96, 96)).mean((0, 2, 3))
        assert statistics[0].item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.1)
        assert statistics[1].item() == pytest.approx(0.8, abs=0.1)
        assert statistics[2:].abs().max() < 0.2

    def test_natural_statistics_against_a_loop(self):
        x = torch.randn(1, 2, 5, 6)
        m = (x - blurred(x)) / (deviation(x) + 0.01)
        padded = torch.nn.functional.pad(m, (1, 1, 1, 1), mode="replicate")
        expected = [m.abs(), m.square()]
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            product = torch.empty_like(m)
            for i in range(5):
                for j in range(6):
                    neighbour = padded[..., 1 + i + down, 1 + j + right]
                    product[..., i, j] = m[..., i, j] * neighbour
            expected.append(product)
        torch.testing.assert_close(natural_statistics(x), blurred(torch.cat(expected, 1)))

    def test_edges_of_a_ramp(self):
        """3 across and 4 down a pixel: a gradient of 5 inside."""
        ramp = 3 * torch.arange(8.0)[None, :] + 4 * torch.arange(8.0)[:, None]
        edges = edges_and_textures(ramp[None, None])[0, 0]
        torch.testing.assert_close(edges[1:-1, 1:-1], torch.full((6, 6), 5.0))

    def test_size_of_the_values_does_not_matter_to_mscn(self):
        x = torch.randn(1, 1, 16, 16)
        torch.testing.assert_close(
            natural_statistics(x), natural_statistics(30 * x), rtol=0.1, atol=0.05
        )


class TestTerms:
    def test_halves(self):
        """Of three pairs the middle one counts in both; of one pair, it is both."""
        counts = {}
        for blocks in (1, 2, 3):
            student, teacher = Tapped(blocks=blocks), Tapped(blocks=blocks)
            method = SLKD(setting(student, teacher))
            features = [torch.rand(1, 4, 6, 6) for _ in range(blocks)]
            terms = method(seen(features, [torch.rand(1, 4, 6, 6) for _ in range(blocks)]))
            names = [term.name for term in terms]
            counts[blocks] = [names.count(n) for n in ("natural", "edges", "divergence")]
        assert counts == {1: [1, 1, 1], 2: [1, 1, 1], 3: [2, 2, 1]}

    def test_by_hand_from_the_statistics(self):
        """Widths alike: L1 of the maps of features over the teacher's root mean square."""
        method = SLKD(setting(Tapped(blocks=2), Tapped(blocks=2)))
        student = [torch.rand(1, 4, 6, 6) for _ in range(2)]
        teacher = [3 * torch.rand(1, 4, 6, 6) for _ in range(2)]
        natural, edges, divergence = method(seen(student, teacher))
        sizes = [t.square().mean().sqrt() for t in teacher]
        own, goal = ([f / s for f, s in zip(fs, sizes, strict=True)] for fs in (student, teacher))
        expected = (natural_statistics(own[0]) - natural_statistics(goal[0])).abs()
        torch.testing.assert_close(natural.distance, expected)
        expected = (edges_and_textures(own[1]) - edges_and_textures(goal[1])).abs()
        torch.testing.assert_close(edges.distance, expected)
        p, q = goal[1].softmax(1), own[1].softmax(1)
        torch.testing.assert_close(divergence.distance, (p * (p / q).log()).sum(1, keepdim=True))
        assert [t.factor for t in (natural, edges, divergence)] == pytest.approx([0.1, 0.1, 0.01])

    def test_nothing_to_learn_from_oneself(self):
        features = [torch.rand(1, 4, 6, 6) for _ in range(2)]
        for term in SLKD(setting(Tapped(), Tapped()))(seen(features, features)):
            assert term.distance.abs().max() < 1e-6


class TestTeacherB:
    def test_sees_the_clean_image_where_it_can(self):
        """Edges are compared with what the teacher makes of the truth, natural ones are not."""
        student, teacher = Tapped(scale=1), Tapped(scale=1)
        method = SLKD(setting(student, teacher))
        lq, gt = lq_images(), torch.rand(2, 3, 12, 12)
        with torch.no_grad():
            on = {
                name: observe(teacher, teacher.facts.taps, image)[1]
                for name, image in (("lq", lq), ("gt", gt))
            }
        # A student that is the teacher on the clean image in the second half is at its goal.
        features = (on["lq"][0], on["gt"][1])
        natural, edges, divergence = method(seen(features, on["lq"], lq=lq, gt=gt, output=gt))
        assert natural.distance.max() == edges.distance.max() == 0
        assert divergence.distance.abs().max() < 1e-6
        _, edges, _ = method(seen(on["lq"], on["lq"], lq=lq, gt=gt, output=gt))
        assert edges.distance.max() > 0
        assert not any(term.distance.requires_grad for term in (natural, edges))
        assert method.describe().endswith("teacher B sees the clean image")

    def test_sees_what_a_sees_in_super_resolution(self):
        method = SLKD(setting(Tapped(scale=2), Tapped(scale=2)))
        assert not method.sees_clean
        assert "teacher B sees what teacher A sees" in method.describe()

    def test_is_neither_trained_nor_saved(self):
        method = SLKD(setting(Tapped(width=3, scale=1), Tapped(scale=1)))
        assert {name.split(".")[0] for name in method.state_dict()} == {"projections"}
        assert {tuple(p.shape) for p in method.parameters()} == {(4, 3, 1, 1), (4,)}
