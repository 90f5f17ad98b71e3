"""Batches of pictures for training an RQ-VAE: endless, the same for any number of ranks, resumable at any sample.

tars, folders or an LMDB --open_images--> ImageSource [N] --permutation of (seed, epoch)--> global batches of B samples
rank r takes places r*B/ranks .. (r+1)*B/ranks - 1 of each: images [B/ranks, 3, R, R] float in [-1, 1]
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megarq.data.batches import batches_in_order, check_share
from megarq.data.faults import Faults
from megarq.data.image_sources import ImageSource
from megarq.data.order import IntArray, LoaderState, permutation
from megarq.data.transforms import TRANSFORMS, BadPicture, find_transform, transform_image
from megarq.errors import DataError
from megarq.parallel.initialization import derived_seed

_GOOD, _BAD = 1, 2

__all__ = ["TRANSFORMS", "ImageBatch", "ImageLoader"]


@dataclass
class ImageBatch:
    """One rank's share of a global batch of pictures."""

    images: Tensor
    """[B / ranks, 3, R, R] float in [-1, 1]."""
    state: LoaderState
    """Where the loader stands after this batch: start there to go on."""
    skipped: int
    """Pictures that cannot be used and that others stand in for here."""


class ImageLoader:
    """Endless batches of transformed pictures. The content depends on (seed, start) alone, not on ranks or workers."""

    def __init__(
        self,
        source: ImageSource,
        transform: str,
        resolution: int,
        global_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
        start: LoaderState | None = None,
        max_bad_rate: float = 0.01,
    ) -> None:
        """source: of pictures, as `open_images` finds them; transform: a name in TRANSFORMS.

        Raises: DataError for an unknown transform, a batch that ranks cannot share or, while loading, too many faults:
        each process judges the pictures that it has met, every one once, however often it comes.
        """
        find_transform(transform)
        self._share = check_share(global_batch_size, world_size)
        self._source = source
        self._transform, self._resolution = transform, resolution
        self._batch, self._rank, self._seed, self._workers = global_batch_size, rank, seed, workers
        self._start = (start or LoaderState()).position(len(self._source))
        self._faults = Faults(max_bad_rate, setting="data.max_bad_rate")
        self._met = bytearray(len(source))
        """Of each picture _GOOD or _BAD, as it was when it was met last."""
        self._skipped = 0
        self._order: tuple[int, IntArray] | None = None

    @property
    def samples_per_epoch(self) -> int:
        """Pictures in the source."""
        return len(self._source)

    def __iter__(self) -> Iterator[ImageBatch]:
        return batches_in_order(self._load, self._workers)

    def _load(self, number: int) -> ImageBatch:
        """Batch `number` after the start, for this rank."""
        first = self._start + number * self._batch
        mine = range(first + self._rank * self._share, first + (self._rank + 1) * self._share)
        self._skipped = 0
        images = torch.stack([self._load_image(position) for position in mine])
        state = LoaderState.at(first + self._batch, len(self._source))
        return ImageBatch(images, state, self._skipped)

    def _load_image(self, position: int) -> Tensor:
        """The picture at a place of the endless stream; a bad one is replaced by the next in its source."""
        epoch, place = divmod(position, len(self._source))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._source), self._seed, epoch))
        index = int(self._order[1][place])
        for _ in range(len(self._source)):
            found = self._image_or_fault(index, derived_seed(self._seed, epoch, index))
            before, self._met[index] = self._met[index], _GOOD if isinstance(found, Tensor) else _BAD
            if not before:
                self._faults.count_seen()
            if isinstance(found, Tensor):
                return found
            self._skipped += 1
            if before != _BAD:
                self._faults.skip(*self._source.name(index), *found)
            index = (index + 1) % len(self._source)
        raise DataError(
            f"none of {len(self._source)} pictures can be used, as the log tells. Check --data and data.transform."
        )

    def _image_or_fault(self, index: int, seed: int) -> Tensor | BadPicture:
        """A picture [3, R, R], or what is wrong with it."""
        try:
            return transform_image(self._source.read(index), self._transform, self._resolution, seed)
        except (OSError, DataError) as error:
            return BadPicture.of(error)
