import pytest
import torch
import torch.nn.functional as F

from sparkir.models.nafnet import NAFBlock, NAFNet
from sparkir.models.normalize import LayerNorm2d

DENOISING = {"encoder_blocks": (2, 2, 4, 8), "middle_blocks": 12, "decoder_blocks": (2, 2, 2, 2)}


def small() -> NAFNet:
    return NAFNet(width=4, encoder_blocks=[1, 2], middle_blocks=1, decoder_blocks=[1, 1]).eval()


@pytest.mark.parametrize(
    ("options", "millions"),
    [({}, 17.1), ({"width": 64}, 67.9), (DENOISING, 29.2), ({"width": 64, **DENOISING}, 116.0)],
    ids=str,
)
def test_parameters_are_as_many_as_published(options, millions):
    """Deblurring and denoising, 32 and 64 wide."""
    with torch.device("meta"):
        count = sum(p.numel() for p in NAFNet(**options).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_names_are_the_published_ones():
    block = (
        *("beta", "gamma", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
        *(f"{layer}.{kind}" for layer in BLOCK_LAYERS for kind in ("weight", "bias")),
    )
    blocks = ("encoders.0.0", "encoders.1.0", "encoders.1.1", "middle_blks.0")
    blocks += ("decoders.0.0", "decoders.1.0")
    assert set(small().state_dict()) == {
        *(f"{name}.{parameter}" for name in blocks for parameter in block),
        *(f"{name}.weight" for name in ("intro", "ending", "downs.0", "downs.1")),
        *(f"{name}.bias" for name in ("intro", "ending", "downs.0", "downs.1")),
        *("ups.0.0.weight", "ups.1.0.weight"),
    }


BLOCK_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "sca.1")


def test_a_fresh_block_gives_what_it_gets():
    x = torch.rand(1, 4, 6, 5)
    assert torch.equal(NAFBlock(4)(x), x)


def pixelwise(x: torch.Tensor, layer: torch.nn.Conv2d) -> torch.Tensor:
    return F.linear(x.movedim(1, -1), layer.weight[..., 0, 0], layer.bias).movedim(-1, 1)


def test_a_block_by_hand():
    """Figure 3 c and equations 4 and 5, layer by layer."""
    block = NAFBlock(4)
    torch.nn.init.normal_(block.beta)
    torch.nn.init.normal_(block.gamma)
    x = torch.randn(2, 4, 6, 5)
    wide = pixelwise(block.norm1(x), block.conv1)
    wide = F.conv2d(wide, block.conv2.weight, block.conv2.bias, padding=1, groups=8)
    gated = wide[:, :4] * wide[:, 4:]
    factors = pixelwise(gated.mean((2, 3))[..., None, None], block.sca[1])
    middle = x + block.beta * pixelwise(gated * factors, block.conv3)
    wide = pixelwise(block.norm2(middle), block.conv4)
    expected = middle + block.gamma * pixelwise(wide[:, :4] * wide[:, 4:], block.conv5)
    torch.testing.assert_close(block(x), expected)


def test_normalisation_by_hand():
    norm = LayerNorm2d(3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 4, 5)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt()
    expected = expected * norm.weight.view(3, 1, 1) + norm.bias.view(3, 1, 1)
    torch.testing.assert_close(norm(x), expected)
