"""A network applied to a whole image file's pixels, as a user would see it."""

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import nn

from sparkir.data.degrade import bicubic_resize
from sparkir.data.grey import full_luma
from sparkir.evaluate.metrics import luma, to_uint8
from sparkir.models.facts import ModelFacts, facts_of, restore
from sparkir.models.modes import device_of as device_of
from sparkir.models.modes import evaluating as evaluating

_STUDIO_SWING = 219.0  # levels between black (16) and white (235)


def restore_image(
    network: nn.Module, lq: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "sh sw 3"]:
    """Restore one RGB image in a single piece, on the device of the network's weights.

    A 1-channel network restores the luma, of the range that its facts name, and the colours
    come from the bicubically enlarged image, as in the papers: the same change of luma is added
    to its red, green and blue, which leaves both chroma channels of BT.601 as they were.

    The network runs in evaluation mode and keeps the mode it had.

    Raises:
        SparkirError: the image is too small for the network, or the output is NaN.
    """
    facts = facts_of(network)
    if facts.channels == 1:
        return _restore_luma(network, lq, facts)
    return to_uint8(_run(network, lq.astype(np.float32) / 255))


def _restore_luma(
    network: nn.Module, lq: UInt8[np.ndarray, "h w 3"], facts: ModelFacts
) -> UInt8[np.ndarray, "sh sw 3"]:
    enlarged = bicubic_resize(lq, scale=facts.scale, border="replicate") if facts.scale > 1 else lq
    plane = _luma_like(lq, facts)[..., None].astype(np.float32) / 255
    restored = _run(network, plane)[0].double().cpu().numpy() * 255
    change = restored - _luma_like(enlarged, facts)
    if facts.luma_range == "studio":
        change *= 255 / _STUDIO_SWING
    return to_uint8(torch.from_numpy((enlarged + change[..., None]) / 255).movedim(-1, 0))


def _luma_like(image: UInt8[np.ndarray, "h w 3"], facts: ModelFacts) -> Float64[np.ndarray, "h w"]:
    """Return the image's luma in the range that the network was trained on."""
    if facts.luma_range == "studio":
        return luma(image)
    return full_luma(image)


def _run(network: nn.Module, lq: np.ndarray) -> torch.Tensor:
    """Return the restored (c, sh, sw) for (h, w, c) in [0, 1]."""
    batch = torch.from_numpy(lq).movedim(-1, 0)[None].to(device_of(network))
    with evaluating(network), torch.inference_mode():
        return restore(network, batch)[0]
