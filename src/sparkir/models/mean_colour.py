"""The mean colour that super-resolution networks since EDSR take off the image and put back.

The published networks do it with two fixed 1x1 convolutions; here it is a constant, so that
quantizing a network leaves it exact.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor

from sparkir.errors import SparkirError

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""RGB in [0, 1], as published."""
_TOLERANCE = 0.002  # half a level of 255


def mean_colour(value_range: float) -> Tensor:
    """Return the mean colour (1, 3, 1, 1) in a network's value range."""
    return torch.tensor(DIV2K_MEAN).reshape(1, 3, 1, 1) * value_range


def take_shift(
    state: MutableMapping[str, Tensor], name: str, *, sign: int, value_range: float, network: str
) -> bool:
    """Take a published mean shift out of a state_dict; return whether there was one.

    Args:
        state: published weights by name; `name`.weight and `name`.bias are removed.
        name: of the convolution.
        sign: -1 where it takes the mean off, 1 where it puts it back.
        value_range: the white level of the network.
        network: how messages call it.

    Raises:
        SparkirError: it is another shift.
    """
    weight, bias = state.pop(f"{name}.weight", None), state.pop(f"{name}.bias", None)
    expected = sign * mean_colour(value_range).flatten()
    atol = _TOLERANCE * value_range
    for found, wanted in ((weight, torch.eye(3).reshape(3, 3, 1, 1)), (bias, expected)):
        if found is None:
            continue
        if found.shape != wanted.shape or not torch.allclose(
            found.float().cpu(), wanted, atol=atol
        ):
            raise SparkirError(
                f"these {network} weights shift colours by another mean ({name}) than the "
                f"published 0.4488, 0.4371, 0.4040 at [0, {value_range:g}]; they cannot be loaded "
                "into this network"
            )
    return bias is not None
