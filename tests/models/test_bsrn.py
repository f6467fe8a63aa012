import torch
import torch.nn.functional as F
from torch import nn

from sparkir.models.bsrn import BSRN, BSRNS, Contrast


def test_the_image_fed_four_times_is_the_sum_of_the_weights():
    torch.manual_seed(0)
    network = BSRN(width=8, blocks=1)
    repeated = nn.Conv2d(12, 8, 1, bias=False)
    state = dict(network.state_dict()) | {"fea_conv.pw.weight": repeated.weight.detach()}
    network.load_state_dict(network.from_published(state))
    x = torch.rand(1, 3, 5, 6)
    torch.testing.assert_close(network.fea_conv.pw(x), repeated(torch.cat([x] * 4, dim=1)))


def test_the_channel_weights_of_the_small_one_are_folded_into_its_last_layer():
    torch.manual_seed(0)
    network = BSRNS(width=8, blocks=2)
    last = nn.Linear(8, 8)
    channel_weights = torch.randn(1, 8)
    state = dict(network.state_dict())
    state["B2.cw"] = channel_weights
    state["B2.conv_out.weight"], state["B2.conv_out.bias"] = last.weight.data, last.bias.data
    network.load_state_dict(network.from_published(state))
    x = torch.rand(1, 8, 5, 6)
    expected = last(x.permute(0, 2, 3, 1) * channel_weights).permute(0, 3, 1, 2)
    torch.testing.assert_close(network.B2.conv_out(x), expected)
    assert torch.equal(network.B1.conv_out.weight, state["B1.conv_out.weight"])


def test_its_own_weights_are_left_alone():
    for network in (BSRN(width=16, blocks=1), BSRNS(width=8, blocks=1)):
        state = dict(network.state_dict())
        translated = network.from_published(state)
        assert translated.keys() == state.keys()
        assert all(translated[name] is state[name] for name in state)


def test_a_block_is_that_of_the_paper():
    """Figure 3, written out over its layers."""
    torch.manual_seed(0)
    block = BSRN(width=16, blocks=1).B1
    x = torch.rand(1, 16, 20, 17)
    kept, y = [], x
    for distil, refine in ((block.c1_d, block.c1_r), (block.c2_d, block.c2_r)):
        kept.append(F.gelu(distil(y)))
        y = F.gelu(refine.dw(refine.pw(y)) + y)
    kept.append(F.gelu(block.c3_d(y)))
    y = F.gelu(block.c3_r(y) + y)
    y = block.c5(torch.cat([*kept, F.gelu(block.c4(y))], 1))
    esa = block.esa
    narrow = esa.conv1(y)
    coarse = F.gelu(esa.conv_max(F.max_pool2d(esa.conv2(narrow), 7, 3)))
    coarse = esa.conv3_(F.gelu(esa.conv3(coarse)))
    coarse = F.interpolate(coarse, (20, 17), mode="bilinear", align_corners=False)
    y = y * esa.conv4(coarse + esa.conv_f(narrow)).sigmoid()
    statistics = y.std((2, 3), correction=0, keepdim=True) + y.mean((2, 3), keepdim=True)
    y = y * block.cca.conv_du(statistics)
    torch.testing.assert_close(block(x), y + x)


def test_a_flat_image_has_a_finite_gradient():
    x = torch.full((1, 4, 16, 16), 0.5, requires_grad=True)
    Contrast()(x).sum().backward()
    assert x.grad.isfinite().all()


def test_the_order_of_the_pixels_does_not_show():
    """Libraries sum in different orders; in float32 half of these channels would differ."""
    torch.manual_seed(0)
    pixels = torch.rand(1, 16, 64 * 64).mul(255).round() * 0.0123
    statistics = Contrast()(pixels.view(1, 16, 64, 64))
    for _ in range(3):
        shuffled = pixels[..., torch.randperm(64 * 64)].view(1, 16, 64, 64)
        assert torch.equal(Contrast()(shuffled), statistics)
