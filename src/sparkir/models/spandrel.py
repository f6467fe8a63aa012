"""Networks that the package spandrel recognises from their checkpoints, as teachers.

It knows some forty architectures that are not here, finds out from the weights which one they are
of and with what options, and describes it; the description becomes the network's facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparkir.data.codec import one_line
from sparkir.errors import SparkirError
from sparkir.models.checkpoint import read_checkpoint, require_finite
from sparkir.models.facts import ModelFacts

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

SPANDREL = "spandrel"
"""What stands in the place of a network's name; see `recognised`."""
_HALO_PX = 64
_BROKEN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


class Recognised(nn.Module):
    """(b, c, h, w) in [0, 1] -> (b, c, s*h, s*w), clipped to [0, 1] as spandrel has it.

    No gradients: it can teach, but not be trained. It offers no taps to methods of features.
    """

    def __init__(self, descriptor: ImageModelDescriptor[nn.Module]) -> None:
        super().__init__()
        size = descriptor.size_requirements
        self.model = descriptor.model
        self.facts = ModelFacts(
            name=f"{descriptor.architecture.name} by spandrel",
            scale=descriptor.scale,
            channels=descriptor.output_channels,
            value_range=1.0,
            size_multiple=size.multiple_of,
            min_size_px=max(1, size.minimum),
            taps=(),
            halo_px=_HALO_PX,  # spandrel does not say how far a network looks
        )
        self._descriptor = [descriptor]  # its own notion of device and mode follows the model's

    def forward(self, x: Tensor) -> Tensor:
        """The restored image."""
        # One by one, as spandrel wants it: some networks get a map of noise that is made for one.
        restored = torch.cat([self._descriptor[0](image) for image in x.split(1)])
        # What comes out of inference mode could not be part of a loss.
        return restored if torch.is_inference_mode_enabled() else restored.clone()


def recognised(path: Path) -> Recognised:
    """The network that a checkpoint is of, by spandrel, in evaluation mode.

    Nothing in the file is executed; files are read as by `load_weights`.

    Raises:
        SparkirError: spandrel cannot be imported, does not recognise the weights or cannot load
            them, or the network is no restoration of images to images of as many channels.
    """
    content = dict(read_checkpoint(path))
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision for another torch
        raise SparkirError(
            f'the network "{SPANDREL}" needs the package, and a torchvision that fits this torch: '
            f"pip install 'sparkir[spandrel]' ({error})"
        ) from error
    try:
        state = spandrel.canonicalize_state_dict(content)
        descriptor = spandrel.ModelLoader().load_from_state_dict(state)
    except spandrel.UnsupportedModelError as error:
        raise SparkirError(
            f"spandrel recognises no architecture in {path}; is it one of a network that "
            "`sparkir models` lists, or of your own? Then name that"
        ) from error
    except _BROKEN as error:
        reason = one_line(error)[:200]
        raise SparkirError(f"spandrel cannot load {path}: {reason}; is the file whole?") from error
    name = descriptor.architecture.name
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise SparkirError(f"{path} is of {name}, which fills in masks and restores no images")
    if descriptor.input_channels != descriptor.output_channels:
        raise SparkirError(
            f"{path} is of {name} from {descriptor.input_channels} channels to "
            f"{descriptor.output_channels}; a teacher needs as many out as in"
        )
    require_finite(descriptor.model.state_dict(), path)
    return Recognised(descriptor).eval()
