"""The published RFDN x4 on Set5, all the way to the file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparkir.data.degrade import mod_crop
from sparkir.data.images import read_image
from sparkir.deploy.onnx import to_onnx
from sparkir.deploy.runtime import RuntimeNetwork, fusion_of, saturates
from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.metrics import Convention, psnr_db
from sparkir.models.checkpoint import load_weights
from sparkir.models.rfdn import RFDN
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.reference import freeze, stored_bytes
from sparkir.quant.spec import QuantSpec
from sparkir.quant.targets import TARGETS

IMAGES = ("baby", "bird", "butterfly", "head", "woman")


@pytest.fixture(scope="module")
def rfdn(development_data):
    network = RFDN().eval()
    load_weights(network, development_data / "weights/RFDN/RFDN_AIM.pth")
    return network


@pytest.fixture(scope="module")
def set5(development_data) -> list[tuple[np.ndarray, np.ndarray]]:
    folder = development_data / "test/Set5"
    return [
        (
            read_image(folder / f"LR_bicubic/X4/{name}x4.png"),
            mod_crop(read_image(folder / f"HR/{name}.png"), 4),
        )
        for name in IMAGES
    ]


@pytest.fixture(scope="module")
def frozen(rfdn, development_data):
    """W8A8 after calibration on eight crops of other images, without training."""
    crops = [crop(path) for path in small_images(development_data)[:8]]
    student = prepare(rfdn, QuantSpec())
    calibrate(student, [torch.stack(crops)])
    return freeze(student)


def small_images(data: Path) -> list[Path]:
    return sorted((data / "test/Set14/LR_bicubic/X4").iterdir())


def crop(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_image(path)[10:58, 10:58]).permute(2, 0, 1).float()


def mean_psnr_db(network, pairs) -> float:
    convention = Convention(space="y", crop_px=4)
    return sum(psnr_db(restore_image(network, lq), gt, convention) for lq, gt in pairs) / len(pairs)


@pytest.mark.data
def test_float_is_as_published(rfdn, set5):
    assert mean_psnr_db(rfdn, set5) == pytest.approx(32.16, abs=0.01)


@pytest.mark.data
def test_8_bits_without_training_lose_little(frozen, set5):
    assert mean_psnr_db(frozen, set5) > 32.16 - 0.6


@pytest.mark.data
def test_the_file_shows_the_integer_networks_pixels(frozen, set5):
    model = to_onnx(frozen)
    runtime = RuntimeNetwork(model.SerializeToString())
    for lq, _ in set5[1:3]:
        np.testing.assert_array_equal(restore_image(runtime, lq), restore_image(frozen, lq))
    assert len(placement_of(frozen).layers) == 64
    assert list(placement_of(frozen).left_in_float) == [
        "interpolate",
        *(f"interpolate_{number}" for number in (1, 2, 3)),
    ]
    # Names and settings of 476 operations; the integers themselves are 455 kB.
    assert len(model.SerializeToString()) < 1.25 * stored_bytes(frozen)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", ["openvino", "portable"])
def test_no_order_of_operations_matters(rfdn, set5, development_data, target, bits):
    """OpenVINO and ONNX Runtime on real photographs: not one value differs."""
    crops = [crop(path) for path in small_images(development_data)[:8]]
    runtime = TARGETS[target].runtime
    spec = QuantSpec(
        weight_bits=bits,
        activation_bits=bits,
        target=target,
        reduce_range=saturates(runtime),
    )
    student = prepare(rfdn, spec)
    calibrate(student, [torch.stack(crops)])
    frozen = freeze(student)
    model = to_onnx(frozen)
    network = RuntimeNetwork(model.SerializeToString(), runtime=runtime)
    assert fusion_of(model, runtime).float_layers == ()
    for lq, _ in set5:
        np.testing.assert_array_equal(restore_image(network, lq), restore_image(frozen, lq))
