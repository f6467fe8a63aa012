import numpy as np
import pytest
import torch

from sparkir.data.degrade import bicubic_resize
from sparkir.models.srcnn import SRCNN, BicubicUpscale


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_upscaling_is_matlab_bicubic_but_for_its_rounding(scale):
    # Far from black and white, so that the uint8 version has nothing to clip.
    image = np.random.default_rng(scale).integers(80, 176, (13, 10, 3), dtype=np.uint8)
    expected = bicubic_resize(image, scale=scale, border="replicate").astype(np.float64)
    x = torch.from_numpy(image).movedim(-1, 0)[None].float()
    enlarged = BicubicUpscale(scale, 3)(x)[0].movedim(0, -1).double().numpy()
    # Half a level from the first pass, times the kernel's absolute sum 1.25, and half from the
    # second.
    assert np.abs(enlarged - expected).max() <= 0.5 * 1.25 + 0.5
    assert np.abs(enlarged - expected).mean() < 0.4
    assert np.abs(enlarged - expected)[:2].mean() < 0.4  # the border too


def test_upscaling_keeps_a_flat_image_flat():
    x = torch.full((1, 1, 4, 5), 0.7)
    torch.testing.assert_close(BicubicUpscale(3, 1)(x), torch.full((1, 1, 12, 15), 0.7))


def test_state_dict_is_the_three_published_convolutions():
    shapes = {name: tuple(t.shape) for name, t in SRCNN(channels=1).state_dict().items()}
    assert shapes == {
        "conv1.weight": (64, 1, 9, 9),
        "conv1.bias": (64,),
        "conv2.weight": (32, 64, 5, 5),
        "conv2.bias": (32,),
        "conv3.weight": (1, 32, 5, 5),
        "conv3.bias": (1,),
    }


def test_scale_1_is_the_three_convolutions_alone():
    network = SRCNN(scale=1)
    x = torch.rand(1, 3, 12, 9)
    expected = network.conv3(network.conv2(network.conv1(x).relu()).relu())
    torch.testing.assert_close(network(x), expected)
