"""The scores of a network, or of anything else that restores images, on a set of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Protocol, runtime_checkable

import numpy as np
from torch import nn

from sparkir.errors import SparkirError
from sparkir.evaluate.infer import restore_image
from sparkir.evaluate.metrics import Convention, psnr_db, ssim
from sparkir.evaluate.perceptual import LpipsMetric

Restorer = Callable[[np.ndarray], np.ndarray]
"""Takes a uint8 (h, w, 3) image and returns the restored uint8 (s*h, s*w, 3) one."""


@runtime_checkable
class ImagePairs(Protocol):
    """A set of degraded images and what they should look like."""

    @property
    def names(self) -> Sequence[str]:
        """One name for each pair."""

    def __len__(self) -> int:
        """Return the number of pairs."""

    def pair(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Return the degraded image and the ground truth, both uint8 (h, w, 3)."""


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """The figures of one image; the convention they were computed by is the caller's."""

    name: str
    psnr_db: float
    ssim: float
    lpips: float | None = None
    """None where it was not asked for."""


def evaluate(
    network: nn.Module | Restorer,
    pairs: ImagePairs,
    convention: Convention,
    *,
    lpips: LpipsMetric | None = None,
) -> list[ImageScore]:
    """Return the scores of each image, in the order of the pairs.

    Args:
        network: a network with facts, which is run by
            :func:`~sparkir.evaluate.infer.restore_image`; or any function from the uint8 image
            to the restored one, such as an ONNX Runtime session or a bicubic resize.
        pairs: a validation set of :mod:`sparkir.data.pairs` or anything like it.
        convention: printed beside the figures; see :class:`Convention`.
        lpips: also computed when given; the convention does not apply to it.

    Raises:
        SparkirError: there are no pairs, or an output cannot be compared with its ground truth;
            the message begins with the image's name.
    """
    if not len(pairs):
        raise SparkirError("there are no images to evaluate; check the data folder")
    restorer = partial(restore_image, network) if isinstance(network, nn.Module) else network
    return [
        _score(restorer, name, *pairs.pair(index), convention, lpips)
        for index, name in enumerate(pairs.names)
    ]


@dataclass(frozen=True)
class Share:
    """The part of the pairs that falls to one of several processes: every `ranks`-th."""

    pairs: ImagePairs
    rank: int
    ranks: int

    @property
    def names(self) -> Sequence[str]:
        """One name for each of its pairs."""
        return self.pairs.names[self.rank :: self.ranks]

    def __len__(self) -> int:
        """Return the number of its pairs; there may be none."""
        return len(self.names)

    def pair(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Return one of its pairs."""
        return self.pairs.pair(self.rank + index * self.ranks)


def joined(shares: Sequence[Sequence[ImageScore]]) -> list[ImageScore]:
    """Return the scores of all shares in the order of the pairs."""
    rounds = zip_longest(*shares)
    return [score for together in rounds for score in together if score is not None]


def mean(scores: Sequence[ImageScore]) -> ImageScore:
    """Return the average over images, named ``mean``; PSNR is averaged in dB, as papers do."""
    if not scores:
        raise SparkirError("there are no scores to average; evaluate at least one image")
    return ImageScore(
        name="mean",
        psnr_db=sum(score.psnr_db for score in scores) / len(scores),
        ssim=sum(score.ssim for score in scores) / len(scores),
        lpips=_mean_lpips(scores),
    )


def _mean_lpips(scores: Sequence[ImageScore]) -> float | None:
    known = [score.lpips for score in scores if score.lpips is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def _score(
    restorer: Restorer,
    name: str,
    lq: np.ndarray,
    gt: np.ndarray,
    convention: Convention,
    lpips: LpipsMetric | None,
) -> ImageScore:
    try:
        output = restorer(lq)
        return ImageScore(
            name=name,
            psnr_db=psnr_db(output, gt, convention),
            ssim=ssim(output, gt, convention),
            lpips=None if lpips is None else lpips(output, gt),
        )
    except SparkirError as error:
        raise SparkirError(f"{name}: {error}") from error
