"""Captioned images in webdataset tars: reading samples in order, and an index for reading them in any order.

    00000.tar:  cat7.jpg  cat7.txt  cat7.json  dog1.png  dog1.txt  dog1.cls ...

Consecutive members with the same key (the name up to the first dot of its last part) are one sample: an image
(.jpg .jpeg .png .webp), its caption (.txt), more of them (.json: `captions`, a list, or `caption`), a class (.cls).
"""

import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarq.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_READ_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls")


@dataclass(frozen=True)
class ImageSample:
    """One captioned image, not yet decoded."""

    key: str
    """Name of the sample in its shard."""
    image: bytes
    """The encoded picture."""
    captions: list[str]
    """All captions of the picture; may be empty."""
    label: int | None
    """Class of the picture, if any."""
    shard: str
    """The tar it comes from."""


class BadSamples:
    """Counts the samples that cannot be used; they are logged and skipped until there are too many."""

    def __init__(self, max_rate: float = 0.01, grace: int = 1000) -> None:
        """max_rate: largest share of bad samples; while fewer than `grace` samples are seen, it is taken of `grace`.

        Raises: DataError for a rate outside 0 <= max_rate < 1.
        """
        if not 0 <= max_rate < 1:
            raise DataError(f"--max-bad-rate {max_rate}: use a share from 0 up to, but not including, 1.")
        self.max_rate = max_rate
        self.grace = grace
        self.seen = 0
        """Samples seen, good and bad."""
        self.bad = 0
        """Samples skipped."""

    def count_seen(self, samples: int = 1) -> None:
        """Count samples, good or bad, as seen."""
        self.seen += samples

    def skip(self, shard: str, key: str, reason: str) -> None:
        """Log and count one bad sample. Raises: DataError where the rate is exceeded."""
        self.bad += 1
        logger.warning("skipped %s in %s: %s", key, shard, reason)
        self._check(max(self.seen, self.grace), f"last: {key} in {shard}: {reason}")

    def finish(self) -> None:
        """Judge the whole, however small. Raises: DataError where the rate is exceeded."""
        self._check(self.seen, "each is named in the log")

    def _check(self, seen: int, detail: str) -> None:
        if self.bad > self.max_rate * seen:
            raise DataError(
                f"{self.bad} bad samples of {self.seen} seen, above the accepted rate of {self.max_rate} ({detail}). "
                "Mend or remove them, or accept more (--max-bad-rate, or data.max_bad_rate of a run)."
            )


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a tar member, as webdataset has it: split at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


@contextmanager
def _open_tar(shard: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(shard, "r:") as tar:
            yield tar
    except FileNotFoundError as error:
        raise DataError(f"missing shard {shard!r}. Check the path, or the range of the pattern.") from error
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"shard {shard!r} cannot be read as an uncompressed tar ({error}). Copy or make it again."
        ) from error


def tar_members(shard: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Members of a shard that a sample can hold, in order, each with the open tar to extract it from.

    Raises: DataError for a missing shard, one that is no tar, and a torn one, naming the last whole member's key. The
    end-of-archive block must be there: a tar cut between two members looks whole but for it.
    """
    with _open_tar(shard) as tar:
        last = "none"
        while True:
            try:
                member = tar.next()
            except tarfile.TarError as error:
                raise _torn(shard, last, str(error)) from error
            if member is None:
                break
            _, extension = split_name(member.name)
            if member.isreg() and extension in _READ_EXTENSIONS:
                yield member, tar
            last = split_name(member.name)[0]
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise _torn(shard, last, "no end-of-archive block")


def _torn(shard: str, key: str, reason: str) -> DataError:
    return DataError(
        f"shard {shard!r} is truncated or damaged after key {key!r} ({reason}). Copy or make it again, or leave it out."
    )


def read_samples(shard: str, bad: BadSamples) -> Iterator[ImageSample]:
    """The captioned images of one shard, in order; those without an image or with unreadable text are counted in `bad`.

    Raises: DataError for a missing or torn shard, or too many bad samples.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    for member, tar in tar_members(shard):
        member_key, extension = split_name(member.name)
        if member_key != key or extension in parts:
            if key is not None:
                yield from _sample(shard, key, parts, bad)
            key, parts = member_key, {}
        file = tar.extractfile(member)
        assert file is not None, "tar_members yields regular files"
        try:
            parts[extension] = file.read()
        except tarfile.TarError as error:
            raise _torn(shard, key, str(error)) from error
    if key is not None:
        yield from _sample(shard, key, parts, bad)


def _sample(shard: str, key: str, parts: dict[str, bytes], bad: BadSamples) -> Iterator[ImageSample]:
    bad.count_seen()
    image = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
    if image is None:
        bad.skip(shard, key, f"no image member ({', '.join('.' + name for name in IMAGE_EXTENSIONS)})")
        return
    try:
        captions = _captions(parts)
        label = _label(parts["cls"]) if "cls" in parts else None
    except ValueError as error:
        bad.skip(shard, key, f"unreadable caption or class ({error})")
        return
    yield ImageSample(key, image, captions, label, shard)


def _label(text: bytes) -> int:
    label = int(text)
    if label < 0:
        raise ValueError(f"class {label} is negative")
    return label


def _captions(parts: dict[str, bytes]) -> list[str]:
    """The JSON's `captions`, else the text member, else the JSON's `caption`; blank ones are dropped."""
    record = json.loads(parts["json"]) if "json" in parts else {}
    if not isinstance(record, dict):
        raise ValueError(f"the .json member holds a {type(record).__name__}, not an object")
    given = record.get("captions")
    if given is None:
        given = [parts["txt"].decode()] if "txt" in parts else [record.get("caption") or ""]
    if not isinstance(given, list) or not all(isinstance(caption, str) for caption in given):
        raise ValueError("captions are not a list of strings")
    return [caption.strip() for caption in given if caption.strip()]


class ImageIndex:
    """Where every image of a list of shards lies, so that any can be read alone."""

    def __init__(self, shards: Sequence[str]) -> None:
        """Scan the headers of all shards. Raises: DataError for missing or torn shards, or none with an image."""
        self.shards = list(shards)
        shard_numbers, offsets, sizes, keys = [], [], [], []
        for number, shard in enumerate(self.shards):
            for member, _ in tar_members(shard):
                key, extension = split_name(member.name)
                if extension in IMAGE_EXTENSIONS:
                    shard_numbers.append(number)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                    keys.append(key.encode())
        if not keys:
            raise DataError(
                f"no images in {len(self.shards)} shards, the first being {self.shards[0]!r}. "
                f"Give tars whose members end in {', '.join('.' + name for name in IMAGE_EXTENSIONS)}."
            )
        self._shard_numbers = np.array(shard_numbers, np.int32)
        self._offsets = np.array(offsets, np.int64)
        self._sizes = np.array(sizes, np.int64)
        self._keys: npt.NDArray[np.bytes_] = np.array(keys)

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, index: int) -> tuple[str, str]:
        """(shard, key) of an image."""
        return self.shards[self._shard_numbers[index]], self._keys[index].decode()

    def read(self, index: int) -> bytes:
        """The encoded picture. Raises: DataError where the shard has gone or shrunk since it was indexed."""
        shard, key = self.name(index)
        try:
            with Path(shard).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), int(self._sizes[index]), int(self._offsets[index]))
        except OSError as error:
            raise DataError(
                f"shard {shard!r} cannot be read at key {key!r} ({error}). Check that it is still there."
            ) from error
        if len(data) != self._sizes[index]:
            raise _torn(shard, key, "it shrank while it was in use")
        return data
