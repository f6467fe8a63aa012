import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparkir.errors import SparkirError
from sparkir.models.safmn import SAFMN, ResponseNormalisation


def test_modulation_is_that_of_the_authors():
    """Pooled to a 4th, 8th and 16th of the size, convolved, and brought back by repetition."""
    torch.manual_seed(0)
    modulation = SAFMN(width=8, blocks=1).feats[0].safm
    x = torch.rand(2, 8, 32, 48)
    seen = []
    for level, part in enumerate(x.chunk(4, dim=1)):
        cells = (32, 48) if level == 0 else (32 // 2 ** (level + 1), 48 // 2 ** (level + 1))
        pooled = modulation.mfr[level](F.adaptive_max_pool2d(part, cells))
        seen.append(F.interpolate(pooled, size=(32, 48), mode="nearest"))
    mask = F.gelu(modulation.aggr(torch.cat(seen, dim=1)))
    torch.testing.assert_close(modulation(x), x * mask)


def test_response_normalisation_by_hand():
    norm = ResponseNormalisation(2)
    nn.init.constant_(norm.gamma, 2.0)
    nn.init.constant_(norm.beta, 0.5)
    x = torch.stack([torch.full((2, 2), 3.0), torch.full((2, 2), 1.0)])[None]
    # Norms 6 and 2 of mean 4: relative 1.5 and 0.5.
    expected = torch.tensor([2 * 3 * 1.5 + 0.5 + 3, 2 * 1 * 0.5 + 0.5 + 1])
    torch.testing.assert_close(norm(x)[0, :, 0, 0], expected)


def test_the_order_of_the_pixels_does_not_show():
    """Libraries sum in different orders; in float32 most of these values would differ."""
    torch.manual_seed(0)
    norm = ResponseNormalisation(16)
    nn.init.normal_(norm.gamma)
    pixels = torch.rand(1, 16, 64 * 64).mul(255).round() * 0.0123
    normal = norm(pixels.view(1, 16, 64, 64)).view(1, 16, -1)
    for _ in range(3):
        order = torch.randperm(64 * 64)
        shuffled = norm(pixels[..., order].view(1, 16, 64, 64)).view(1, 16, -1)
        assert torch.equal(shuffled, normal[..., order])


def test_it_starts_from_the_enlarged_image():
    network = SAFMN(scale=3, width=4, blocks=1)
    nn.init.zeros_(network.to_img[0].weight)
    nn.init.zeros_(network.to_img[0].bias)
    x = torch.rand(1, 3, 16, 32)
    expected = F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(x), expected)


def test_the_published_size():
    assert sum(parameter.numel() for parameter in SAFMN().parameters()) == 237_000


def test_a_width_that_4_does_not_divide_is_refused():
    with pytest.raises(SparkirError, match="SAFMN needs a width that 4 divides, got 10"):
        SAFMN(width=10)
