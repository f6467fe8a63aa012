import pytest
import torch
import torch.nn.functional as F

from sparkir.models.attention import WindowAttention, from_windows, shift_mask, to_windows
from sparkir.models.checkpoint import load_weights, save_weights
from sparkir.models.swinir import SwinIR, SwinLayer


def small(**options) -> SwinIR:
    return SwinIR(**{"width": 4, "depths": [2, 1], "heads": 2, **options}).eval()


@pytest.mark.parametrize(("scale", "thousands"), [(2, 878), (3, 886), (4, 897)])
def test_parameters_are_as_many_as_published(scale, thousands):
    """Table 3 of the paper, which leaves out the tables of position biases."""
    with torch.device("meta"):
        parameters = dict(SwinIR(scale=scale).named_parameters())
    counts = [p.numel() for name, p in parameters.items() if "position_bias" not in name]
    assert round(sum(counts) / 1000) == thousands
    assert sum(p.numel() for p in parameters.values()) - sum(counts) == 24 * 15**2 * 6


def test_names_are_the_published_ones():
    layer = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"layers.{group}.residual_group.blocks.{n}" for group, n in ((0, 0), (0, 1), (1, 0))]
    modules = {f"{block}.{name}" for block in blocks for name in layer}
    modules |= {"conv_first", "patch_embed.norm", "norm", "conv_after_body", "upsample.0"}
    modules |= {"layers.0.conv", "layers.1.conv"}
    assert set(small().state_dict()) == {
        *(f"{name}.{kind}" for name in modules for kind in ("weight", "bias")),
        *(f"{block}.attn.relative_position_bias_table" for block in blocks),
    }


def test_published_files_load(tmp_path):
    source, network = small(), small()
    state = dict(source.state_dict())
    block = "layers.0.residual_group.blocks.1"
    state[f"{block}.attn_mask"] = shift_mask(64, 64, torch.device("cpu"))[:, 0]
    index = source.get_submodule(f"{block}.attn").relative_position_index
    state[f"{block}.attn.relative_position_index"] = index.clone()
    save_weights(state, tmp_path / "swinir.safetensors", {})
    load_weights(network, tmp_path / "swinir.safetensors")
    x = torch.rand(1, 3, 16, 8)
    torch.testing.assert_close(network(x), source(x))


def test_windows_hold_the_pixels_of_their_square():
    x = torch.randn(2, 16, 24, 3)
    windows = to_windows(x, 16, 24)
    assert windows.shape == (2, 6, 64, 3)
    assert torch.equal(windows[1, 4].view(8, 8, 3), x[1, 8:16, 8:16])
    assert torch.equal(from_windows(windows, 16, 24), x)


def slow_attention(layer: WindowAttention, pixels: torch.Tensor, places: torch.Tensor):
    """Of pixels (n, width) at places (n, 2), each with every one."""
    _, heads, side = layer.split
    query, key, value = layer.qkv(pixels).view(-1, 3, heads, side).permute(1, 2, 0, 3)
    away = places[:, None] - places[None, :] + 7
    bias = layer.relative_position_bias_table[away[..., 0] * 15 + away[..., 1]]  # (n, n, heads)
    result = []
    for head in range(heads):
        scores = query[head] @ key[head].T / side**0.5 + bias[..., head]
        result.append(scores.softmax(1) @ value[head])
    return layer.proj(torch.cat(result, 1))


@pytest.mark.parametrize("shifted", [False, True])
def test_a_layer_by_hand(shifted):
    """A shifted window at the border holds the pixels that are in the image, and no others."""
    layer = SwinLayer(4, 2, shifted=shifted)
    torch.nn.init.normal_(layer.attn.relative_position_bias_table)
    x = torch.randn(1, 16, 24, 4)
    normal = layer.norm1(x)
    attended = torch.zeros_like(x)
    shift = 4 if shifted else 0
    for top in range(-shift, 16, 8):
        for left in range(-shift, 24, 8):
            rows = slice(max(top, 0), min(top + 8, 16))
            columns = slice(max(left, 0), min(left + 8, 24))
            pixels = normal[0, rows, columns]
            height, width = pixels.shape[:2]
            places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
            found = slow_attention(layer.attn, pixels.reshape(-1, 4), places)
            attended[0, rows, columns] = found.view(height, width, 4)
    middle = x + attended
    wide = F.gelu(F.linear(layer.norm2(middle), layer.mlp.fc1.weight, layer.mlp.fc1.bias))
    expected = middle + F.linear(wide, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
    torch.testing.assert_close(layer(x, shift_mask(16, 24, x.device)), expected)


def test_the_mean_colour_is_put_back():
    """Without a last layer, the network gives the data set's mean."""
    network = small()
    torch.nn.init.zeros_(network.upsample[0].weight)
    torch.nn.init.zeros_(network.upsample[0].bias)
    restored = network(torch.rand(1, 3, 8, 8))
    expected = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert torch.equal(restored, expected)
