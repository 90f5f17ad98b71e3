"""Captioned images in webdataset tars: reading samples in order, and an index for reading them in any order.

    00000.tar:  cat7.jpg  cat7.txt  cat7.json  dog1.png  dog1.txt  dog1.cls ...

Consecutive members with the same key (the name up to the first dot of its last part) are one sample: an image
(.jpg .jpeg .png .webp .bmp .tif .tiff), its caption (.txt), more of them (.json: `captions`, a list, or `caption`), a
class (.cls). What img2dataset writes is read as it is. webdataset's own reader is not used: it takes a tar that breaks
off between two members for a whole one, and cannot name the last sample of a torn one.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from megarq.data.faults import Fault, Faults
from megarq.data.sources import Retry, SourceError, failure, is_local, open_source
from megarq.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
LOSSY_EXTENSIONS = ("jpg", "jpeg", "webp")
_READ_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls")
_NO_IMAGE = f"none of {', '.join('.' + name for name in IMAGE_EXTENSIONS)}"

T = TypeVar("T")


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


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a tar member, as webdataset has it: split at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


class _TornError(Exception):
    """A tar breaks off, or is damaged, in or after the sample `key`."""

    def __init__(self, key: str, reason: object) -> None:
        super().__init__(f"the tar is torn: {reason}")
        self.key = key


class _Header(tarfile.TarInfo):
    """The header of a member. TarFile takes an archive that breaks off between two members for a whole one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise  # the end-of-archive block
            if len(buf) < tarfile.BLOCKSIZE:
                raise EOFError("unexpected end of data") from error
            raise tarfile.ReadError(str(error)) from error


def _open_tar(shard: str, file: BinaryIO, mode: Literal["r|", "r:"]) -> tarfile.TarFile:
    try:
        # Names that are not UTF-8 stay printable, and different ones different.
        return tarfile.open(fileobj=file, mode=mode, tarinfo=_Header, encoding="utf-8", errors="backslashreplace")
    except EOFError as error:
        raise _TornError("", error) from error
    except tarfile.TarError as error:
        raise DataError(
            f"shard {shard!r} is no uncompressed tar ({error}). Copy or make it again, or decompress it; a .tar.gz can "
            "be given as 'pipe:gzip -dc FILE'."
        ) from error


def _groups(
    shard: str, file: BinaryIO, mode: Literal["r|", "r:"], take: Callable[[tarfile.TarFile, tarfile.TarInfo], T]
) -> Iterator[tuple[str, dict[str, T]]]:
    """(key, what `take` makes of each member by its extension) of every whole sample of a tar, in order.

    Raises: _TornError where it breaks off; DataError where it is no tar.
    """
    key, parts = "", dict[str, T]()
    with _open_tar(shard, file, mode) as tar:
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else TarFile keeps them all
                member_key, extension = split_name(member.name)
                named = member_key and not member_key.endswith("/")
                if not (named and member.isreg() and extension in _READ_EXTENSIONS):
                    continue
                if member_key != key or extension in parts:
                    if parts:
                        yield key, parts
                    key, parts = member_key, {}
                parts[extension] = take(tar, member)
        except (tarfile.TarError, EOFError) as error:
            raise _TornError(key, error) from error
    if parts:
        yield key, parts


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "only regular files are taken"
    return file.read()


def _stream_groups(shard: str, retry: Retry) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar from any source. One that is not local is opened again where it fails, or is torn."""
    done = failures = 0
    while True:
        try:
            with open_source(shard) as stream:
                for group in islice(_groups(shard, stream, "r|", _data), done, None):
                    yield group
                    done, failures = done + 1, 0
                while stream.read(2**20):  # to its end, where a command tells how it went
                    pass
            return
        except (SourceError, _TornError) as error:
            failures += 1
            if isinstance(error, _TornError) and (is_local(shard) or failures >= retry.attempts):
                raise
            retry.after(failures, shard, error)


def _sound(
    shard: str, groups: Iterator[tuple[str, dict[str, T]]], faults: Faults
) -> Iterator[tuple[str, dict[str, T]]]:
    """The samples that are neither torn nor second ones of their key; the others are counted in `faults`."""
    keys = set[str]()
    try:
        for key, parts in groups:
            faults.count_seen()
            if key in keys:
                faults.skip(shard, key, Fault.DUPLICATE_KEY, "an earlier sample has it")
                continue
            keys.add(key)
            yield key, parts
    except _TornError as torn:
        faults.count_seen()
        faults.skip(shard, torn.key or "the first sample", Fault.TRUNCATED, f"{torn}; this sample and all after it")
        return
    if not keys:
        faults.note(shard, "", Fault.EMPTY, "it holds no samples")


def read_samples(
    shard: str, faults: Faults, caption_field: str | None = None, *, retry: Retry | None = None
) -> Iterator[ImageSample]:
    """The captioned images of one shard, in order, read as a stream. What cannot be used is counted in `faults`.

    caption_field: take the captions from this field of the .json, a string or a list of them, and nowhere else. Of a
    torn shard, all whole samples are used. A flaky source is opened again, and no sample comes twice.
    Raises: DataError for a shard that is missing, cannot be read or is no tar, or too many faults.
    """
    bare = []
    captioned = caption_field is not None
    for key, parts in _sound(shard, _stream_groups(shard, retry or Retry()), faults):
        image = _image(parts)
        if image is None:
            faults.skip(shard, key, Fault.NO_IMAGE, _NO_IMAGE)
            continue
        try:
            captions = _captions(parts, caption_field)
            label = _label(parts["cls"]) if "cls" in parts else None
        except (ValueError, RecursionError) as error:
            faults.skip(shard, key, Fault.UNREADABLE_TEXT, str(error))
            continue
        captioned = captioned or bool(captions)
        if not captions:
            bare.append(key)
        yield ImageSample(key, image, captions, label, shard)
    if captioned:
        for key in bare:
            faults.note(shard, key, Fault.NO_CAPTION, "used without")


def _image(parts: dict[str, T]) -> T | None:
    return next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)


def _label(text: bytes) -> int:
    label = int(text)
    if label < 0:
        raise ValueError(f"class {label} is negative")
    return label


def _captions(parts: dict[str, bytes], field: str | None) -> list[str]:
    """The field asked for, else the JSON's `captions`, else the text, else the JSON's `caption`; none is blank."""
    record = json.loads(parts["json"]) if "json" in parts else {}
    if not isinstance(record, dict):
        raise ValueError(f"the .json member holds a {type(record).__name__}, not an object")
    given: Any = record.get(field or "captions")
    if given is None and field is None:
        given = parts["txt"].decode("utf-8-sig") if "txt" in parts else record.get("caption")
    captions = given if isinstance(given, list) else [given or ""]
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"the captions {given!r:.80} are neither a string nor a list of strings")
    "".join(captions).encode()  # a lone half of a surrogate pair, which JSON can hold, is no text
    return [caption.strip() for caption in captions if caption.strip()]


def scan_samples(
    shard: str, faults: Faults, take: Callable[[tarfile.TarFile, tarfile.TarInfo], T]
) -> Iterator[tuple[str, dict[str, T]]]:
    """(key, what `take` makes of each member by its extension) of the samples of a local shard that have an image.

    Headers alone are read. What cannot be used is counted in `faults`. Raises: DataError for a shard that is missing,
    not local or no tar, or too many faults.
    """
    if not is_local(shard):
        raise DataError(f"shard {shard!r} cannot be read in any order. Copy it to a local disk first.")
    try:
        with Path(shard).open("rb") as file:
            for key, parts in _sound(shard, _groups(shard, file, "r:", take), faults):
                if _image(parts) is None:
                    faults.skip(shard, key, Fault.NO_IMAGE, _NO_IMAGE)
                else:
                    yield key, parts
    except OSError as error:
        raise failure(shard, error) from error


class ImageIndex:
    """Where every image of a list of local shards lies, so that any can be read alone."""

    def __init__(self, shards: Sequence[str], faults: Faults) -> None:
        """Scan the headers of all shards. What cannot be used is counted in `faults`.

        Raises: DataError for missing shards, sources that are not local, no image at all, or too many faults.
        """
        self.shards = list(shards)
        shard_numbers, places, keys = [], [], []
        for number, shard in enumerate(self.shards):
            for key, parts in scan_samples(shard, faults, lambda _, member: (member.offset_data, member.size)):
                shard_numbers.append(number)
                places.append(_image(parts))
                keys.append(key.encode())
        if not keys:
            raise DataError(
                f"no images in {len(self.shards)} shards, the first being {self.shards[0]!r}. "
                f"Give tars whose members end in {', '.join('.' + name for name in IMAGE_EXTENSIONS)}."
            )
        self._shard_numbers = np.array(shard_numbers, np.int32)
        self._places = np.array(places, np.int64)
        self._keys: npt.NDArray[np.bytes_] = np.array(keys)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> tuple[str, str]:
        """(shard, key) of an image."""
        return self.shards[self._shard_numbers[index]], self._keys[index].decode()

    def read(self, index: int) -> bytes:
        """The encoded picture. Raises: DataError where the shard has gone or shrunk since it was indexed."""
        shard, key = self.name(index)
        offset, size = self._places[index].tolist()
        try:
            with Path(shard).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise failure(shard, error) from error
        if len(data) != size:
            raise DataError(f"shard {shard!r} shrank while it was in use, at key {key!r}. Copy or make it again.")
        return data

    def fingerprint(self) -> str:
        """sha256 of the keys, and of the shards and places that they have."""
        sha256 = hashlib.sha256()
        for array in (self._keys, self._shard_numbers, self._places):
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.hexdigest()
