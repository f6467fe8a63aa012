"""What every network must do, whatever its architecture."""

import pytest
import torch

from sparkir.models.facts import restore
from sparkir.models.registry import build

SMALL = {
    "srcnn": {},
    "srcnn x1": {"scale": 1},
    "srcnn x3 luma": {"scale": 3, "channels": 1},
    "rfdn": {"width": 8, "blocks": 2},
    "rfdn x2": {"width": 8, "blocks": 1, "scale": 2, "value_range": 1.0},
    "rlfn": {"width": 8, "blocks": 2},
    "rlfn x2": {"width": 8, "inner_width": 6, "blocks": 1, "scale": 2, "value_range": 1.0},
    "bsrn": {"width": 16, "blocks": 2},
    "bsrn-s x2": {"width": 8, "blocks": 1, "scale": 2},
    "carn-m x2": {"width": 8, "scale": 2},
    "carn-m x3": {"width": 4, "scale": 3},
    "carn-m x4": {"width": 4, "scale": 4},
    "imdn": {"width": 8, "blocks": 3},
    "fmen": {"width": 8, "blocks": 1},
    "safmn": {"width": 8, "blocks": 2},
    "safmn x3": {"width": 4, "blocks": 1, "scale": 3},
    "span": {"width": 8, "cat_width": 4, "blocks": 2},
    "plainusr x2 u": {"scale": 2, "size": "u"},
    "plainusr x4 s": {"scale": 4, "size": "s"},
    "dncnn": {"depth": 4, "width": 4},
    "dncnn shallowest": {"depth": 2, "width": 4, "channels": 3},
    "edsr x1": {"width": 4, "blocks": 2, "scale": 1},
    "edsr x2": {"width": 4, "blocks": 1, "scale": 2, "res_scale": 0.1},
    "edsr x3": {"width": 4, "blocks": 2, "scale": 3},
    "edsr x4": {"width": 4, "blocks": 3, "scale": 4},
    "edsr x8": {"width": 4, "blocks": 1, "scale": 8},
    "mirnet": {"width": 8, "groups": 1, "blocks": 1},
    "nafnet": {"width": 4, "encoder_blocks": [1, 2], "middle_blocks": 1, "decoder_blocks": [1, 1]},
    "swinir x2": {"width": 4, "depths": [2], "heads": 2},
    "swinir x4": {"scale": 4, "width": 4, "depths": [1, 2], "heads": 1},
}
WINDOW_PX = dict.fromkeys(("rfdn", "rlfn", "bsrn", "bsrn-s"), 13)
WINDOW_PX |= {"plainusr": 12, "safmn": 32}
"""Margin in the halo for attention on a coarse grid, which is switched off to measure the reach."""
MASKS = ("excitate.weight", "c3_r.eval_conv.weight", "SA.spatial.conv.weight")
GLOBAL = ("esa.conv4.weight", "conv_du.2.weight", "body.3.body.0.weight", "sca.1.weight")
GLOBAL += ("fcs.0.weight", "fcs.1.weight", "fcs.2.weight")
GLOBAL += ("norm.gamma", "mfr.1.weight", "mfr.2.weight", "mfr.3.weight")
"""The last layers of what looks at the whole image, or at cells of it: without them, it gives the
same everywhere."""


@pytest.fixture(params=SMALL)
def network(request):
    torch.manual_seed(0)
    return build(request.param.split()[0], **SMALL[request.param]).eval()


def test_output_is_scale_times_the_input(network):
    facts = network.facts
    for batch, height, width in [(2, 16, 19), (1, 15, 15)]:
        restored = restore(network, torch.rand(batch, facts.channels, height, width))
        assert restored.shape == (
            batch,
            facts.channels,
            facts.scale * height,
            facts.scale * width,
        )


def test_traced_network_computes_the_same_at_another_size(network):
    traced = torch.fx.symbolic_trace(network)
    for size in [(16, 20), (31, 15)]:
        size = [side + -side % network.facts.size_multiple for side in size]
        x = torch.rand(1, network.facts.channels, *size) * network.facts.value_range
        torch.testing.assert_close(traced(x), network(x), rtol=0, atol=0)


def test_every_parameter_is_used(network):
    x = torch.rand(1, network.facts.channels, 32, 32) * network.facts.value_range
    network(x).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_taps_are_submodules_that_give_features_in_the_order_named(network):
    seen = []
    for name in network.facts.taps:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.append((name, output.dim()))
        )
    network(torch.rand(1, network.facts.channels, 16, 16))
    assert seen == [(name, 4) for name in network.facts.taps]
    assert seen


def test_halo_is_how_far_an_output_pixel_sees(network):
    reach = _reach_px(network)
    halo = network.facts.halo_px
    if network.facts.name in WINDOW_PX and not network.facts.exact_tiles:
        assert reach == halo - WINDOW_PX[network.facts.name]
    else:
        assert halo - 1 <= reach <= halo


def _reach_px(network):
    """The farthest input pixel, in rows or columns, with any influence on one pixel's outputs.

    Of the pixels of one cell of the size multiple, the one that sees farthest.
    """
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.double().abs() + 0.01  # nothing cancels, no ReLU is shut
        if name.endswith(GLOBAL):
            parameter.data.zero_()  # a constant mask
        if name.endswith(MASKS):
            parameter.data.mul_(1e-30)  # a mask that is not flat
    network.double()
    multiple, scale = network.facts.size_multiple, network.facts.scale
    first = -(-(network.facts.halo_px + 2) // multiple) * multiple
    size = 2 * first + multiple
    x = torch.full((1, network.facts.channels, size, size), 200.0, dtype=torch.float64)
    x.requires_grad_()
    restored, reach = network(x), 0
    for place in range(first, first + multiple):
        block = slice(place * scale, (place + 1) * scale)
        (gradient,) = torch.autograd.grad(restored[0, :, block, block].sum(), x, retain_graph=True)
        rows, columns = gradient.abs().sum((0, 1)).nonzero().T
        reach = max(reach, int((rows - place).abs().max()), int((columns - place).abs().max()))
    return reach
