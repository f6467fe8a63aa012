import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparkir.models.plainusr import PlainUSR, SoftPooling

ORDER = {
    "u": {"block1": 16, "blockm": 8, "block2": 16},
    "m": {"block1": 48, "block2": 32, "blockm": 16, "block3": 32, "block4": 48},
}


@pytest.mark.parametrize("size", ORDER)
def test_published_weights_make_the_published_network(size):
    """There the image is three more channels, and a block overwrites the channels that it reads."""
    torch.manual_seed(0)
    network = PlainUSR(scale=2, size=size).eval()
    width = network.widths[0]
    head, tail = nn.Conv2d(3, width + 3, 3, padding=1), nn.Conv2d(width + 3, 12, 3, padding=1)
    state = {
        name: tensor for name, tensor in network.state_dict().items() if name.startswith("block")
    }
    state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    state |= {f"tail.0.{name}": tensor for name, tensor in tail.state_dict().items()}
    network.load_state_dict(network.from_published(state))
    x = torch.rand(1, 3, 20, 17)
    features = head(x)
    for name, width in ORDER[size].items():
        features = features.clone()
        features[:, :width] = network.get_submodule(name)(features[:, :width])
    torch.testing.assert_close(network(x), F.pixel_shuffle(tail(features), 2))


def test_its_own_weights_are_left_alone():
    network = PlainUSR(size="u")
    state = dict(network.state_dict())
    assert network.from_published(state) == state


@pytest.mark.parametrize("size", ["t", "s"])
def test_attention_is_that_of_the_paper(size):
    torch.manual_seed(0)
    attention = PlainUSR(size=size).blockm.body[3]
    x = torch.rand(1, {"t": 16, "s": 8}[size], 21, 18)
    if size == "t":
        mask = attention.body[0](x).sigmoid()
    else:
        y = attention.body[0](x)
        y = F.avg_pool2d(y.exp() * y, 7, 3) / F.avg_pool2d(y.exp(), 7, 3)
        y = attention.body[3](attention.body[2](y)).sigmoid()
        mask = F.interpolate(y, (21, 18), mode="bilinear", align_corners=False)
    torch.testing.assert_close(attention(x), x * mask * x[:, :1].sigmoid())


def test_soft_pooling_lies_between_the_mean_and_the_maximum():
    x = torch.randn(1, 2, 7, 7)
    pooled = SoftPooling()(x).flatten()
    weights = x.flatten(2).softmax(2)
    torch.testing.assert_close(pooled, (weights * x.flatten(2)).sum(2).flatten())
    assert (pooled > x.mean((2, 3)).flatten()).all()
    assert (pooled < x.amax((2, 3)).flatten()).all()


def test_an_untrained_network_starts_with_the_image():
    torch.manual_seed(0)
    network = PlainUSR(scale=2, size="u").eval()
    head, tail = network.head_image.weight, network.tail_image.weight
    nn.init.zeros_(network.tail.weight)
    for layer in (network.head_image, network.tail_image, network.tail):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    with torch.no_grad():  # only what was put there
        head.round_()
        tail.round_()
    x = torch.rand(1, 3, 6, 5)
    expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(
    ("size", "scale", "parameters"),
    [("u", 2, 13_628), ("t", 4, 60_100), ("s", 4, 68_612), ("m", 2, 148_932)],
)
def test_the_published_sizes(size, scale, parameters):
    network = PlainUSR(size=size, scale=scale)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
