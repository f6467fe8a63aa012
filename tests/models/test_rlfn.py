import torch
import torch.nn.functional as F

from sparkir.models.rlfn import RLFN


def test_is_the_network_of_the_paper():
    """Figure 2, written out in functions of the parameters."""
    torch.manual_seed(0)
    network = RLFN(scale=2, width=8, inner_width=6, blocks=1).eval()
    weights = dict(network.named_parameters())

    def convolve(x, name, stride=1, padding=0):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)

    x = 255 * torch.rand(1, 3, 20, 17)
    shallow = convolve(x, "conv_1", padding=1)
    y = shallow
    for name in ("c1_r", "c2_r", "c3_r"):
        y = F.leaky_relu(convolve(y, f"block_1.{name}", padding=1), 0.05)
    y = convolve(y + shallow, "block_1.c5")
    narrow = convolve(y, "block_1.esa.conv1")
    coarse = F.max_pool2d(convolve(narrow, "block_1.esa.conv2", stride=2), 7, 3)
    coarse = convolve(coarse, "block_1.esa.conv3", padding=1)
    mask = F.interpolate(coarse, (20, 17), mode="bilinear", align_corners=False)
    mask = convolve(mask + convolve(narrow, "block_1.esa.conv_f"), "block_1.esa.conv4")
    y = convolve(y * mask.sigmoid(), "conv_2", padding=1) + shallow
    expected = F.pixel_shuffle(convolve(y, "upsampler.0", padding=1), 2)
    torch.testing.assert_close(network(x), expected)


def test_the_published_sizes():
    """Millions of parameters in the paper's tables: 0.543 and 0.470 for x4, 0.317 in NTIRE."""
    counts = [
        sum(parameter.numel() for parameter in RLFN(**options).parameters())
        for options in ({}, {"width": 48}, {"width": 46, "inner_width": 48, "blocks": 4})
    ]
    assert counts == [543_740, 470_208, 317_218]
