import pytest
import torch
import torch.nn.functional as F

from sparkir.errors import SparkirError
from sparkir.models.checkpoint import load_weights, save_weights
from sparkir.models.edsr import EDSR

MEAN = torch.tensor([0.4488, 0.4371, 0.4040]) * 255


def published_baseline_names():
    """The parameters of EDSR-PyTorch's edsr_baseline_x4, as its code makes them."""
    convolutions = ["sub_mean", "add_mean", "head.0", "body.16", "tail.0.0", "tail.0.2", "tail.1"]
    convolutions += [f"body.{block}.body.{layer}" for block in range(16) for layer in (0, 2)]
    return {f"{name}.{kind}" for name in convolutions for kind in ("weight", "bias")}


def published_state(network):
    """The network's weights as a published file would hold them."""
    eye = torch.eye(3).reshape(3, 3, 1, 1)
    shift = {"sub_mean.weight": eye, "sub_mean.bias": -MEAN}
    shift |= {"add_mean.weight": eye, "add_mean.bias": MEAN}
    return dict(network.state_dict()) | shift


def test_names_are_the_published_ones():
    assert set(published_state(EDSR())) == published_baseline_names()


def test_constant_mean_is_the_published_pair_of_convolutions():
    network = EDSR(width=4, blocks=2, scale=2)
    state = published_state(network)
    x = torch.rand(1, 3, 9, 8) * 255
    inner = network.head(F.conv2d(x, state["sub_mean.weight"], state["sub_mean.bias"]))
    inner = network.tail(network.body(inner) + inner)
    expected = F.conv2d(inner, state["add_mean.weight"], state["add_mean.bias"])
    torch.testing.assert_close(network(x), expected)


def test_published_files_load_either_way(tmp_path):
    source, network, other = (EDSR(width=4, blocks=1) for _ in range(3))
    save_weights(published_state(source), tmp_path / "edsr.safetensors", {})
    load_weights(network, tmp_path / "edsr.safetensors")
    other.load_state_dict(published_state(source))
    x = torch.rand(1, 3, 8, 8) * 255
    torch.testing.assert_close(network(x), source(x))
    torch.testing.assert_close(other(x), source(x))


def test_loading_as_a_part_of_a_larger_module_works_too():
    source = EDSR(width=4, blocks=1)
    larger = torch.nn.ModuleDict({"teacher": EDSR(width=4, blocks=1)})
    larger.load_state_dict({f"teacher.{k}": v for k, v in published_state(source).items()})
    x = torch.rand(1, 3, 8, 8) * 255
    torch.testing.assert_close(larger["teacher"](x), source(x))


def test_another_mean_is_refused():
    network = EDSR(width=4, blocks=1)
    state = published_state(network)
    state["sub_mean.bias"] = state["sub_mean.bias"] / 255  # a network on [0, 1]
    with pytest.raises(SparkirError, match="sub_mean"):
        network.load_state_dict(state)


def test_res_scale_multiplies_the_residual():
    block = EDSR(width=4, blocks=1, res_scale=0.25).body[0]
    x = torch.rand(1, 4, 5, 5)
    torch.testing.assert_close(block(x), x + 0.25 * block.body(x))


@pytest.mark.parametrize("scale", [5, 6, 9])
def test_scales_that_cannot_be_built_are_refused(scale):
    with pytest.raises(SparkirError, match=f"got scale {scale}"):
        EDSR(scale=scale, width=4, blocks=1)
