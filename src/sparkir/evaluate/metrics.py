"""PSNR and SSIM as the papers compute them, with the convention that each number depends on.

All of them work on uint8 images, (h, w, 3) RGB: what a file holds and a viewer shows.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from sparkir.data.grey import full_luma
from sparkir.errors import SparkirError

_WINDOW_PX = 11
_WINDOW_SIGMA_PX = 1.5
_WHITE = 255.0
_SPACES = {"y": "Y studio range", "rgb": "RGB", "grey": "grey"}


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What is compared: which values, and without how much of the border.

    Super-resolution papers use Y and crop ``scale`` pixels; denoising, low-light and deblurring
    papers use RGB uncropped; deraining papers use Y uncropped; papers on grey images use them
    as they are.
    """

    space: Literal["y", "rgb", "grey"]
    """``y``: BT.601 luma of studio range, see :func:`luma`; ``rgb``: all three channels;
    ``grey``: luma of full range, which for a grey image is the image itself. An error of one
    level weighs 219 / 255 in ``y``: 1.32 dB more PSNR than in ``grey``."""

    crop_px: int
    """Pixels left out along each side of both images."""

    def __post_init__(self) -> None:
        """Refuse a convention that does not exist."""
        if self.space not in _SPACES:
            known = ", ".join(map(repr, _SPACES))
            raise SparkirError(f"a metric's space is one of {known}, got {self.space!r}")
        if self.crop_px < 0:
            raise SparkirError(f"a metric's crop_px must be 0 or more, got {self.crop_px}")

    @property
    def label(self) -> str:
        """The words to print beside a PSNR: ``PSNR-Y studio range, uint8, crop 4 px``."""
        return self.label_of("PSNR")

    def label_of(self, metric: str) -> str:
        """Return the words to print beside a figure of ``metric``, ``PSNR`` or ``SSIM``."""
        space = _SPACES[self.space]
        crop = f"crop {self.crop_px} px" if self.crop_px else "no crop"
        return f"{metric}-{space}, uint8, {crop}"


def to_uint8(image: Float[Tensor, "*b c h w"]) -> UInt8[np.ndarray, "*b h w c"]:
    """Return images in [0, 1] as the bytes to be shown: clipped, rounded half to even.

    Raises:
        SparkirError: the image holds NaN, which no byte can stand for.
    """
    levels = image.detach().float() * _WHITE
    if bool(levels.isnan().any()):
        raise SparkirError("the restored image holds NaN; the network or its weights are broken")
    rounded = levels.clamp(0, _WHITE).round().to(torch.uint8)
    return rounded.movedim(-3, -1).cpu().numpy()


def luma(image: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "h w"]:
    """Return BT.601 luma of studio range, 16 (black) to 235 (white).

    MATLAB's ``rgb2ycbcr`` rounds it to uint8; the Python evaluation codes of the field keep the
    fraction. So do we: this is what reproduces the reference values (bicubic on Set5, x2: the
    reference is 33.68 dB; this way gives 33.67 and rounding gives 33.64).
    """
    weights = np.array([65.481, 128.553, 24.966]) / _WHITE
    return 16.0 + image.astype(np.float64) @ weights


def psnr_db(
    output: UInt8[np.ndarray, "h w 3"],
    target: UInt8[np.ndarray, "h2 w2 3"],
    convention: Convention,
) -> float:
    """Return the peak signal-to-noise ratio in dB, peak 255; infinite for equal images.

    Raises:
        SparkirError: the sizes differ, or the crop leaves nothing.
    """
    error = _planes(output, convention) - _planes_like(target, output, convention)
    mean_square = float(np.mean(error**2))
    return float("inf") if mean_square == 0 else 10 * float(np.log10(_WHITE**2 / mean_square))


def ssim(
    output: UInt8[np.ndarray, "h w 3"],
    target: UInt8[np.ndarray, "h2 w2 3"],
    convention: Convention,
) -> float:
    """Return the structural similarity of Wang et al. (TIP 2004), 1 for equal images.

    An 11 x 11 Gaussian window of sigma 1.5, population covariances, averaged over the windows
    that lie wholly inside the image; for RGB the mean over the channels.

    Raises:
        SparkirError: the sizes differ, or the crop leaves less than 11 x 11 px.
    """
    outputs = _planes(output, convention)
    targets = _planes_like(target, output, convention)
    if min(outputs.shape[1:]) < _WINDOW_PX:
        raise SparkirError(
            f"SSIM needs at least {_WINDOW_PX} x {_WINDOW_PX} px after cropping "
            f"{convention.crop_px} px, but the image has {output.shape[0]} x {output.shape[1]}"
        )
    return float(np.mean([_ssim_of_plane(x, y) for x, y in zip(outputs, targets, strict=True)]))


def _ssim_of_plane(x: Float64[np.ndarray, "h w"], y: Float64[np.ndarray, "h w"]) -> float:
    stabiliser_mean, stabiliser_covariance = (0.01 * _WHITE) ** 2, (0.03 * _WHITE) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    brightness = (2 * mean_x * mean_y + stabiliser_mean) / (mean_x**2 + mean_y**2 + stabiliser_mean)
    structure = (2 * covariance + stabiliser_covariance) / (
        variance_x + variance_y + stabiliser_covariance
    )
    return float(np.mean(brightness * structure))


def _blur(plane: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "h-10 w-10"]:
    """Return Gaussian-weighted means over the windows inside; rows first, then columns."""
    distances = np.arange(_WINDOW_PX) - _WINDOW_PX // 2
    weights = np.exp(-(distances**2) / (2 * _WINDOW_SIGMA_PX**2))
    weights /= weights.sum()
    height, width = (side - _WINDOW_PX + 1 for side in plane.shape)
    rows = sum((w * plane[i : i + height] for i, w in enumerate(weights)), np.zeros(()))
    return sum((w * rows[:, i : i + width] for i, w in enumerate(weights)), np.zeros(()))


def _planes_like(
    target: UInt8[np.ndarray, "h2 w2 3"], output: UInt8[np.ndarray, "h w 3"], convention: Convention
) -> Float64[np.ndarray, "c _ _"]:
    if output.shape != target.shape:
        raise SparkirError(
            f"cannot compare images of different sizes: output {_size(output)}, target "
            f"{_size(target)} px; crop the target to a multiple of the scale first"
        )
    return _planes(target, convention)


def _planes(
    image: UInt8[np.ndarray, "h w 3"], convention: Convention
) -> Float64[np.ndarray, "c _ _"]:
    """Return the channels to be compared, (c, h, w), without the border."""
    crop = convention.crop_px
    height, width = image.shape[:2]
    if min(height, width) <= 2 * crop:
        raise SparkirError(f"a crop of {crop} px leaves nothing of an image of {_size(image)} px")
    inner = image[crop : height - crop, crop : width - crop]
    if convention.space == "y":
        return luma(inner)[None]
    if convention.space == "grey":
        return full_luma(inner)[None]
    return np.moveaxis(inner.astype(np.float64), -1, 0)


def _size(image: UInt8[np.ndarray, "h w 3"]) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
