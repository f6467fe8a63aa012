import numpy as np
import pytest
import torch

from sparkir.data.images import read_image
from sparkir.models.checkpoint import load_weights
from sparkir.models.dncnn import DnCNN


@pytest.mark.data
def test_published_weights_take_noise_off_a_grey_photo(development_data):
    network = DnCNN()
    load_weights(network, development_data / "weights/DnCNN/KAIR_dncnn_25.pth")
    photo = read_image(development_data / "test/Set5/HR/head.png")[..., 1]
    clean = torch.from_numpy(photo).float()[None, None] / 255
    noise = np.random.default_rng(0).normal(0, 25 / 255, clean.shape)
    noisy = clean + torch.from_numpy(noise).float()
    with torch.inference_mode():
        restored = network(noisy)
    assert _psnr_db(restored, clean) - _psnr_db(noisy, clean) > 7


def test_output_is_the_input_less_the_predicted_noise():
    network = DnCNN(depth=3, width=4, channels=3)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(network(x), x - network.model(x))


def test_taps_of_two_depths_pair_up():
    assert DnCNN(depth=17).facts.taps == ("model.9", "model.21", "model.31")
    assert len(DnCNN(depth=7).facts.taps) == 3


def _psnr_db(image, clean):
    return -10 * float(torch.log10((image - clean).square().mean()))
