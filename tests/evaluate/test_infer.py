import numpy as np
import pytest
import torch
from torch import nn

from sparkir.data.degrade import bicubic_resize
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import evaluating, restore_image
from sparkir.evaluate.metrics import luma
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import build
from sparkir.models.srcnn import BicubicUpscale


def photo_like(height=24, width=30, seed=0):
    return np.random.default_rng(seed).integers(60, 190, (height, width, 3), dtype=np.uint8)


class PlusConstant(nn.Module):
    """Adds a constant to what it is given; enlarges bicubically before if it has a scale."""

    def __init__(self, constant: float, *, scale: int = 1, channels: int = 1, **facts) -> None:
        super().__init__()
        self.upscale = BicubicUpscale(scale, channels) if scale > 1 else nn.Identity()
        self.constant = constant
        self.facts = ModelFacts(
            name="plus",
            scale=scale,
            channels=channels,
            value_range=1.0,
            taps=(),
            halo_px=2,
            **facts,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upscale(x) + self.constant


@pytest.mark.parametrize("value_range", [1.0, 255.0])
def test_colour_network_gives_the_bytes_it_computes(value_range):
    torch.manual_seed(0)
    network = build("rfdn", width=8, blocks=1, scale=2, value_range=value_range)
    lq = photo_like()
    batch = torch.from_numpy(lq).permute(2, 0, 1)[None] * (value_range / 255)
    with torch.no_grad():
        levels = network(batch.float())[0].permute(1, 2, 0).numpy() * (255 / value_range)
    restored = restore_image(network, lq)
    assert restored.dtype == np.uint8
    assert restored.shape == (48, 60, 3)
    # The order of scaling moves levels by some 1e-4, which may take a half to its other side.
    assert np.abs(restored - np.clip(levels, 0, 255)).max() < 0.501


def test_luma_network_that_changes_nothing_leaves_the_image():
    lq = photo_like()
    for luma_range in ("full", "studio"):
        network = PlusConstant(0.0, luma_range=luma_range)
        assert np.array_equal(restore_image(network, lq), lq)


@pytest.mark.parametrize("luma_range", ["full", "studio"])
def test_luma_network_changes_luma_and_not_chroma(luma_range):
    lq = photo_like()
    network = PlusConstant(21.9 / 255, luma_range=luma_range)
    change = restore_image(network, lq).astype(float) - lq
    expected = 21.9 * 255 / 219 if luma_range == "studio" else 21.9
    assert np.abs(change - expected).max() <= 0.51  # equal in R, G and B: chroma stays
    restored = restore_image(PlusConstant(21.9 / 255, luma_range="studio"), lq)
    assert np.abs(luma(restored) - luma(lq) - 21.9).max() < 0.5


def test_luma_network_sees_grey_as_it_is():
    grey = np.repeat(photo_like()[..., :1], 3, axis=-1)
    network = PlusConstant(0.0)
    seen = []
    network.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    restore_image(network, grey)
    assert seen[0].shape == (1, 1, *grey.shape[:2])
    np.testing.assert_allclose(seen[0][0, 0].numpy() * 255, grey[..., 0], atol=1e-4)


def test_luma_network_gets_its_colours_from_bicubic():
    lq = photo_like()
    restored = restore_image(PlusConstant(0.0, scale=2, luma_range="studio"), lq)
    expected = bicubic_resize(lq, scale=2, border="replicate")
    # The network's own enlarging does not round, so luma may differ by a level or two.
    assert np.abs(restored.astype(int) - expected).max() <= 2


def test_modes_and_gradients_are_left_as_they_were():
    network = nn.Sequential(nn.Dropout(0.9), nn.Sequential(nn.Dropout(0.9)))
    network.facts = ModelFacts(
        name="dropout", scale=1, channels=3, value_range=1.0, taps=(), halo_px=0
    )
    network[1].eval()
    lq = photo_like()
    assert np.array_equal(restore_image(network, lq), lq)  # evaluation mode: nothing dropped
    assert [network.training, network[0].training, network[1].training] == [True, True, False]


def test_modes_come_back_after_an_error_too():
    network = nn.Dropout()
    with pytest.raises(ZeroDivisionError), evaluating(network):
        assert not network.training
        raise ZeroDivisionError
    assert network.training


def test_nan_is_not_made_a_picture():
    with pytest.raises(SparkirError, match="holds NaN"):
        restore_image(PlusConstant(float("nan"), channels=3), photo_like())
    with pytest.raises(SparkirError, match="holds NaN"):
        restore_image(PlusConstant(float("nan")), photo_like())
