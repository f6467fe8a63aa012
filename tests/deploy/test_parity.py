"""The gate: a file that shows other pixels than the integer network must not pass."""

import copy
import dataclasses

import numpy as np
import onnx
import pytest
import torch
from exported import deploy, images
from onnx import TensorProto, numpy_helper

from sparkir.deploy import parity as parity_module
from sparkir.deploy import runtime
from sparkir.deploy.parity import LayerParity, Parity, check_parity, require_parity
from sparkir.errors import SparkirError
from sparkir.quant.prepare import placement_of
from sparkir.quant.reference import IntegerQuantizer


def test_an_honest_file_passes(deployed):
    parity = deployed.parity
    assert parity.failures == []
    require_parity(parity)
    for layer in parity.layers:
        if layer.is_layer:
            assert layer.differing == 0
    assert sum(layer.is_layer for layer in parity.layers) == len(
        placement_of(deployed.frozen).layers
    )
    assert parity.differing_pixels <= 1e-4 * parity.pixels
    sizes = 24 * 24 + 31 * 17
    assert parity.pixels == sizes * deployed.facts.channels * deployed.facts.scale**2


def test_grids_behind_float_operations_are_marked():
    """They alone get a larger share: two libraries take float sums in different orders."""
    marked = [one.name for one in deploy("srcnn", 8).parity.layers if one.is_float]
    assert marked == ["quantizers_conv2d"]
    parity = deploy("everything", 8).parity
    assert {one.name for one in parity.layers if one.is_float} == {
        "quantizers_interpolate",
        "quantizers_cat_5",  # the reflecting convolution's
    }
    assert not [one.name for one in parity.layers if one.is_float and one.is_layer]


def test_summary_is_one_line(edsr):
    text = edsr.parity.summary()
    layers, grids = len(placement_of(edsr.frozen).layers), edsr.parity.grids
    assert text.startswith(f"in ONNX Runtime, {layers} layers run as integer kernels, 0 in float; ")
    assert f"{grids} of {grids} grids bit for bit" in text
    assert text.endswith("0 of 13236 values differ")
    assert "\n" not in text


# -- tampering -----------------------------------------------------------------------------------


def grid_behind(frozen, layer: str) -> str:
    """The call of the grid that a layer's result is put on."""
    (node,) = [n for n in frozen.graph.nodes if n.target == layer]
    while True:
        (node,) = node.users
        if isinstance(frozen.get_submodule(str(node.target)), IntegerQuantizer):
            return node.name


def edit(model: onnx.ModelProto, tensor: onnx.TensorProto, array: np.ndarray) -> None:
    assert not np.array_equal(array, numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def initializer(model: onnx.ModelProto, layer: str, kind: int) -> onnx.TensorProto:
    (found,) = [
        tensor
        for tensor in model.graph.initializer
        if tensor.name.startswith(f"{layer}.") and tensor.data_type == kind
    ]
    return found


def flip_a_weight(model, layer):
    tensor = initializer(model, layer, TensorProto.INT8)
    weight = numpy_helper.to_array(tensor).copy()
    place = np.unravel_index(np.abs(weight.astype(int)).argmax(), weight.shape)
    weight[place] = -max(int(weight[place]), -127)
    edit(model, tensor, weight)


def swap_biases(model, layer):
    tensor = initializer(model, layer, TensorProto.INT32)
    bias = numpy_helper.to_array(tensor)
    order = np.argsort(bias)
    swapped = bias.copy()
    swapped[order[[0, -1]]] = bias[order[[-1, 0]]]
    edit(model, tensor, swapped)


TAMPERING = {"weight": flip_a_weight, "bias": swap_biases}


def parity_of(deployed, model) -> Parity:
    torch.manual_seed(1)
    return check_parity(model, deployed.frozen, [images(deployed.facts, 1, 24, 24)])


@pytest.mark.parametrize(
    ("layer", "how"),
    [("model.0", "weight"), ("model.2", "weight"), ("model.6", "weight"), ("model.4", "bias")],
)
def test_a_changed_weight_or_bias_is_found_in_its_layer(dncnn, layer, how):
    model = copy.deepcopy(dncnn.model)
    TAMPERING[how](model, layer)
    grid = grid_behind(dncnn.frozen, layer)
    parity = parity_of(dncnn, model)
    # Every layer gets the runtime's own input, so that no other is blamed.
    assert [one.name for one in parity.layers if one.differing] == [grid]
    assert parity.failures[0].startswith(f"{grid} differs in ")
    assert parity.failures == parity_of(dncnn, model).failures
    with pytest.raises(SparkirError, match=rf"it was not written: {grid} differs in"):
        require_parity(parity)


@pytest.mark.parametrize("factor", [1.01, 0.9])
def test_a_changed_scale_is_found_where_it_first_acts(edsr, factor):
    (layer,) = [n for n in placement_of(edsr.frozen).layers if n.endswith("body.0")]
    grid = grid_behind(edsr.frozen, layer)
    model = copy.deepcopy(edsr.model)
    (node,) = [n for n in model.graph.node if n.name == grid]
    (tensor,) = [t for t in model.graph.initializer if t.name == node.input[1]]
    edit(model, tensor, np.asarray(numpy_helper.to_array(tensor) * np.float32(factor)))
    parity = parity_of(edsr, model)
    assert parity.failures[0].startswith(f"{grid} differs in ")
    with pytest.raises(SparkirError, match=grid):
        require_parity(parity)


def test_a_changed_addition_is_found(edsr):
    """Its grid is no layer's, so a value in 100,000 may differ there, but not many."""
    (grid,) = [one.name for one in edsr.parity.layers if one.name == "quantizers_add"]
    model = copy.deepcopy(edsr.model)
    (node,) = [n for n in model.graph.node if n.name == grid]
    (tensor,) = [t for t in model.graph.initializer if t.name == node.input[1]]
    edit(model, tensor, np.asarray(numpy_helper.to_array(tensor) * np.float32(1.02)))
    assert parity_of(edsr, model).failures[0].startswith(f"{grid} differs in ")


def test_a_changed_final_image_is_found(dncnn):
    model = copy.deepcopy(dncnn.model)
    step = model.graph.initializer.add()
    step.CopyFrom(numpy_helper.from_array(np.float32(3 / 255), "offset"))
    last = model.graph.node[-1]
    assert last.output[0] == "restored"
    last.output[0] = "unshifted"
    model.graph.node.append(onnx.helper.make_node("Add", ["unshifted", "offset"], ["restored"]))
    parity = parity_of(dncnn, model)
    assert [one for one in parity.layers if one.differing] == []
    assert parity.failures == [
        f"the final image differs in {24 * 24} of {24 * 24} values, by up to 3 levels"
    ]


# -- the bounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_layer", "differing", "total", "largest", "passes"),
    [
        (True, 0, 1000, 0, True),
        (True, 1, 10**9, 1, False),  # layers are exact
        (False, 1, 10, 1, True),
        (False, 2, 1000, 1, False),
        (False, 10, 10**6, 1, True),
        (False, 11, 10**6, 1, False),
        (False, 1, 10**6, 2, False),
    ],
)
def test_what_a_grid_may_differ(is_layer, differing, total, largest, passes):
    layer = LayerParity(
        name="grid", is_layer=is_layer, differing=differing, total=total, largest=largest
    )
    assert layer.passes == passes


@pytest.mark.parametrize(("differing", "passes"), [(100, True), (101, False)])
def test_what_a_grid_may_differ_behind_a_float_operation(differing, passes):
    layer = LayerParity(
        name="grid", is_layer=False, differing=differing, total=10**6, largest=1, is_float=True
    )
    assert layer.passes == passes


@pytest.mark.parametrize("bad_first", [True, False])
def test_a_fault_in_one_image_is_not_covered_by_another(dncnn, monkeypatch, bad_first):
    """One value off by seven levels weighs more than five that fell the other way."""

    def scripted(frozen, image, stored):
        bad = (image.shape[-1] == 24) == bad_first
        found = {"differing": 1, "total": 1000, "largest": 7} if bad else {}
        found = found or {"differing": 5, "total": 10**6, "largest": 1}
        return [LayerParity(name=name, is_layer=False, **found) for name in stored]

    monkeypatch.setattr(parity_module, "teacher_forced", scripted)
    pictures = [images(dncnn.facts, 1, 24, width) for width in (24, 25)]
    parity = check_parity(dncnn.model, dncnn.frozen, pictures)
    worst = "differs in 1 of 1000 values, by up to 7 levels"
    assert len(parity.failures) == len(parity.layers)
    assert all(failure.endswith(worst) for failure in parity.failures)


@pytest.mark.parametrize("how_many", ["all", "one"])
def test_a_grid_that_is_compared_with_nothing_is_a_failure(dncnn, how_many):
    """As would come of an exporter that calls its outputs otherwise."""
    model = onnx.ModelProto()
    model.CopyFrom(dncnn.model)
    grids = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for node in grids if how_many == "all" else grids[-1:]:
        node.name = f"another_{node.name}"
    parity = check_parity(model, dncnn.frozen, [images(dncnn.facts, 1, 24, 24)])
    count = len(grids) if how_many == "all" else 1
    assert parity.failures[0].startswith(f"{count} of the file's {len(grids)} grids are none of")


def test_only_three_failures_are_told(dncnn):
    failures = [f"grid {number} differs" for number in range(9)]
    parity = copy.copy(dncnn.parity)
    object.__setattr__(parity, "failures", failures)
    with pytest.raises(SparkirError) as caught:
        require_parity(parity)
    assert str(caught.value).endswith(": grid 0 differs; grid 1 differs; grid 2 differs")


def test_a_processor_that_saturates_is_named_with_its_remedy(dncnn):
    parity = dataclasses.replace(dncnn.parity, failures=["grid differs"], saturated=True)
    with pytest.raises(SparkirError, match=r"no VNNI.*quant\.reduce_range = true, or export"):
        require_parity(parity)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True}, True),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_vnni": False}, True),
        ({"architecture": "x86_64", "avx512_vnni": True}, False),
        ({"architecture": "x86_64", "avx_vnni": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_which_processors_saturate_in_openvino(monkeypatch, here, expected):
    monkeypatch.setattr(runtime, "get_capabilities", lambda: here)
    assert runtime.saturates("openvino") == expected
    assert not runtime.saturates("onnxruntime")
