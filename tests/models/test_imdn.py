import torch
import torch.nn.functional as F

from sparkir.models.imdn import IMDN


def test_a_block_is_that_of_the_paper():
    """Figure 2 without its attention: split 1/4 and 3/4, refine the latter, three times."""
    torch.manual_seed(0)
    block = IMDN(width=8, blocks=1).model[1].sub[0]
    x = torch.rand(1, 8, 9, 7)
    kept, rest = [], x
    for convolution in (block.conv1[0], block.conv2[0], block.conv3[0]):
        part, rest = F.leaky_relu(convolution(rest), 0.05).split([2, 6], dim=1)
        kept.append(part)
    expected = x + block.conv1x1(torch.cat([*kept, block.conv4(rest)], dim=1))
    torch.testing.assert_close(block(x), expected)


def test_the_published_size():
    assert sum(parameter.numel() for parameter in IMDN().parameters()) == 893_936
