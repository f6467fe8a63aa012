"""Every architecture, at every width, for every target, executed by the runtime it is for."""

import os
from typing import Any

import onnxruntime
import pytest
import torch
from exported import Deployed, deploy, images

from sparkir.deploy.parity import check_parity
from sparkir.errors import SparkirError
from sparkir.models.registry import available
from sparkir.quant.prepare import placement_of
from sparkir.quant.spec import QuantSpec

WIDTHS = [(8, 8), (4, 8), (4, 4)]
TARGETS = ["onnxruntime", "portable", "openvino"]
NETWORKS = ["srcnn", "dncnn", "edsr", "rfdn"]
ONCE = {
    "anchored": [(8, 8), (4, 4)],
    "rlfn": [(8, 8), (4, 4)],
    "bsrn": [(4, 4), (8, 8)],
    "bsrn-s": [(4, 8), (4, 4)],
    "carn-m": [(8, 8), (4, 8)],
    "imdn": [(4, 8), (8, 8)],
    "fmen": [(8, 8), (4, 8)],
    "safmn": [(4, 8), (8, 8)],
    "span": [(4, 4), (8, 8)],
    "plainusr": [(4, 4), (4, 8)],
    "pooling": [(8, 8), (4, 4)],
    "mirnet": [(4, 8), (4, 4)],
    "nafnet": [(8, 8), (4, 8)],
    "swinir": [(4, 4), (8, 8)],
}
"""One width in ONNX Runtime and one in OpenVINO; `make test` has one of the two."""
FIRST_IN_OPENVINO = {"bsrn", "fmen", "span", "nafnet", "swinir"}
LONG = {"anchored", "bsrn", "imdn", "mirnet", "pooling", "rlfn", "span", "swinir"}
"""Long to export, or made of parts that others here have too; for `make test-all`."""


def matrix() -> list[Any]:
    """Network, bits of weights and of tensors, target.

    Of NETWORKS, every width and every target once; of the others but those of LONG, one width in
    one runtime. What is left is for `make test-all`: an export takes ten seconds and more. With
    SPARKIR_EVERY_WIDTH, for whoever changes a placement, every network has every width.
    """
    cases = []
    for row, name in enumerate(NETWORKS):
        for column, width in enumerate(WIDTHS):
            for place, target in enumerate(TARGETS):
                quick = place == (row + column) % len(TARGETS)
                cases.append(case(name, *width, target, quick=quick))
    every = "SPARKIR_EVERY_WIDTH" in os.environ
    for name, chosen in ONCE.items():
        for place, target in enumerate(("onnxruntime", "openvino")):
            widths = WIDTHS if every else chosen[place : place + 1]
            first = (target == "openvino") == (name in FIRST_IN_OPENVINO)
            quick = first and name not in LONG
            cases += [case(name, *width, target, quick=quick) for width in widths]
    return cases


def case(name: str, bits: int, activation_bits: int, target: str, *, quick: bool) -> Any:
    marks = () if quick else (pytest.mark.slow,)
    values = (name, bits, activation_bits, target)
    return pytest.param(values, marks=marks, id="-".join(map(str, values)))


def test_the_matrix_has_every_architecture():
    names = {*NETWORKS, *ONCE, "edsr-baseline"} - {"anchored", "pooling"}
    assert names == available().keys()


@pytest.mark.parametrize("values", matrix())
def test_the_runtime_shows_the_integer_networks_pixels(values):
    name, target = values[0], values[-1]
    found = deploy(*values)
    parity = found.parity
    assert parity.runtime == ("openvino" if target == "openvino" else "onnxruntime")
    assert parity.failures == []
    floats = {"srcnn": 1}.get(name, 0)  # the bicubic step
    assert len(parity.fusion.float_layers) == floats
    if not any(layer.is_float for layer in parity.layers):
        assert parity.differing_pixels == 0


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("target", TARGETS)
def test_low_bits_unpack_into_the_same_kernels(bits, target):
    found = deploy("edsr", bits, bits, target)
    assert found.parity.failures == []
    assert found.parity.fusion.float_layers == ()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_layers_that_the_recipe_leaves_in_float(target):
    chosen = ("head.*", "body.1", "tail.*")
    found = deploy("edsr", 4, 4, target, float_layers=chosen)
    assert found.parity.failures == []
    assert placement_of(found.frozen).layers.keys() == {"body.0.body.0", "body.0.body.2"}
    assert len(found.parity.fusion.float_layers) == 4  # head, body, two of the tail


@pytest.mark.parametrize("name", ["edsr", "dncnn"])
@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_one_file_shows_the_same_pixels_in_both_runtimes(name, grid):
    found = deploy(name, 4, 4, "openvino", grid)
    assert both(found) == [0, 0]


def test_openvino_rounds_to_the_grid_of_a_function_before_an_addition():
    """Fused with the layer and the addition, it would leave the function's grids out."""
    found = deploy("branches", 8, 8, "openvino")
    assert found.parity.differing_pixels == 0
    onnxruntime.InferenceSession(found.content)  # what keeps them apart is no obstacle elsewhere


def both(found: Deployed) -> list[int]:
    torch.manual_seed(1)
    image = [images(found.facts, 1, 40, 33)]
    return [
        check_parity(found.model, found.frozen, image, runtime=runtime).differing_pixels
        for runtime in ("onnxruntime", "openvino")
    ]


def test_tensorrt_gets_int8_alone():
    """TensorRT itself cannot run here; its file is executed by ONNX Runtime, for its meaning."""
    found = deploy("rfdn", 8, 8, "tensorrt")
    assert found.parity.failures == []
    zeros = [
        (t.data_type, list(t.int32_data) + list(t.raw_data))
        for t in found.model.graph.initializer
        if t.name.endswith(".zero") and not t.dims
    ]
    assert zeros
    assert all(kind == 3 and not any(content) for kind, content in zeros)  # int8 0
    assert "fea_conv" in placement_of(found.frozen).left_in_float


def test_tensorrt_refuses_zero_points():
    with pytest.raises(SparkirError, match="takes symmetric grids only"):
        QuantSpec(target="tensorrt", activation_grid="affine")


def test_an_unknown_target_is_named():
    with pytest.raises(SparkirError, match="no target 'tpu'; known: onnxruntime, portable"):
        QuantSpec(target="tpu")
