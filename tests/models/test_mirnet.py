import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparkir.errors import SparkirError
from sparkir.models.checkpoint import load_weights, save_weights
from sparkir.models.mirnet import (
    DualAttention,
    MIRNet,
    MultiScaleBlock,
    SelectiveKernelFusion,
)
from sparkir.models.resample import BlurDown


def small(**options) -> MIRNet:
    return MIRNet(**{"width": 8, "groups": 1, "blocks": 1, **options}).eval()


def test_parameters_are_as_many_as_published():
    """The paper's text says 31.8 million; each unit counts once, whatever its number of calls."""
    with torch.device("meta"):
        count = sum(p.numel() for p in MIRNet().parameters())
    assert count == pytest.approx(31.8e6, rel=0.002)


def test_names_are_the_published_ones():
    names = set(small().state_dict())
    block = "body.0.body.0"
    assert {
        "conv_in.weight",
        "conv_out.weight",
        "body.0.body.1.weight",
        f"{block}.conv_out.weight",
        f"{block}.blocks.2.1.body.1.weight",
        f"{block}.blocks.0.0.SA.spatial.conv.weight",
        f"{block}.blocks.1.0.CA.conv_du.2.weight",
        f"{block}.blocks.1.1.conv1x1.weight",
        f"{block}.last_up.2.body.1.top.2.weight",
        f"{block}.down.8_4.body.0.top.5.weight",
        f"{block}.down.16_2.body.0.bot.1.weight",
        f"{block}.up.32_4.body.1.bot.1.weight",
        f"{block}.up.16_2.body.0.top.3.weight",
        f"{block}.selective_kernel.0.conv_du.1.weight",
        f"{block}.selective_kernel.2.fcs.2.weight",
    } <= names
    assert not any(name.endswith("bias") for name in names)


def test_published_files_load(tmp_path):
    source, network = small(), small()
    state = dict(source.state_dict())
    blur = torch.tensor([1.0, 2.0, 1.0]) / 4
    state["body.0.body.0.down.8_2.body.0.bot.0.filt"] = torch.outer(blur, blur).expand(8, 1, 3, 3)
    save_weights(state, tmp_path / "mirnet.safetensors", {})
    load_weights(network, tmp_path / "mirnet.safetensors")
    x = torch.rand(1, 3, 16, 12)
    torch.testing.assert_close(network(x), source(x))


def test_another_filter_is_refused():
    with pytest.raises(SparkirError, match="blur with another filter"):
        MIRNet.from_published({"body.top.4.filt": torch.full((8, 1, 3, 3), 1 / 9)})


def test_too_few_channels_are_refused():
    with pytest.raises(SparkirError, match="width >= 8"):
        MIRNet(width=4)


def test_one_unit_serves_both_columns():
    block = small().body[0].body[0]
    for stream in block.blocks:
        assert stream[0] is stream[1]


def test_the_weights_of_a_fusion_sum_to_one():
    fusion = SelectiveKernelFusion(8)
    x = torch.rand(2, 8, 5, 4)
    torch.testing.assert_close(fusion([x, x, x]), x)


def test_fusion_by_hand():
    """Equations of section 3.1, one image and channel at a time."""
    fusion = SelectiveKernelFusion(8, height=2)
    streams = [torch.rand(1, 8, 3, 4) for _ in range(2)]
    summary = (streams[0] + streams[1]).mean((2, 3))  # (1, 8)
    narrow = F.prelu(
        F.linear(summary, fusion.conv_du[0].weight[..., 0, 0]), fusion.conv_du[1].weight
    )
    logits = [F.linear(narrow, layer.weight[..., 0, 0])[0] for layer in fusion.fcs]
    expected = torch.empty(1, 8, 3, 4)
    for channel in range(8):
        share = torch.sigmoid(logits[0][channel] - logits[1][channel])
        mixed = streams[0][0, channel] * share + streams[1][0, channel] * (1 - share)
        expected[0, channel] = mixed
    torch.testing.assert_close(fusion(streams), expected)


def test_dual_attention_by_hand():
    """Section 3.2: a mask for each pixel, a factor for each channel, side by side."""
    unit = DualAttention(8)
    x = torch.randn(1, 8, 6, 5)
    residual = unit.body(x)
    pooled = torch.stack([residual.max(1).values, residual.mean(1)], 1)
    mask = F.conv2d(pooled, unit.SA.spatial.conv.weight, padding=2).sigmoid()
    squeezed = F.relu(F.linear(residual.mean((2, 3)), unit.CA.conv_du[0].weight[..., 0, 0]))
    factors = F.linear(squeezed, unit.CA.conv_du[2].weight[..., 0, 0]).sigmoid()
    both = torch.cat([residual * mask, residual * factors[..., None, None]], 1)
    expected = F.conv2d(both, unit.conv1x1.weight) + x
    torch.testing.assert_close(unit(x), expected)


def slow_block(block: MultiScaleBlock, x: torch.Tensor) -> torch.Tensor:
    """The grid as the authors walk it, everything computed where it is needed."""
    unit = [stream[0] for stream in block.blocks]
    sizes = {0: {1: "8_2", 2: "8_4"}, 1: {0: "16_2", 2: "16_2"}, 2: {0: "32_4", 1: "32_2"}}

    def resized(stream: torch.Tensor, source: int, target: int) -> torch.Tensor:
        if source == target:
            return stream
        return (block.down if target > source else block.up)[sizes[source][target]](stream)

    first = [unit[0](x)]
    first.append(unit[1](resized(first[0], 0, 1)))
    first.append(unit[2](resized(first[1], 1, 2)))
    second = [
        unit[level](block.selective_kernel[level]([resized(first[k], k, level) for k in range(3)]))
        for level in range(3)
    ]
    last = [second[0], block.last_up["1"](second[1]), block.last_up["2"](second[2])]
    return block.conv_out(block.selective_kernel[0](last)) + x


def test_the_grid_is_the_authors():
    block = MultiScaleBlock(8)
    x = torch.rand(1, 8, 12, 8)
    torch.testing.assert_close(block(x), slow_block(block, x))


def test_blurring_by_hand():
    x = torch.randn(1, 2, 6, 8)
    padded = nn.ReflectionPad2d(1)(x)
    weights = {(-1, -1): 1, (-1, 0): 2, (-1, 1): 1, (0, -1): 2, (0, 0): 4}
    weights |= {(-a, -b): w for (a, b), w in weights.items()}
    expected = torch.zeros(1, 2, 3, 4)
    for row in range(3):
        for column in range(4):
            for (down, right), weight in weights.items():
                seen = padded[:, :, 2 * row + 1 + down, 2 * column + 1 + right]
                expected[:, :, row, column] += weight / 16 * seen
    torch.testing.assert_close(BlurDown(2)(x), expected)
