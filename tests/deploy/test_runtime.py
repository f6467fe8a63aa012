"""Running a file, and asking ONNX Runtime what it runs."""

import copy
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from exported import images

from sparkir.deploy import runtime
from sparkir.deploy.onnx import write_model
from sparkir.deploy.runtime import RuntimeNetwork, fusion_of
from sparkir.errors import SparkirError
from sparkir.evaluate.infer import restore_image


def test_a_file_is_a_network(tmp_path, edsr):
    path = tmp_path / "model.onnx"
    write_model(edsr.model, path)
    x = images(edsr.facts, 2, 20, 17)
    with torch.no_grad():
        expected = edsr.frozen(x)
    for source in (path, edsr.content):
        network = RuntimeNetwork(source)
        assert network.facts == edsr.facts
        torch.testing.assert_close(network(x), expected)
    assert restore_image(network, torch.zeros(16, 16, 3).byte().numpy()).shape == (32, 32, 3)


def test_facts_given_win(edsr):
    assert RuntimeNetwork(edsr.content, facts=edsr.facts).facts is edsr.facts


def test_a_file_without_facts_is_refused(dncnn):
    model = copy.deepcopy(dncnn.model)
    model.ClearField("metadata_props")
    with pytest.raises(SparkirError, match="does not say its scale and value range"):
        RuntimeNetwork(model.SerializeToString())


def test_what_is_no_model_is_refused(tmp_path, dncnn):
    missing, cut = tmp_path / "missing.onnx", tmp_path / "cut.onnx"
    cut.write_bytes(dncnn.content[:1000])
    with pytest.raises(SparkirError, match=r"there is no file .*missing.onnx; check the path"):
        RuntimeNetwork(missing)
    with pytest.raises(SparkirError, match=r"cannot open .*cut.onnx"):
        RuntimeNetwork(cut)
    with pytest.raises(SparkirError, match="cannot open the exported model"):
        RuntimeNetwork(b"no model")


def test_a_full_temporary_folder_is_named_with_its_remedy(dncnn, monkeypatch):
    monkeypatch.setattr(runtime.tempfile, "TemporaryDirectory", lambda: nullcontext("/dev/full"))
    with pytest.raises(SparkirError, match=r"cannot write what .*free some space there, or set"):
        fusion_of(dncnn.model)


def test_fusion_counts_what_is_run(dncnn):
    fusion = fusion_of(dncnn.model)
    assert fusion.integer["QLinearConv"] == 4
    assert fusion.other["Sub"] == 1
    assert fusion.float_layers == ()


def test_fusion_sees_layers_in_float(dncnn):
    """A weight without its grid makes a convolution in floating point."""
    model = copy.deepcopy(dncnn.model)
    grids = {n.name: n for n in model.graph.node if n.op_type == "QuantizeLinear"}
    (image,) = [n for n in grids.values() if n.input[0] == "lq"]
    dequantized = next(n for n in model.graph.node if n.input[0] == image.output[0]).output[0]
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[:] = ["lq" if name == dequantized else name for name in node.input]
    fusion = fusion_of(model)
    assert len(fusion.float_layers) == 1
    assert fusion.integer["QLinearConv"] == 3


SIGNALLED = """
import gc, signal, sys
from pathlib import Path
import numpy as np
from sparkir.deploy.session import open_session

sessions = [open_session(Path(sys.argv[1]), runtime="openvino") for _ in range(3)]
for session in sessions:
    session.run(np.zeros((1, 3, 20, 20), np.float32))
while sessions:
    del sessions[0], session
    session = None
    gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_is_handled_after_openvino_has_gone(tmp_path, edsr):
    """Cores that go in the order in which they came leave signal handlers a stack that is gone."""
    path = tmp_path / "model.onnx"
    write_model(edsr.model, path)
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "handled\n")
