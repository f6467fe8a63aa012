import pytest
import torch
import torch.nn.functional as F

from sparkir.errors import SparkirError
from sparkir.models.carn import CARNM
from sparkir.models.checkpoint import load_weights, save_weights

MEAN = torch.tensor([0.4488, 0.4371, 0.4040])


def published(network: CARNM) -> dict[str, torch.Tensor]:
    """A network's weights as the authors' file would hold them, other scales' included."""
    state = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not any(call in name for call in (".b2.body.", ".b3.body."))
    }
    eye = torch.eye(3).reshape(3, 3, 1, 1)
    state |= {"sub_mean.shifter.weight": eye, "sub_mean.shifter.bias": -MEAN}
    state |= {"add_mean.shifter.weight": eye, "add_mean.shifter.bias": MEAN}
    state["exit.bias"] = state["exit.bias"] - MEAN
    for scale in {2, 3, 4} - {network.facts.scale}:
        state[f"upsample.up{scale}.body.0.weight"] = torch.rand(4, 1, 3, 3)
    return state


def as_published(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The authors' network for x2: recursive, and with convolutions that shift the colours."""

    def convolve(x, name, padding=0, groups=1):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, padding=padding, groups=groups)

    def block(x, name):
        y = F.relu(convolve(x, f"{name}.body.0", 1, 4))
        y = F.relu(convolve(y, f"{name}.body.2", 1, 4))
        return F.relu(convolve(y, f"{name}.body.4") + x)

    def cascade(x, prefix, stages):
        so_far = fused = x
        for number, stage in enumerate(stages, start=1):
            so_far = torch.cat([so_far, stage(fused)], 1)
            fused = F.relu(convolve(so_far, f"{prefix}c{number}.body.0"))
        return fused

    def inner(name):
        return lambda x: cascade(x, f"{name}.", [lambda x: block(x, f"{name}.b1")] * 3)

    x = convolve(convolve(x, "sub_mean.shifter"), "entry", 1)
    x = cascade(x, "", [inner(name) for name in ("b1", "b2", "b3")])
    x = F.pixel_shuffle(F.relu(convolve(x, "upsample.up2.body.0", 1, 4)), 2)
    return convolve(convolve(x, "exit", 1), "add_mean.shifter")


def test_published_weights_make_the_published_network(tmp_path):
    torch.manual_seed(0)
    state = published(CARNM(scale=2, width=8))
    torch.save(state, tmp_path / "carn_m.pth")
    network = CARNM(scale=2, width=8)
    load_weights(network, tmp_path / "carn_m.pth")
    x = torch.rand(1, 3, 9, 11)
    torch.testing.assert_close(network(x), as_published(state, x))


def test_its_own_weights_come_back(tmp_path):
    torch.manual_seed(0)
    source, network = CARNM(scale=3, width=4), CARNM(scale=3, width=4)
    save_weights(source, tmp_path / "own.safetensors", {})
    load_weights(network, tmp_path / "own.safetensors")
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(network(x), source(x))


def test_the_blocks_of_a_cascade_share_their_weights():
    network = CARNM(width=8)
    first, second = (network.b1.get_submodule(f"{name}.body.0") for name in ("b1", "b2"))
    assert first is not second
    assert first.weight is second.weight
    assert network.b2.b1.body[0].weight is not first.weight
    network(torch.rand(1, 3, 8, 8)).sum().backward()
    with torch.no_grad():
        first.weight -= first.weight.grad
    assert torch.equal(network.b1.b3.body[0].weight, first.weight)


def test_the_published_size():
    """0.412 M parameters at x4 in the paper's table, of one scale and without the mean shift."""
    count = sum(parameter.numel() for parameter in CARNM().parameters())
    assert count == 414_811 - 24 - (256 + 576) * (16 * 9 + 1) == 294_147


def test_another_mean_is_refused():
    network = CARNM(width=4)
    state = published(network)
    state["add_mean.shifter.bias"] = MEAN * 255
    with pytest.raises(SparkirError, match=r"CARN-M weights .* \(add_mean.shifter\)"):
        network.from_published(state)
