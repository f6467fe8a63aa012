"""Degraded and clean images side by side: whole for evaluation, cropped in batches for training."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from sparkir.data.degrade import Degradation, mod_crop
from sparkir.data.grey import OfGrey, to_grey
from sparkir.data.images import ImageStore, Progress
from sparkir.data.matching import PairFiles, checked_scale, size_text
from sparkir.data.outputs import OutputStore, loaded
from sparkir.errors import SparkirError

Pair = tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "H W 3"]]
Batch = tuple[Tensor, ...]
"""lq (b, 3, p, p) and gt (b, 3, P, P), uint8; perhaps what the teacher made of lq, float32."""


class PairStore:
    """Pairs of a degraded image (lq) and its ground truth (gt), ``scale`` times larger.

    Attributes:
        names: of the pairs; of one made from files, what its images are called.
        scale: side of gt / side of lq, exactly, for every pair.
        skipped: one message for each file that could not be read.
        sources: the ground truths' files.
        inputs: for people, what the network is given.
        identity: files and degradation in one word; "" if degraded images are drawn anew each time.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        gt: Sequence[UInt8[np.ndarray, "_H _W 3"]],
        lq: Sequence[UInt8[np.ndarray, "_h _w 3"]] | Degradation,
        scale: int,
        skipped: Sequence[str] = (),
        sources: Sequence[Path] = (),
        inputs: str = "as given",
        identity: str = "",
    ) -> None:
        """Hold images that fit already; `from_images` and `from_files` make them fit."""
        assert len(names) == len(gt) > 0
        self.names = tuple(names)
        self.scale = scale
        self.skipped = tuple(skipped)
        self.sources = tuple(sources)
        self.inputs, self.identity = inputs, identity
        self._gt = tuple(gt)
        # Asked once: whether an object follows a protocol takes as long as cutting a crop.
        self._degradation = lq if isinstance(lq, Degradation) else None
        self._lq = [] if isinstance(lq, Degradation) else lq

    @classmethod
    def from_images(
        cls,
        paths: Sequence[Path],
        degradation: Degradation,
        *,
        cache: Path,
        grey: bool = False,
        skip_broken: bool = False,
        progress: Progress | None = None,
    ) -> "PairStore":
        """Degrade clean images, cropped at the bottom and right to multiples of the scale.

        A fixed degradation is computed once for each whole image and kept in ``cache``; a random
        one is drawn anew for each training crop, and repeatably for whole images. With ``grey``
        the images are made grey (see `to_grey`) before they are degraded. ``progress`` counts the
        decoded images, then from the start again the degraded ones.

        Raises:
            SparkirError: as `ImageStore.build`, or an image is smaller than the scale.
        """
        images = ImageStore.build(paths, cache=cache, skip_broken=skip_broken, progress=progress)
        if grey:
            images, degradation = _grey(images), OfGrey(degradation)
        scale = degradation.scale
        for name, image in zip(images.names, images, strict=True):
            if min(image.shape[:2]) < scale:
                raise SparkirError(
                    f"image {name} is only {size_text(image)}, for scale {scale}; remove it"
                )
        gt = [mod_crop(image, scale) for image in images]
        options: dict[str, Any] = {"names": images.names, "gt": gt, "scale": scale}
        options |= {"skipped": images.skipped, "sources": paths, "inputs": str(degradation)}
        if not degradation.fixed:
            return cls(lq=degradation, **options)
        lq = _degraded(images, degradation, progress)
        return cls(lq=list(lq), identity=lq.folder.name, **options)

    @classmethod
    def from_files(
        cls,
        files: Sequence[PairFiles],
        *,
        scale: int | None = None,
        cache: Path,
        grey: bool = False,
        skip_broken: bool = False,
        progress: Progress | None = None,
    ) -> "PairStore":
        """Take pairs as they are, of files with different names.

        ``scale`` is found from the sizes when not given. With ``grey`` both sides are made grey.
        With ``skip_broken``, a pair of which either file cannot be read is left out.
        ``progress`` counts the inputs, then from the start again the targets.

        Raises:
            SparkirError: as `ImageStore.build`, or the sides of a target are not ``scale`` times
                those of its input.
        """
        names = [pair.name for pair in files]
        inputs, targets = (
            ImageStore.build(
                paths, cache=cache, names=names, skip_broken=skip_broken, progress=progress
            )
            for paths in ([pair.input for pair in files], [pair.target for pair in files])
        )
        skipped = inputs.skipped + targets.skipped
        if grey:
            inputs, targets = _grey(inputs), _grey(targets)
        lq = dict(zip(inputs.names, inputs, strict=True))
        gt = {n: image for n, image in zip(targets.names, targets, strict=True) if n in lq}
        if not gt:
            raise SparkirError(f"not one whole pair could be read: {skipped[0]}")
        for name, target in gt.items():
            scale = checked_scale(name, lq[name], target, scale)
        assert scale is not None
        return cls(
            names=list(gt),
            gt=list(gt.values()),
            lq=[lq[name] for name in gt],
            scale=scale,
            skipped=skipped,
            sources=[pair.target for pair in files],
            identity=f"{inputs.folder.name} {targets.folder.name}",
        )

    def __len__(self) -> int:
        return len(self._gt)

    def pair(self, index: int) -> Pair:
        """One whole pair (lq, gt), RGB, 0..255; the same pixels each time it is asked for."""
        gt = self._gt[index]
        if self._degradation is not None:
            return self._degradation(gt, _rng_of(self.names[index])), gt
        return self._lq[index], gt

    @cached_property
    def content(self) -> str:
        """A hash of all pixels, wherever their files lie and whatever they are called."""
        known = hashlib.sha256()
        for image in (image for index in range(len(self)) for image in self.pair(index)):
            known.update(f"{image.shape}".encode())
            known.update(np.ascontiguousarray(image).data)
        return known.hexdigest()[:16]

    @property
    def random(self) -> bool:
        """Whether each crop is degraded anew."""
        return self._degradation is not None

    def lq_size(self, index: int) -> tuple[int, int]:
        """Height and width of one degraded image, in pixels."""
        height, width = self._gt[index].shape[:2]
        return height // self.scale, width // self.scale

    def crop(
        self, index: int, *, top: int, left: int, side_px: int, rng: np.random.Generator
    ) -> Pair:
        """A square of one pair, placed and measured in pixels of lq.

        A random degradation is drawn from ``rng`` for the crop alone.
        """
        rows, columns = (_span(start, side_px) for start in (top, left))
        gt = self._gt[index][tuple(_span(start, side_px, self.scale) for start in (top, left))]
        if self._degradation is not None:
            return self._degradation(gt, rng), gt
        return self._lq[index][rows, columns], gt


class _Crop(NamedTuple):
    """What is drawn for one crop."""

    image: int
    top: int
    left: int
    seed: int
    """Of a random degradation, which only the process that cuts the crop computes."""
    orientation: int


class PatchSampler:
    """Endless batches of random crops; every image is drawn once before any is drawn again.

    Large and small images count alike. Everything random comes from one generator, so that equal
    seeds give equal batches, and a saved state resumes bit for bit, in the middle of an epoch too.
    Processes that share a batch draw all of it alike and cut out their own crops alone: batches
    and states are the same for any number of them.

    Attributes:
        epoch: how many times all images have been drawn (the current round included).
    """

    def __init__(
        self,
        pairs: PairStore,
        *,
        patch_px: int,
        batch: int,
        seed: int,
        augment: bool = True,
        outputs: OutputStore | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Crops of ``patch_px`` x ``patch_px`` pixels of lq, ``batch`` of them at a time.

        ``augment`` flips and transposes each crop into one of eight orientations. ``outputs`` holds
        what a teacher made of each lq; it is cropped and turned like gt. Of ``ranks`` processes
        that share a batch, this is number ``rank``, from 0.

        Raises:
            SparkirError: an image is smaller than the patch, or patch or batch is below 1.
        """
        if min(patch_px, batch) < 1:
            raise SparkirError(f"patch is {patch_px} px and batch {batch}; both must be at least 1")
        for index, name in enumerate(pairs.names):
            height, width = pairs.lq_size(index)
            if min(height, width) < patch_px:
                raise SparkirError(
                    f"image {name} is {width}x{height} px when degraded, smaller than the patch of "
                    f"{patch_px} px; make the patch smaller or remove the image"
                )
        assert batch % ranks == 0, "every process needs as many crops as the others"
        self.epoch = 0
        self._pairs = pairs
        self._patch_px = patch_px
        self._batch = batch
        self._augment = augment
        self._outputs = outputs
        share = batch // ranks
        self._own_rows = range(rank * share, (rank + 1) * share)
        self._rng = np.random.Generator(np.random.Philox(seed))
        self._order: list[int] = []  # the images of this epoch, as they will be drawn
        self._position = 0  # how many of them have been drawn

    def next(self) -> Batch:
        """The next batch: lq and gt, uint8 RGB, 0..255; with ``outputs`` also those, float32.

        It holds this process's share.
        """
        drawn = [self._draw() for _ in range(self._batch)]
        cut = [self._cut(drawn[row]) for row in self._own_rows]
        lq, gt, *outputs = (_stacked(patches) for patches in zip(*cut, strict=True))
        numbers = (torch.from_numpy(loaded(patches)) for patches in outputs)
        return torch.from_numpy(lq), torch.from_numpy(gt), *numbers

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is, as ints, a list of ints, and strings."""
        return {
            "images": self._images,
            "epoch": self.epoch,
            "order": list(self._order),
            "position": self._position,
            # As text, because the generator's 64-bit words are unsigned.
            "rng": json.dumps(self._rng.bit_generator.state, default=np.ndarray.tolist),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            SparkirError: the state is of a sampler of other images.
        """
        if state["images"] != self._images:
            raise SparkirError(
                "the training images are not those of the saved run; restore them to resume, "
                "or start a new run"
            )
        self.epoch = state["epoch"]
        self._order = list(state["order"])
        self._position = state["position"]
        self._rng.bit_generator.state = json.loads(state["rng"])

    def _draw(self) -> "_Crop":
        index = self._next_image()
        height, width = self._pairs.lq_size(index)
        return _Crop(
            image=index,
            top=int(self._rng.integers(height - self._patch_px, endpoint=True)),
            left=int(self._rng.integers(width - self._patch_px, endpoint=True)),
            seed=int(self._rng.integers(2**63)) if self._pairs.random else 0,
            orientation=int(self._rng.integers(8)) if self._augment else 0,
        )

    def _cut(self, crop: "_Crop") -> list[np.ndarray]:
        """One crop of everything, (h, w, 3) each."""
        side_px, scale = self._patch_px, self._pairs.scale
        rng = self._rng  # not drawn from, unless each crop has a generator of its own
        if self._pairs.random:
            rng = np.random.Generator(np.random.Philox(crop.seed))
        top, left = crop.top, crop.left
        patches = list(self._pairs.crop(crop.image, top=top, left=left, side_px=side_px, rng=rng))
        if self._outputs is not None:
            whole = self._outputs[crop.image]
            patches.append(whole[_span(top, side_px, scale), _span(left, side_px, scale)])
        return [_oriented(patch, crop.orientation) for patch in patches]

    def _next_image(self) -> int:
        if self._position == len(self._order):
            self._order = self._rng.permutation(len(self._pairs)).tolist()
            self._position = 0
            self.epoch += 1
        self._position += 1
        return self._order[self._position - 1]

    @cached_property
    def _images(self) -> str:
        facts = [(name, *self._pairs.lq_size(i)) for i, name in enumerate(self._pairs.names)]
        return hashlib.sha256(json.dumps([self._pairs.scale, facts]).encode()).hexdigest()


def _stacked(patches: Sequence[np.ndarray]) -> np.ndarray:
    """(h, w, 3) each -> (b, 3, h, w), contiguous."""
    height, width, channels = patches[0].shape
    batch = np.empty((len(patches), channels, height, width), dtype=patches[0].dtype)
    for row, patch in zip(batch, patches, strict=True):
        row[:] = patch.transpose(2, 0, 1)
    return batch


def _oriented(patch: np.ndarray, orientation: int) -> np.ndarray:
    """One of the eight flips and transposes of a square (a view); 0 changes nothing."""
    if orientation & 1:
        patch = patch[::-1]
    if orientation & 2:
        patch = patch[:, ::-1]
    if orientation & 4:
        patch = patch.transpose(1, 0, 2)
    return patch


def _grey(images: ImageStore) -> ImageStore:
    return images.derive(
        lambda _, image: to_grey(image), key="grey", bytes_needed=sum(i.size for i in images)
    )


def _degraded(
    images: ImageStore, degradation: Degradation, progress: Progress | None
) -> ImageStore:
    assert type(degradation).__repr__ is not object.__repr__, "repr must name the output"
    scale = degradation.scale
    return images.derive(
        lambda name, image: degradation(mod_crop(image, scale), _rng_of(name)),
        key=repr(degradation),
        bytes_needed=sum(image.size for image in images) // scale**2,
        progress=progress,
    )


def _rng_of(name: str) -> np.random.Generator:
    """A generator that is the same for the same image name, on every machine."""
    return np.random.Generator(np.random.Philox(list(name.encode())))


def _span(start: int, side: int, scale: int = 1) -> slice:
    """`side` pixels of lq from `start`, in pixels of an image `scale` times larger."""
    return slice(start * scale, (start + side) * scale)
