"""Networks in tiles against the whole image; modes; files that lie."""

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_networks import NETWORKS, facts, integer_model, network

from helpers import call, photo, save_image
from sparkir.data.degrade import bicubic_resize
from sparkir.deploy.runtime import saturates
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import restore_image
from sparkir.models.facts import ModelFacts
from sparkir.restore.engine import Engine
from sparkir.restore.network import Restorer, lacks_vnni, open_exported, runtime_for
from sparkir.restore.tiles import restore_tiled, tiling_for
from sparkir.tools import open_model


def whole(restorer: Restorer, pixels: np.ndarray) -> np.ndarray:
    top = np.iinfo(pixels.dtype).max
    return np.rint(restorer(pixels).clip(0, top)).astype(pixels.dtype)


def tiled(restorer: Restorer, pixels: np.ndarray, side: int) -> np.ndarray:
    tiling = tiling_for(restorer.facts, side)
    assert max(pixels.shape[:2]) > tiling.side, "one tile shows nothing"
    return restore_tiled(pixels, restorer, scale=restorer.facts.scale, tiling=tiling)


@pytest.mark.parametrize(
    "kind", ["torch", "integer", pytest.param("float", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_are_equal_to_the_whole_image(restorer, name, kind):
    made = restorer(name, kind)
    pixels = photo(83, 121, 1)
    difference = np.abs(tiled(made, pixels, 1).astype(int) - whole(made, pixels))
    assert difference.max() <= 1
    # Float networks, on the edge of rounding; and RFDN, whose halo leaves a thousandth of a level.
    assert (difference > 0).mean() < (0.01 if name == "rfdn" else 1e-4)


@pytest.mark.parametrize("name", ["edsr", "dncnn luma", "srcnn luma"])
def test_the_halo_is_needed(restorer, name):
    """Otherwise equal tiles would prove nothing."""
    made = restorer(name, "torch")
    tiling = tiling_for(made.facts, 1)
    narrow = type(tiling)(side=24, halo=0, blend=1, step=1, smallest=2)
    pixels = photo(83, 121, 1)
    seams = restore_tiled(pixels, made, scale=made.facts.scale, tiling=narrow)
    assert np.abs(seams.astype(int) - whole(made, pixels)).max() > 1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_torch_network_shows_what_evaluation_measures(restorer, name):
    pixels = photo(33, 42, 2)
    expected = restore_image(network(name), pixels)
    difference = np.abs(whole(restorer(name, "torch"), pixels).astype(int) - expected)
    if "luma" in name:  # float64 sums in another order
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
    else:
        assert difference.max() == 0


@pytest.mark.parametrize("name", ["edsr", "srcnn luma"])
def test_grey_is_the_luma_of_three_equal_channels(restorer, name):
    made = restorer(name, "float")
    grey = photo(30, 31, 4)[..., :1]
    colours = made(np.repeat(grey, 3, axis=2))
    expected = colours @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(made(grey)[..., 0], expected, atol=1e-3)
    assert whole(made, grey).shape[2] == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_enlarged_beside_the_colours(restorer, channels, dtype):
    made = restorer("edsr", "float")
    pixels = np.random.default_rng(0).integers(
        0, np.iinfo(dtype).max, (70, 90, channels + 1), dtype
    )
    result = tiled(made, pixels, 1)
    alpha = bicubic_resize(pixels[..., -1:], scale=4, border="replicate")
    inner = np.s_[:, :, 0]
    np.testing.assert_array_equal(result[..., -1], alpha[inner])
    whole_colours = whole(made, np.ascontiguousarray(pixels[..., :-1])).astype(int)
    levels = np.abs(result[..., :-1] - whole_colours)
    assert levels.max() <= (1 if dtype == np.uint8 else 2)  # float32 keeps 16 bits but just


def test_a_float_network_uses_all_16_bits(restorer):
    made = restorer("dncnn", "float")
    deep = (photo(24, 24, 1).astype(np.uint16) * 257) & 0xFF80
    fine = deep + 60  # less than one of 8 bits
    change = whole(made, fine).astype(int) - whole(made, deep)
    assert 5 < change.mean() < 200
    assert (change != 0).mean() > 0.9


def test_16_bits_that_8_could_hold_are_restored_alike(restorer):
    for name in ("edsr", "srcnn luma"):
        made = restorer(name, "float")
        pixels = photo(24, 26, 3)
        deep = made(pixels.astype(np.uint16) * 257) / 257
        tolerance = 2 if "luma" in name else 0.02  # the bicubic is rounded to finer levels
        np.testing.assert_allclose(deep, made(pixels), atol=tolerance)


def test_sizes_that_are_no_multiple_are_padded_by_reflection():
    seen = []

    def run(lq: np.ndarray) -> np.ndarray:
        seen.append(lq)
        return lq

    made = Restorer(facts=facts(size_multiple=8, value_range=255.0), run=run, label="", identity="")
    pixels = photo(13, 17, 0)
    np.testing.assert_array_equal(whole(made, pixels), pixels)
    expected = np.pad(pixels, ((0, 3), (0, 7), (0, 0)), mode="reflect")
    np.testing.assert_allclose(seen[0][0].transpose(1, 2, 0), expected, atol=1e-4)


def test_tiles_of_a_network_that_wants_multiples():
    """It halves the image and enlarges it again: right only on even corners."""

    def run(lq: np.ndarray) -> np.ndarray:
        assert lq.shape[2] % 6 == lq.shape[3] % 6 == 0
        return lq[:, :, ::6, ::6].repeat(6, 2).repeat(6, 3)

    made = Restorer(facts=facts(size_multiple=6, halo_px=6), run=run, label="", identity="")
    pixels = photo(100, 131, 0)
    np.testing.assert_array_equal(tiled(made, pixels, 40), whole(made, pixels))


def test_an_image_smaller_than_the_network_needs():
    made = Restorer(facts=facts(min_size_px=15), run=lambda lq: lq, label="", identity="")
    with pytest.raises(SparkirError, match="a height of at least 15 px, but got 14 x 20"):
        Engine(made)(np.zeros((14, 20, 3), np.uint8))


# Both runtimes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edsr", "dncnn luma"])
def test_openvino_restores_the_same(model_file, name):
    pytest.importorskip("openvino")
    pixels = photo(40, 50, 1)
    path = model_file(name, "float")
    one, other = (whole(open_exported(path, r), pixels) for r in ("onnxruntime", "openvino"))
    assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("name", ["edsr", "rfdn", "multiple"])
def test_the_program_in_the_docs_restores_the_same(model_file, tmp_path, monkeypatch, name):
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text("utf-8")
    (program,) = (code for code in page.split("```python\n")[1:] if code.startswith("import json"))
    file = model_file(name if name != "multiple" else "dncnn")
    model = onnx.load(file)
    if name == "multiple":
        (facts_entry,) = (entry for entry in model.metadata_props if entry.key == "facts")
        facts_entry.value = json.dumps(json.loads(facts_entry.value) | {"size_multiple": 4})
    onnx.save(model, tmp_path / "student.onnx")
    monkeypatch.chdir(tmp_path)
    names = {"rgb": photo(33, 42, 2)}
    exec(program.partition("```")[0], names)
    expected = whole(open_exported(tmp_path / "student.onnx"), names["rgb"])
    np.testing.assert_array_equal(names["image"], expected)


# Hostile models -------------------------------------------------------------------------------

FACTS = {
    "scale": ("scale", 2, ["its facts say", "x2", "export it again"]),
    "channels": ("channels", 1, ["cannot compute an input of (1, 1, 16, 16)"]),
    "value range of another type": (
        "value_range",
        "255",
        ["card that is damaged", "value_range is '255'"],
    ),
    "value range": ("value_range", 1023.0, ["value_range must be 1.0 or 255.0"]),
    "scale of another type": ("scale", "4", ["card that is damaged", "scale is '4'"]),
    "scale that is no whole number": ("scale", 4.0, ["card that is damaged", "scale is 4.0"]),
    "halo below zero": ("halo_px", -1, ["halo_px must be a whole number >= 0"]),
    "phase": ("tile_phase_px", 0, ["tile_phase_px must be a whole number >= 1"]),
    "name": ("name", 3, ["card that is damaged"]),
    "taps": ("taps", "body", ["card that is damaged"]),
    "luma range": ("luma_range", "tv", ["luma_range must be full or studio"]),
    "unknown fact": ("colour", "blue", ["card that is damaged"]),
    "multiple": ("size_multiple", 10**7, ["needs pictures of 10000000 x 10000000 px"]),
}


def with_card(text: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(integer_model("edsr"))
    said = {entry.key: entry.value for entry in model.metadata_props} | {"facts": text}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, said)
    return model


def refused(tmp_path, says: list[str], runtime: str = "onnxruntime") -> None:
    with pytest.raises(SparkirError) as caught:
        open_exported(tmp_path / "m.onnx", runtime)
    for words in says:
        assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("lie", FACTS)
def test_a_card_that_lies(tmp_path, lie):
    field, value, says = FACTS[lie]
    values = vars(network("edsr").facts) | {field: value}
    (tmp_path / "m.onnx").write_bytes(with_card(json.dumps(values)).SerializeToString())
    refused(tmp_path, says)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{", "[" * 100_000, "\x00"])
def test_a_damaged_card(tmp_path, text):
    (tmp_path / "m.onnx").write_bytes(with_card(text).SerializeToString())
    refused(tmp_path, ["m.onnx has a card that is damaged", "export it again"])


def test_a_card_of_an_older_version_has_no_phase(tmp_path):
    values = {k: v for k, v in vars(network("edsr").facts).items() if k != "tile_phase_px"}
    (tmp_path / "m.onnx").write_bytes(with_card(json.dumps(values)).SerializeToString())
    opened = open_exported(tmp_path / "m.onnx")
    assert opened.facts == network("edsr").facts
    assert isinstance(opened.facts, ModelFacts)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256)) * 50, b"\x08\x07\x12"])
def test_a_file_that_is_no_model(tmp_path, content, runtime):
    pytest.importorskip(runtime)
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(SparkirError, match=r"m\.onnx"):
        open_exported(tmp_path / "m.onnx", runtime)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_external_data_outside_the_folder_are_not_read(tmp_path, runtime):
    pytest.importorskip(runtime)
    model = onnx.ModelProto()
    model.CopyFrom(integer_model("edsr"))
    (tmp_path / "secret.bin").write_bytes(bytes(10**6))
    (tmp_path / "in").mkdir()
    tensor = next(i for i in model.graph.initializer if len(i.raw_data) > 1000)
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "in" / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SparkirError, match=r"cannot open .*(outside|external|escapes)"):
        open_exported(path, runtime)
    (tmp_path / "in" / "secret.bin").write_bytes(bytes(10**6))
    tensor.external_data[0].value = "secret.bin"
    path.write_bytes(model.SerializeToString())
    open_exported(path, runtime)  # the same, beside the file


def test_a_file_that_is_not_there(tmp_path):
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        with pytest.raises(SparkirError, match=r"there is no file .*gone.onnx; check the path"):
            open_exported(tmp_path / "gone.onnx", runtime)


@pytest.fixture
def with_vnni(monkeypatch):
    """As on a processor that OpenVINO is right on, whatever this one is."""
    monkeypatch.setattr("sparkir.restore.network.lacks_vnni", lambda: False)


def test_in_another_runtime_than_it_was_made_for(model_file, tmp_path, with_vnni):
    """Its results are others', and are known as such; nor are they made without a word."""
    pytest.importorskip("openvino")
    path = model_file("edsr")
    own, other = (open_exported(path, runtime) for runtime in ("onnxruntime", "openvino"))
    assert own.doubt == ""
    assert other.doubt == (
        "the file was made for ONNX Runtime on the CPU; OpenVINO may show slightly other pixels"
    )
    assert own.identity != other.identity
    save_image(tmp_path / "a.png", photo(20, 24, 1))
    arguments = ("restore", path, tmp_path / "a.png", tmp_path / "b.png")
    assert "made for ONNX Runtime" in call(*arguments, "--runtime", "openvino").err
    said = call(*arguments, "--overwrite")
    assert (said.code, said.err) == (0, "")


def test_both_ways_to_ask_the_processor_agree():
    assert lacks_vnni() == saturates("openvino")


def test_openvino_is_not_chosen_where_its_products_saturate(model_file, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    model = onnx.load(model_file("edsr"))
    said = {entry.key: entry.value for entry in model.metadata_props} | {"target": "openvino"}
    onnx.helper.set_model_props(model, said)
    onnx.save(model, tmp_path / "m.onnx")
    for here, chosen in ((False, "openvino"), (True, "onnxruntime")):
        monkeypatch.setattr("sparkir.restore.network.lacks_vnni", lambda here=here: here)
        assert runtime_for(tmp_path / "m.onnx") == chosen
        assert ("without VNNI" in open_exported(tmp_path / "m.onnx", "openvino").doubt) == here
    onnx.helper.set_model_props(model, said | {"training": "[quant]\nreduce_range = true\n"})
    onnx.save(model, tmp_path / "m.onnx")
    assert runtime_for(tmp_path / "m.onnx") == "openvino"


def test_a_runtime_that_does_not_exist(model_file):
    with pytest.raises(SparkirError, match="'tensorrt': choose one of onnxruntime, openvino"):
        open_exported(model_file("edsr"), "tensorrt")


class _Bomb:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_checkpoint_with_code_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    save_image(tmp_path / "a.png", photo(16, 16, 0))
    said = call("restore", "edsr", "a.png", "b.png", "--weights", "bomb.pth")
    assert said.code == 1
    assert said.err.startswith("error: bomb.pth is no checkpoint of plain tensors")
    assert len(said.err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "bomb.pth"}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_file_runs_where_it_was_made_for(tmp_path, model_file, target, with_vnni):
    model = onnx.load(model_file("edsr", "integer"))
    words = {p.key: p.value for p in model.metadata_props}
    onnx.helper.set_model_props(model, words | {"target": target})
    onnx.save(model, tmp_path / "model.onnx")
    title = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[target]
    assert open_exported(tmp_path / "model.onnx").label.endswith(f"in {title}")
    assert open_model(str(tmp_path / "model.onnx")).label.endswith(f"in {title}")
    assert open_exported(tmp_path / "model.onnx", "onnxruntime").label.endswith("ONNX Runtime")
