import torch
import torch.nn.functional as F

from sparkir.models.span import SPAN


def test_is_the_network_of_the_paper():
    """Figure 2, written out over the layers."""
    torch.manual_seed(0)
    network = SPAN(scale=2, width=8, cat_width=5, blocks=3).eval()
    x = torch.rand(1, 3, 9, 7)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    shallow = y = network.conv_1.eval_conv((x - mean) * 255)
    firsts, outputs = [], []
    for block in (network.block_1, network.block_2, network.block_3):
        convolutions = [layer.eval_conv for layer in (block.c1_r, block.c2_r, block.c3_r)]
        firsts.append(F.silu(convolutions[0](y)))
        made = convolutions[2](F.silu(convolutions[1](firsts[-1])))
        y = (made + y) * (made.sigmoid() - 0.5)
        outputs.append(y)
    together = torch.cat([shallow, network.conv_2.eval_conv(y), outputs[0], firsts[-1]], dim=1)
    expected = F.pixel_shuffle(network.upsampler[0](network.conv_cat(together)), 2)
    torch.testing.assert_close(network(x), expected)


def test_the_published_sizes():
    counts = [
        sum(parameter.numel() for parameter in SPAN(**options).parameters())
        for options in ({}, {"cat_width": 20})
    ]
    assert counts == [150_688, 292_656 // 2]  # the second file holds weights and their average
