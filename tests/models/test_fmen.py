import torch
import torch.nn.functional as F

from sparkir.models.fmen import FMEN


def test_attention_is_that_of_the_paper():
    """Figure 4, each re-parameterised block one convolution."""
    torch.manual_seed(0)
    attention = FMEN(width=8, blocks=1).warmup[1]
    x = torch.rand(1, 8, 9, 7)
    y = F.leaky_relu(attention.squeeze(x), 0.1)
    for block in attention.convs:
        y = block.conv2.rep_conv(F.leaky_relu(block.conv1.rep_conv(y), 0.1))
    mask = attention.excitate(F.leaky_relu(y, 0.1)).sigmoid()
    torch.testing.assert_close(attention(x), x * mask)


def test_the_published_size():
    assert sum(parameter.numel() for parameter in FMEN().parameters()) == 341_066
