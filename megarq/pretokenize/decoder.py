"""Image shards to batches of equally large pictures, decoded in worker processes while the encoder is busy.

The tar is read here, in order; chunks of encoded pictures go to the workers, a bounded number of them at a time, and
come back as bytes of pixels in the order they went. What is decoded does not depend on the number of workers.

Shapes: b batch, R resolution.
"""

import os
import random
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megarq.data.faults import Faults, TooManyFaultsError
from megarq.data.image_shards import ImageSample, read_samples
from megarq.data.manifest import CodeSettings
from megarq.data.transforms import BadPicture, decode_rgb, find_transform
from megarq.errors import DataError
from megarq.parallel.initialization import derived_seed

CHUNK = 16
"""Pictures that a worker decodes at a time."""

Pixels = npt.NDArray[np.uint8]


class Batch(NamedTuple):
    """What the encoder takes in one pass; batches end with the block that they belong to."""

    samples: list[ImageSample]
    """b samples."""
    pictures: Pixels
    """Their pictures after the transform, RGB [b, R, R, 3]."""


class UnreadableShardError(DataError):
    """An image shard that cannot be read at all, which is no reason to leave the others undone."""


class Decoder:
    """Reads and decodes image shards, one after the other. A context manager, which ends the worker processes."""

    def __init__(self, settings: CodeSettings, workers: int = 0) -> None:
        """workers: processes that decode; 0 to decode in the reading thread. Raises: DataError for fewer than 0."""
        if workers < 0:
            raise DataError(f"--workers {workers}: use 0 to decode in this process, or the number of processes.")
        self._settings = settings
        self._in_flight = workers + 2 * -(-settings.batch_size // CHUNK)  # a batch to wait, another to be decoded
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # Not forked: a fork would hold this process's locks on shards, and go on holding them after its death.
            context = get_context("forkserver")
            context.set_forkserver_preload(["__main__", __name__])
            self._pool = ProcessPoolExecutor(workers, context, initializer=_live_and_die_with_parent)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def batches(self, source: str, faults: Faults) -> Generator[Batch, None, None]:
        """The readable pictures of a shard, in batches that do not cross a block.

        Raises: UnreadableShardError; DataError for too many bad samples or a worker that died.
        """
        pictures = self._pictures(source, faults)
        room = self._settings.block_size
        while batch := list(islice(pictures, min(room, self._settings.batch_size))):
            room = room - len(batch) or self._settings.block_size
            yield Batch([sample for sample, _ in batch], np.stack([picture for _, picture in batch]))

    def _pictures(self, source: str, faults: Faults) -> Iterator[tuple[ImageSample, Pixels]]:
        """The samples of a shard whose picture can be decoded, each with it [R, R, 3]."""
        for chunk, decoded in self._decoded(_readable(source, faults, self._settings.caption_field)):
            for sample, picture in zip(chunk, decoded, strict=True):
                if isinstance(picture, BadPicture):
                    faults.skip(source, sample.key, *picture)
                else:
                    yield sample, picture

    def _decoded(self, samples: Iterator[ImageSample]) -> Iterator[tuple[list[ImageSample], list[Pixels | BadPicture]]]:
        """Chunks of samples in order, each with its pictures, or what is wrong with them."""
        ours = self._settings
        waiting: deque[tuple[list[ImageSample], Future[list[Pixels | BadPicture]]]] = deque()
        while chunk := list(islice(samples, CHUNK)):
            images = [(sample.image, derived_seed(ours.seed, sample.key)) for sample in chunk]
            if self._pool is None:
                yield chunk, decode_pictures(images, ours.transform, ours.resolution)
                continue
            if len(waiting) == self._in_flight:
                yield _result(*waiting.popleft())
            try:
                waiting.append((chunk, self._pool.submit(decode_pictures, images, ours.transform, ours.resolution)))
            except BrokenProcessPool as error:
                raise _died() from error
        while waiting:
            yield _result(*waiting.popleft())


def _readable(source: str, faults: Faults, caption_field: str | None) -> Iterator[ImageSample]:
    """The samples of a shard. Raises: UnreadableShardError where reading fails; TooManyFaultsError."""
    try:
        yield from read_samples(source, faults, caption_field)
    except TooManyFaultsError:
        raise
    except DataError as error:
        raise UnreadableShardError(str(error)) from error


def _result(
    chunk: list[ImageSample], future: "Future[list[Pixels | BadPicture]]"
) -> tuple[list[ImageSample], list[Pixels | BadPicture]]:
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        raise _died() from error


def _died() -> DataError:
    return DataError(
        "--workers: a decoding process was killed or crashed, perhaps for want of memory. Run again with fewer of them."
    )


def decode_pictures(images: list[tuple[bytes, int]], transform: str, resolution: int) -> list[Pixels | BadPicture]:
    """Encoded pictures with their seeds to pixels [R, R, 3], or what is wrong with them."""
    decoded: list[Pixels | BadPicture] = []
    for image, seed in images:
        try:
            picture = find_transform(transform)(decode_rgb(image), resolution, random.Random(seed))
            decoded.append(np.asarray(picture, np.uint8))
        except DataError as error:
            decoded.append(BadPicture.of(error))
    return decoded


def _live_and_die_with_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it is killed: an idle worker would wait for it forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
