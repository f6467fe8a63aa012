import os
import pickle
import random

import pytest
import safetensors.torch
import torch
from torch import nn

from sparkir.errors import SparkirError
from sparkir.models.checkpoint import load_weights, read_metadata, save_weights
from sparkir.models.registry import build


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))


def _of(state):
    made = network()
    made.load_state_dict(state)
    return made


def assert_same_weights(first, second):
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.fixture
def source():
    torch.manual_seed(1)
    return network()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"params_ema": state, "params": {"older": torch.zeros(1)}},
        lambda state: {"params": state},
        lambda state: {"params_ema": {}, "params": state},
        lambda state: {"state_dict_ema": state, "state_dict": {"older": torch.zeros(1)}},
        lambda state: torch.optim.swa_utils.AveragedModel(_of(state)).state_dict(),
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"params": state}},
        lambda state: {"net_g": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    ],
)
def test_weights_are_found_wherever_trainers_put_them(tmp_path, source, wrap, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(dict(source.state_dict())), path)
    loaded = network()
    load_weights(loaded, path)
    assert_same_weights(loaded, source)


def test_prefix_of_some_keys_only_is_part_of_the_name(tmp_path):
    odd = nn.Module()
    odd.module, odd.other = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    save_weights(odd, tmp_path / "w.safetensors", {})
    load_weights(odd, tmp_path / "w.safetensors")


def test_saved_weights_come_back_with_their_metadata(tmp_path, source):
    path = tmp_path / "new" / "folder" / "w.safetensors"
    save_weights(source, path, {"model": "rfdn", "scale": "4"})
    loaded = network()
    load_weights(loaded, path)
    assert_same_weights(loaded, source)
    assert read_metadata(path) == {"model": "rfdn", "scale": "4"}
    assert [entry.name for entry in path.parent.iterdir()] == ["w.safetensors"]


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path):
    base = torch.rand(4, 3)
    save_weights({"a": base, "b": base, "c": base.T}, tmp_path / "w.safetensors", {})
    target = nn.Module()
    for name, shape in {"a": (4, 3), "b": (4, 3), "c": (3, 4)}.items():
        target.register_buffer(name, torch.zeros(shape))
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target.c, base.T)


def test_failed_save_leaves_the_older_file(tmp_path, source, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(source, path, {})
    before = path.read_bytes()

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SparkirError, match=r"cannot write weights.*No space left"):
        save_weights(network(), path, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_only_safetensors_are_written(tmp_path, source):
    with pytest.raises(SparkirError, match=r"saved as \.safetensors, got 'w\.pth'"):
        save_weights(source, tmp_path / "w.pth", {})


def test_mismatch_lists_up_to_five_of_each_kind_and_loads_nothing(tmp_path, source):
    state = dict(source.state_dict())
    del state["1.bias"]
    state["0.bias"] = torch.zeros(7)
    state |= {f"extra{number}": torch.zeros(1) for number in range(6)}
    torch.save(state, tmp_path / "w.pth")
    target = network()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(SparkirError) as caught:
        load_weights(target, tmp_path / "w.pth")
    message = str(caught.value)
    assert "1 missing: 1.bias;" in message
    assert "6 unexpected: extra0, extra1, extra2, extra3, extra4, ...;" in message
    assert "1 of another shape: 0.bias (7,) instead of (4,)" in message
    assert "extra5" not in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_values_are_refused_by_name(tmp_path, source, value):
    source[1].bias.data[0] = value
    save_weights(source, tmp_path / "w.safetensors", {})
    with pytest.raises(SparkirError, match=r"1\.bias holds NaN or infinite"):
        load_weights(network(), tmp_path / "w.safetensors")


class Evil:
    """A pickle of this makes a folder when it is loaded without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"state_dict": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(SparkirError, match=r"could run code; save network\.state_dict\(\)"):
        load_weights(network(), tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_a_whole_pickled_network_is_refused(tmp_path, source):
    torch.save(source, tmp_path / "w.pth")
    with pytest.raises(SparkirError, match=r"save network\.state_dict\(\)"):
        load_weights(network(), tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"hello, this is no checkpoint", b"PK\x03\x04cut", b"\x80"]
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(SparkirError, match="w") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_altered_bytes_end_in_a_message_or_in_weights(tmp_path, source, legacy):
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    intact = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        altered = bytearray(intact)
        for position in rng.choices(range(len(intact)), k=5):
            altered[position] = rng.randrange(256)
        path.write_bytes(altered)
        try:
            load_weights(network(), path)
        except SparkirError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_cut_off_anywhere_is_refused(tmp_path, source, legacy):
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    intact = path.read_bytes()
    for length in range(0, len(intact), 3):
        path.write_bytes(intact[:length])
        with pytest.raises(SparkirError, match=r"w\.pth"):
            load_weights(network(), path)


def test_missing_file_and_other_content_are_refused(tmp_path):
    with pytest.raises(SparkirError, match="no weights at"):
        load_weights(network(), tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(SparkirError, match="holds a list instead"):
        load_weights(network(), tmp_path / "list.pth")
    torch.save({1: torch.zeros(2)}, tmp_path / "number.pth")
    with pytest.raises(SparkirError, match="holds 1 where weights"):
        load_weights(network(), tmp_path / "number.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(SparkirError, match="holds epoch where weights"):
        load_weights(network(), tmp_path / "epoch.pth")
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump({"a": 1}, file, protocol=2)
    with pytest.raises(SparkirError, match=r"plain\.pth"):
        load_weights(network(), tmp_path / "plain.pth")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda t: (t * 100).to(torch.int8), "1 of another kind of number: 0.weight torch.int8"),
        (lambda t: t.to(torch.complex64), "1 of another kind of number: 0.weight torch.complex64"),
        (lambda t: t.to_sparse(), "0.weight is no plain tensor; save the weights as dense"),
    ],
)
def test_numbers_that_would_lose_something_are_refused(tmp_path, source, changed, says):
    state = dict(source.state_dict())
    state["0.weight"] = changed(state["0.weight"])
    torch.save(state, tmp_path / "w.pth")
    loaded = network()
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with pytest.raises(SparkirError, match=says):
        load_weights(loaded, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_weights_of_8_bit_floats_are_read(tmp_path, source):
    state = {name: t.to(torch.float8_e4m3fn) for name, t in source.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    loaded = network()
    load_weights(loaded, tmp_path / "w.safetensors")
    assert torch.equal(loaded[0].weight, state["0.weight"].float())


def test_published_keys_that_are_incomplete_are_a_mismatch(tmp_path):
    state = dict(build("plainusr", size="u").state_dict()) | {"tail.0.weight": torch.zeros(48, 8)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(SparkirError, match="not of this network"):
        load_weights(build("plainusr", size="u"), tmp_path / "w.pth")
