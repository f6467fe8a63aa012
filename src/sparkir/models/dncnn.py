"""DnCNN, the plain residual denoiser (Zhang et al., TIP 2017).

"Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising",
arXiv 1608.03981, with the batch normalisation folded into the convolutions, as in the weights
that KAIR publishes (``dncnn_15/25/50``: grey, depth 17), whose parameter names are kept.
"""

from torch import Tensor, nn

from sparkir.errors import SparkirError
from sparkir.models.facts import ModelFacts, thirds


class DnCNN(nn.Module):
    """DnCNN: (b, channels, h, w) in [0, 1] -> the same shape; the network predicts the noise.

    Args:
        depth: number of 3x3 convolutions, at least 2.
        width: channels of the features.
        channels: 1 (grey) or 3 (RGB).
    """

    def __init__(self, *, depth: int = 17, width: int = 64, channels: int = 1) -> None:
        super().__init__()
        if depth < 2:
            raise SparkirError(f"DnCNN needs depth >= 2 (a first and a last layer), got {depth}")
        self.facts = ModelFacts(
            name="dncnn",
            scale=1,
            channels=channels,
            value_range=1.0,
            taps=thirds([f"model.{2 * number + 1}" for number in range(depth - 1)]),
            halo_px=depth,
        )
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image less the predicted noise; not clipped."""
        noise: Tensor = self.model(x)
        return x - noise
