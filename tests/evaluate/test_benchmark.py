import math
from functools import partial

import numpy as np
import pytest
import torch

from sparkir.data.degrade import bicubic_resize
from sparkir.errors import SparkirError
from sparkir.evaluate.benchmark import ImageScore, Share, evaluate, joined, mean
from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.metrics import Convention, psnr_db, ssim
from sparkir.models.checkpoint import load_weights
from sparkir.models.registry import build

RGB = Convention(space="rgb", crop_px=0)


class Pairs:
    """Three random images and themselves with one level of noise more each time."""

    names = ("a", "b", "c")

    def __len__(self):
        return 3

    def pair(self, index):
        rng = np.random.default_rng(index)
        gt = rng.integers(20, 230, (16, 16 + index, 3), dtype=np.uint8)
        return gt + np.uint8(index + 1), gt


def bicubic(lq, *, scale):
    return bicubic_resize(lq, scale=scale, border="replicate")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "scale", "reference_db"),
    [
        ("Set5", 2, 33.68),
        ("Set5", 3, 30.40),
        ("Set5", 4, 28.43),
        ("Set14", 2, 30.33),
        ("Set14", 3, 27.63),
        ("Set14", 4, 26.09),
    ],
)
def test_bicubic_has_its_published_psnr(benchmark_set, name, scale, reference_db):
    convention = Convention(space="y", crop_px=scale)
    pairs = benchmark_set(name, scale)
    figures = [
        psnr_db(bicubic(lq, scale=scale), gt, convention)
        for lq, gt in map(pairs.pair, range(len(pairs)))
    ]
    assert np.mean(figures) == pytest.approx(reference_db, abs=0.01)


@pytest.mark.data
def test_bicubic_has_its_published_ssim_on_set5_x4(benchmark_set):
    """0.8104 in the papers, whose luma MATLAB rounds to uint8; ours keeps the fraction."""
    scores = evaluate(
        partial(bicubic, scale=4), benchmark_set("Set5", 4), Convention(space="y", crop_px=4)
    )
    assert mean(scores).ssim == pytest.approx(0.8104, abs=0.001)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "reference_db"),
    [
        ("Set5", 32.16),
        pytest.param("Set14", 28.65, marks=pytest.mark.slow),
        pytest.param("B100", 27.61, marks=pytest.mark.slow),
    ],
)
def test_published_rfdn_has_its_psnr(development_data, benchmark_set, name, reference_db):
    network = build("rfdn")
    load_weights(network, development_data / "weights/RFDN/RFDN_AIM.pth")
    pairs, convention = benchmark_set(name, 4), Convention(space="y", crop_px=4)
    figures = [
        psnr_db(restore_image(network, lq), gt, convention)
        for lq, gt in map(pairs.pair, range(len(pairs)))
    ]
    assert np.mean(figures) == pytest.approx(reference_db, abs=0.01)


def test_scores_are_the_metrics_of_each_pair_in_order():
    scores = evaluate(lambda lq: lq, Pairs(), RGB)
    assert [score.name for score in scores] == ["a", "b", "c"]
    for index, score in enumerate(scores):
        lq, gt = Pairs().pair(index)
        assert score.psnr_db == psnr_db(lq, gt, RGB)
        assert score.psnr_db == pytest.approx(20 * math.log10(255 / (index + 1)))
        assert score.ssim == ssim(lq, gt, RGB)


def test_a_network_is_scored_as_the_function_that_runs_it():
    torch.manual_seed(0)
    network = build("dncnn", depth=2, width=4, channels=3)
    assert evaluate(network, Pairs(), RGB) == evaluate(
        partial(restore_image, network), Pairs(), RGB
    )


def test_errors_name_the_image():
    with pytest.raises(SparkirError, match=r"^a: cannot compare images of different sizes"):
        evaluate(lambda lq: lq[1:], Pairs(), RGB)


def test_mean_averages_decibels():
    scores = [
        ImageScore(name="a", psnr_db=30.0, ssim=0.9),
        ImageScore(name="b", psnr_db=34.0, ssim=0.7),
    ]
    average = mean(scores)
    assert (average.name, average.psnr_db) == ("mean", 32.0)
    assert average.ssim == pytest.approx(0.8)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_joined_are_all_the_scores_in_order(ranks):
    shares = [Share(Pairs(), rank, ranks) for rank in range(ranks)]
    assert sum(map(len, shares)) == 3
    scores = [evaluate(lambda lq: lq, share, RGB) if len(share) else [] for share in shares]
    assert joined(scores) == evaluate(lambda lq: lq, Pairs(), RGB)


def test_nothing_to_evaluate_is_refused():
    class Empty(Pairs):
        names = ()

        def __len__(self):
            return 0

    with pytest.raises(SparkirError, match="no images to evaluate"):
        evaluate(lambda lq: lq, Empty(), RGB)
    with pytest.raises(SparkirError, match="no scores to average"):
        mean([])
