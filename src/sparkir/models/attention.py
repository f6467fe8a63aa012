"""Self-attention within windows of 8 x 8 pixels, plain or shifted by half a window.

"Swin Transformer" (Liu et al., ICCV 2021), section 3.2, for images of any size: windows and masks
follow from the height and width that come in.
"""

import torch
from torch import Tensor, nn

WINDOW_PX = 8
SHIFT_PX = WINDOW_PX // 2
_FAR = -100.0  # as published: what no softmax sees


class BiasedSoftmax(nn.Module):
    """Softmax over the last dimension of scores times a factor, plus biases and a mask.

    Scores (..., heads, n, m); each pair of tokens finds its bias in a table (entries, heads), at
    ``index`` (n, m).
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self, scores: Tensor, table: Tensor, index: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return weights that sum to 1; ``mask`` is 0, or below what any softmax sees."""
        scores = scores * self.factor + looked_up(table, index)
        return (scores if mask is None else scores + mask).softmax(-1)


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """(entries, heads) at (n, m) -> (heads, n, m)."""
    return table[index].permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Multi-head attention among the pixels of a window, with a bias for each relative position.

    (b, windows, 64, width) -> the same shape.
    """

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.split = (3, heads, width // heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax = BiasedSoftmax((width // heads) ** -0.5)
        positions = (2 * WINDOW_PX - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(positions, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        # Not persistent: a constant of the architecture.
        self.register_buffer("relative_position_index", _relative_positions(), persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attended features; ``mask`` (windows, 1, 64, 64) is added to the scores."""
        query, key, value = self._heads(self.qkv(windows))
        scores = query @ key.transpose(-2, -1)
        biases = self.relative_position_bias_table, self.relative_position_index
        weights = self.softmax(scores, *biases, mask)
        attended = (weights @ value).transpose(2, 3).flatten(3)
        result: Tensor = self.proj(attended)
        return result

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, windows, 64, 3 * width) -> three of (b, windows, heads, 64, width / heads)."""
        parts = qkv.unflatten(-1, self.split).permute(3, 0, 1, 4, 2, 5)
        return parts[0], parts[1], parts[2]


def _relative_positions() -> Tensor:
    """(64, 64), where in the table the bias of each pair of pixels is."""
    rows, columns = torch.meshgrid(torch.arange(WINDOW_PX), torch.arange(WINDOW_PX), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None, :] + WINDOW_PX - 1
    right = columns[:, None] - columns[None, :] + WINDOW_PX - 1
    index: Tensor = down * (2 * WINDOW_PX - 1) + right
    return index


def to_windows(x: Tensor, height: int, width: int) -> Tensor:
    """(b, height, width, c), multiples of 8 -> (b, windows, 64, c)."""
    down, right = height // WINDOW_PX, width // WINDOW_PX
    split: Tensor = x.unflatten(1, (down, WINDOW_PX)).unflatten(3, (right, WINDOW_PX))
    return split.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """(b, windows, 64, c) -> (b, height, width, c)."""
    down, right = height // WINDOW_PX, width // WINDOW_PX
    split: Tensor = windows.unflatten(1, (down, right)).unflatten(3, (WINDOW_PX, WINDOW_PX))
    return split.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)


def shift_mask(height: int, width: int, device: torch.device) -> Tensor:
    """(windows, 1, 64, 64): -100 between pixels that only the cyclic shift brought together."""
    regions = [_regions(size, device) for size in (height, width)]
    region = (3 * regions[0][:, None] + regions[1])[None, :, :, None]
    of_pixel = to_windows(region, height, width)[0]  # (windows, 64, 1)
    apart = of_pixel != of_pixel.transpose(1, 2)
    return (apart.float() * _FAR)[:, None]


def _regions(size: int, device: torch.device) -> Tensor:
    """(size,): 0, and 1 and 2 for the two halves of the last window, of a shifted image."""
    place = torch.arange(size, device=device)
    return (place >= size - WINDOW_PX).long() + (place >= size - SHIFT_PX).long()
