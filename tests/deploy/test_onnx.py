"""The file: what is in it, how large it is, and that it shows the integer network's pixels."""

import json
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from exported import Deployed, deploy, images, weights_of
from onnx import TensorProto
from torch import Tensor, nn

from sparkir.deploy.onnx import require_onnx, to_onnx, write_model
from sparkir.deploy.parity import check_parity
from sparkir.deploy.qdq import grid_calls
from sparkir.deploy.session import open_session
from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts
from sparkir.models.registry import build
from sparkir.quant.calibrate import calibrate
from sparkir.quant.prepare import placement_of, prepare
from sparkir.quant.reference import freeze
from sparkir.quant.spec import QuantSpec

LARGEST_OVERHEAD_PER_NODE = 130
"""Bytes of names and settings for each operation in the file."""


def stored(model: onnx.ModelProto, kind: int) -> dict[str, np.ndarray]:
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == kind
    }


@pytest.mark.parametrize("shape", [(1, 15, 15), (2, 16, 23), (3, 33, 18)])
def test_any_batch_height_and_width_gives_the_integer_networks_pixels(deployed, shape):
    x = images(deployed.facts, *shape)
    (restored,) = deployed.session.run(x.numpy())
    with torch.no_grad():
        expected = deployed.frozen(x)
    assert expected.unique().numel() > 5
    scale = deployed.facts.scale
    assert restored.shape == (shape[0], x.shape[1], scale * shape[1], scale * shape[2])
    levels = (torch.from_numpy(restored) - expected).abs() / deployed.facts.value_range * 255
    assert levels.max() < 0.01


def test_one_pair_per_grid_named_after_it(deployed):
    operations = Counter(node.op_type for node in deployed.model.graph.node)
    calls = [call.name for call in grid_calls(deployed.frozen)]
    names = [n.name for n in deployed.model.graph.node if n.op_type == "QuantizeLinear"]
    assert names == calls
    assert deployed.parity.grids == len(calls) == operations["QuantizeLinear"]
    layers = placement_of(deployed.frozen).layers
    biases = len(stored(deployed.model, TensorProto.INT32)) - has_two_bits(deployed.model) * 2
    assert operations["DequantizeLinear"] == len(calls) + len(layers) + biases
    bytes_of = {n.output[0] for n in deployed.model.graph.node if n.op_type == "QuantizeLinear"}
    clips = [n for n in deployed.model.graph.node if n.op_type == "Clip"]
    narrow = [call for call in calls if levels_of(deployed.frozen, call) < 256]
    assert sum(n.input[0] in bytes_of for n in clips) == len(narrow)


def levels_of(frozen, call_name: str) -> int:
    (call,) = [call for call in grid_calls(frozen) if call.name == call_name]
    return frozen.get_submodule(str(call.target)).levels


def has_two_bits(model: onnx.ModelProto) -> bool:
    return "weights.int2" in stored(model, TensorProto.UINT8)


def test_weights_are_the_very_integers_of_the_network_and_biases_int32(deployed):
    weights, int32 = weights_of(deployed.model), stored(deployed.model, TensorProto.INT32)
    assert weights.keys() == placement_of(deployed.frozen).layers.keys()
    for name, weight in weights.items():
        layer = deployed.frozen.get_submodule(name)
        assert weight.dtype == np.int8
        np.testing.assert_array_equal(weight, layer.weight.numpy())
        biases = [array for key, array in int32.items() if key == f"{name}.bias"]
        assert len(biases) == (layer.bias is not None)
        if biases:
            np.testing.assert_array_equal(biases[0], layer.bias.numpy())


def test_the_file_is_about_as_large_as_the_bits_say(deployed):
    in_float = sum(
        array.nbytes
        for name, array in stored(deployed.model, TensorProto.FLOAT).items()
        if not name.endswith("scale")
    )
    overhead = len(deployed.content) - deployed.bits_say
    assert 0 < overhead < LARGEST_OVERHEAD_PER_NODE * len(deployed.model.graph.node) + in_float
    assert not deployed.model.graph.value_info


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_low_bits_make_small_files(bits):
    """Of a network of some size; the description of a graph weighs the same at any bits."""
    torch.manual_seed(0)
    student = prepare(
        build("edsr", width=64, blocks=8, scale=4),
        QuantSpec(weight_bits=bits, activation_bits=bits),
    )
    calibrate(student, [255 * torch.rand(1, 3, 16, 16)])
    frozen = freeze(student)
    deployed = Deployed(frozen=frozen, model=to_onnx(frozen))
    assert len(deployed.content) <= 1.10 * deployed.bits_say
    for name, weight in weights_of(deployed.model).items():
        np.testing.assert_array_equal(weight, frozen.get_submodule(name).weight.numpy())


def test_the_file_names_no_source_files(deployed):
    for trace in (b"site-packages", b".py", b"sparkir/", b"Traceback", b"/home", b"torch.nn"):
        assert trace not in deployed.content


def test_the_file_says_what_it_is(deployed):
    words = {p.key: p.value for p in deployed.model.metadata_props}
    facts = json.loads(words["facts"])
    assert facts | {"taps": tuple(facts["taps"])} == asdict(deployed.facts)
    assert words["quantization"] == placement_of(deployed.frozen).spec.label
    (lq,), (restored,) = deployed.model.graph.input, deployed.model.graph.output
    assert (lq.name, restored.name) == ("lq", "restored")
    for end in (lq, restored):
        assert end.type.tensor_type.elem_type == TensorProto.FLOAT
        batch, channels, height, width = end.type.tensor_type.shape.dim
        assert channels.dim_value == deployed.facts.channels
        assert not any(d.HasField("dim_value") for d in (batch, height, width))


def test_every_layer_runs_on_integers_but_those_left_in_float(deployed):
    fusion, placement = deployed.parity.fusion, placement_of(deployed.frozen)
    expected = {"srcnn": 1, "everything": 1}  # the bicubic step; the reflecting convolution
    assert len(fusion.float_layers) == expected.get(deployed.facts.name, 0)
    integer = fusion.integer["QLinearConv"] + fusion.integer["QGemm"]
    assert integer == len(placement.layers)
    left = set(placement.left_in_float)
    if deployed.facts.name == "srcnn":
        assert left == {"conv2d"}
    elif deployed.facts.name == "everything":
        assert left == {"interpolate", "reflecting"}
    else:
        assert not left & {name for name, m in deployed.frozen.named_modules() if name}


def test_interpolation_changes_no_bit():
    """Its one value on the other side of a tie would reach a quarter of the image's values."""
    parity = deploy("rfdn", 8).parity
    assert all(layer.differing == 0 for layer in parity.layers)
    assert parity.differing_pixels == 0


def test_additions_tables_and_concatenations_run_on_integers():
    fusion = deploy("rfdn", 8).parity.fusion
    expected = {"QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearLeakyRelu", "QLinearSigmoid"}
    assert expected <= fusion.integer.keys()
    assert not {"LeakyRelu", "Sigmoid", "Relu"} & fusion.other.keys()
    assert (fusion.integer["QLinearAdd"], fusion.integer["QLinearMul"]) == (5, 1)


class Squashed(nn.Module):
    """A function of one value between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = ModelFacts(
            name="squashed", scale=1, channels=3, value_range=1.0, taps=("head",), halo_px=2
        )
        self.head, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(torch.sigmoid(self.head(x)))


def test_a_table_with_an_entry_half_way_between_two_levels():
    """The last bit of a sigmoid decides, and ONNX Runtime's is not torch's."""
    student = prepare(Squashed(), QuantSpec())
    calibrate(student, [torch.rand(1, 3, 32, 32)])
    read, written = (student.get_submodule(f"quantizers.{n}") for n in ("head", "sigmoid"))
    with torch.no_grad():
        read.log_scale.copy_(torch.tensor(-4.9357008934021))
        read.zero_point.copy_(torch.tensor(137.0))
        written.log_scale.copy_(torch.tensor(-5.769403457641602))
        entry = float(torch.sigmoid((148 - read.zero_point) * read.scale()) / written.scale())
    assert entry % 1 == pytest.approx(0.5, abs=1e-5)
    frozen = freeze(student)
    model = to_onnx(frozen)
    assert check_parity(model, frozen, [torch.rand(1, 3, 64, 64)]).differing_pixels == 0
    ratio = frozen.get_submodule("quantizers.sigmoid").scale / written.scale().detach()
    assert ratio > 1
    assert ratio == pytest.approx(1, abs=1e-3)


def test_layers_of_equal_weights_have_names_of_their_own():
    """The exporter keeps equal constants once, and no two nodes may have one name."""
    found = deploy("twins", 8)
    layers = [node.name for node in found.model.graph.node if node.op_type == "Conv"]
    assert len(set(layers)) == len(layers) == 6
    assert {"head", "tail", "first", "third"} <= set(layers)
    assert found.parity.failures == []
    assert len(found.parity.fusion.layers) == 6
    assert found.parity.fusion.float_layers == ()


@pytest.mark.parametrize(
    "name", ["twins", pytest.param("carn-m", marks=pytest.mark.slow), "everything"]
)
def test_no_two_layers_read_one_constant(name):
    """Or ONNX Runtime cannot open the file where it makes weights unsigned; all are stored once."""
    graph = deploy(name, 8).model.graph
    layers = [n for n in graph.node if n.op_type in ("Conv", "Gemm")]
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.attribute]
    names = [name for node in weights for name in (node.input[0], *node.input[2:])]
    assert len(layers) <= len(weights)
    assert len(set(names)) == len(names)
    copied = [n for n in graph.node if n.op_type == "Concat" and len(n.input) == 1]
    assert len({n.input[0] for n in copied}) == len(copied)
    assert bool(copied) == (name != "everything")


def test_exporting_again_is_silent_and_gives_the_same_file(dncnn, capfd):
    before = {name: buffer.clone() for name, buffer in dncnn.frozen.named_buffers()}
    again = to_onnx(dncnn.frozen, {"note": "second"})
    assert capfd.readouterr() == ("", "")
    (note,) = [p for p in again.metadata_props if p.key == "note"]
    assert note.value == "second"
    again.metadata_props.remove(note)
    assert again.SerializeToString(deterministic=True) == dncnn.model.SerializeToString(
        deterministic=True
    )
    after = dict(dncnn.frozen.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_remedy(package, monkeypatch, dncnn):
    monkeypatch.setitem(sys.modules, package, None)
    for use in (require_onnx, lambda: to_onnx(dncnn.frozen)):
        with pytest.raises(SparkirError, match=rf'{package}.*pip install "sparkir\[onnx\]"'):
            use()


@pytest.mark.parametrize(
    ("runtime", "remedy"),
    [("onnxruntime", r"sparkir\[onnx\]"), ("openvino", r"sparkir\[openvino\]")],
)
def test_a_missing_runtime_is_named_with_its_remedy(runtime, remedy, monkeypatch, dncnn):
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(SparkirError, match=rf'not installed: pip install "{remedy}"'):
        open_session(dncnn.content, runtime=runtime)


def test_a_written_file_is_the_model(tmp_path, dncnn):
    path = tmp_path / "new" / "model.onnx"
    write_model(dncnn.model, path)
    assert onnx.load(path) == dncnn.model
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, dncnn):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SparkirError, match=r"cannot write the model .*taken"):
        write_model(dncnn.model, tmp_path / "taken" / "model.onnx")
