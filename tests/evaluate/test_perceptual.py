"""LPIPS: found where it is, never at the price of a download. The metric itself is a stand-in."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from sparkir.evaluate import perceptual
from sparkir.evaluate.benchmark import evaluate, mean
from sparkir.evaluate.metrics import Convention
from sparkir.evaluate.perceptual import find_lpips


class StandIn(nn.Module):
    """The package's class: two images in [-1, 1] -> (1, 1, 1, 1)."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert (net, verbose) == ("alex", False)

    def forward(self, output, target):
        assert output.shape == target.shape
        assert output.shape[:2] == (1, 3)
        return (output - target).abs().mean().view(1, 1, 1, 1)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """No answer from an earlier call, and an empty folder of torch's hub."""
    find_lpips.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    yield
    find_lpips.cache_clear()


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("lpips")
    module.LPIPS = StandIn
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: object())
    return module


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    assert find_lpips() == (None, "the package lpips is not installed")


def test_without_the_weights_nothing_is_built(package, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "LPIPS", None)  # or it would download
    found = find_lpips()
    assert found.metric is None
    assert str(tmp_path) in found.words


def test_a_package_that_does_not_load(package, weights, monkeypatch):
    def broken(**_):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(package, "LPIPS", broken)
    found = find_lpips()
    assert found.metric is None
    assert found.words.endswith("(operator torchvision::nms does not exist)")


def test_a_benchmark_has_it_for_every_image_and_on_average(package, weights):
    class Pairs:
        names = ("a", "b")

        def __len__(self):
            return 2

        def pair(self, index):
            image = np.full((16, 16, 3), 100, np.uint8)
            return image, image + np.uint8(51 * (index + 1))

    metric = find_lpips().metric
    scores = evaluate(lambda lq: lq, Pairs(), Convention(space="rgb", crop_px=0), lpips=metric)
    assert [score.lpips for score in scores] == pytest.approx([0.4, 0.8])
    assert mean(scores).lpips == pytest.approx(0.6)
    scores = evaluate(lambda lq: lq, Pairs(), Convention(space="rgb", crop_px=0))
    assert scores[0].lpips is mean(scores).lpips is None
