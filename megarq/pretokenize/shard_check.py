"""One code shard read as strangers read it, by the plain tarfile module, and held against what the manifest says of it.

    000017.tar  sha256, size            against the record
                members of each block   all there; first and last row lie where CodeShards, by the manifest, finds them
                arrays                  dtype, shape, codes below their depth's codebook size, latents finite
                samples.json            as many keys, captions and classes as the record counts
                crc32.npy               every sample against its checksums

The file is read once, a block at a time. What the whole folder is judged by comes back as counts and 64-bit hashes,
16 bytes a sample.

Legend: n samples of a block, H, W, D code shape, C codebook dim, K largest codebook size.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
import numpy.typing as npt

from megarq.data.code_shards import CodeShards, ShardError
from megarq.data.code_writer import checksums_of
from megarq.data.manifest import (
    CHECKSUMS,
    SECTIONS,
    CodeSettings,
    Manifest,
    ShardRecord,
    checksummed,
    member_row_bytes,
)
from megarq.data.order import IntArray
from megarq.errors import DataError
from megarq.text.tokenizer import TextTokenizer

EXAMPLES = 5
"""Faults of one kind that are told of each shard and of the whole; all are counted."""

HASH_BYTES = 8
READ_BYTES = 2**20

T = TypeVar("T")

CodeArray = npt.NDArray[np.uint16]


class Part(StrEnum):
    """What is checked of every shard."""

    FILES = "files"
    CHECKSUMS = "checksums"
    MEMBERS = "tar members"
    ARRAYS = "arrays"
    RANGE = "code range"
    COUNTS = "counts"


@dataclass
class ShardFindings:
    """What one shard, or all together, holds, and what is wrong with it."""

    file: str
    """Name of the shard."""
    argmin: IntArray
    """[D, K] how often each code occurs at each depth of the argmin stacks."""
    drawn: IntArray
    """[D, K] the same of all drawn stacks together."""
    agreeing: IntArray
    """[D] drawn codes that equal the argmin code of their place."""
    faults: Counter[Part] = field(default_factory=Counter)
    """Faults of each kind."""
    examples: dict[Part, list[str]] = field(default_factory=dict)
    """The first of them: what and where."""
    keys: bytearray = field(default_factory=bytearray)
    """8-byte hashes of all keys."""
    stacks: bytearray = field(default_factory=bytearray)
    """8-byte hashes of all argmin stacks."""
    captioned: int = 0
    """Samples with at least one caption."""
    labelled: int = 0
    """Samples with a class."""
    classes: int = 0
    """1 + the largest class."""
    uncaptioned: list[str] = field(default_factory=list)
    """The first samples without caption."""
    characters: Counter[int] = field(default_factory=Counter)
    """Captions by their length in characters."""
    tokens: Counter[int] = field(default_factory=Counter)
    """Tokenized captions by their length in tokens."""

    @classmethod
    def empty(cls, file: str, settings: CodeSettings) -> Self:
        """Nothing found yet."""
        shape = settings.code_shape[2], max(settings.codebook_sizes)
        return cls(file, np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape[0], np.int64))

    def add(self, other: "ShardFindings") -> None:
        """Take in what is wrong with another shard, and what it holds where nothing is."""
        self.faults.update(other.faults)
        for part, examples in other.examples.items():
            self.examples.setdefault(part, []).extend(examples)
        if other.faults:
            return
        self.keys += other.keys
        self.stacks += other.stacks
        self.captioned += other.captioned
        self.uncaptioned += other.uncaptioned
        self.characters.update(other.characters)
        self.tokens.update(other.tokens)
        self.argmin += other.argmin
        self.drawn += other.drawn
        self.agreeing += other.agreeing

    def fault(self, part: Part, what: str) -> None:
        """Count a fault; the first ones are told."""
        self.faults[part] += 1
        if self.faults[part] <= EXAMPLES:
            self.examples.setdefault(part, []).append(f"{self.file}: {what}")


class _HashedFile:
    """A file read once from its beginning to its end, its sha256 kept as it goes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


@dataclass(frozen=True)
class _Block:
    """The data of one block's members, by the rest of their names."""

    key: str
    members: dict[str, bytes]


def _blocks(file: _HashedFile) -> Iterator[_Block]:
    """The blocks of a tar, in order. Raises: tarfile.TarError or OSError where it cannot be read."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=READ_BYTES) as tar:  # type: ignore[call-overload]
        for key, members in groupby(tar, lambda member: member.name.partition(".")[0]):
            yield _Block(key, {member.name.partition(".")[2]: _data(tar, member) for member in members})


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is no file")
    return file.read()


class ShardCheck:
    """Checks any shard of a folder by its number; can be sent to worker processes."""

    def __init__(
        self, folder: Path, manifest: Manifest, tokenizer: TextTokenizer | None = None, tokenize_every: int = 1
    ) -> None:
        """tokenizer: counts the tokens of the captions of every `tokenize_every`-th sample of a block."""
        self._folder, self._manifest = folder, manifest
        self._tokenizer, self._tokenize_every = tokenizer, tokenize_every

    def __call__(self, number: int) -> ShardFindings:
        """What is in shard `number`; damage is told in the findings, never raised."""
        record = self._manifest.shards[number]
        found = ShardFindings.empty(record.file, self._manifest.settings)
        path = self._folder / record.file
        try:
            with path.open("rb") as file:
                view = CodeShards(self._folder, self._manifest, [number])
                self._check_file(_HashedFile(file), view, record, found)
                size = file.tell()
        except FileNotFoundError:
            found.fault(Part.FILES, "missing")
            return found
        except OSError as error:
            found.fault(Part.MEMBERS, f"cannot be read ({error})")
        else:
            if size != record.bytes:
                found.fault(Part.FILES, f"{size} bytes, {record.bytes} in the manifest")
        _check_counts(record, found)
        return found

    def _check_file(self, file: _HashedFile, view: CodeShards, record: ShardRecord, found: ShardFindings) -> None:
        """Check the blocks as far as they can be read, then the rest of the bytes."""
        try:
            self._check_blocks(file, view, found)
        except (tarfile.TarError, DataError) as error:
            found.fault(Part.MEMBERS, f"cannot be read ({error})")
        while file.read(READ_BYTES):
            pass
        digest = file.sha256.hexdigest()
        if digest != record.sha256:
            found.fault(Part.CHECKSUMS, f"sha256 {digest[:12]}, {record.sha256[:12]} in the manifest")

    def _check_blocks(self, file: _HashedFile, view: CodeShards, found: ShardFindings) -> None:
        blocks = 0
        for number, block in enumerate(_blocks(file)):
            blocks += 1
            if number < len(view.block_sizes):
                _BlockCheck(view, number, block, found, self._tokenizer, self._tokenize_every).run()
        if blocks != len(view.block_sizes):
            found.fault(Part.MEMBERS, f"{blocks} blocks in the tar, {len(view.block_sizes)} in the manifest")


def _check_counts(record: ShardRecord, found: ShardFindings) -> None:
    counted = {"samples": len(found.keys) // HASH_BYTES} | {
        name: getattr(found, name) for name in ("captioned", "labelled", "classes")
    }
    for name, count in counted.items():
        if count != getattr(record, name):
            found.fault(Part.COUNTS, f"{count} {name}, {getattr(record, name)} in the manifest")


class _BlockCheck:
    """One block of one shard."""

    def __init__(
        self,
        view: CodeShards,
        number: int,
        block: _Block,
        found: ShardFindings,
        tokenizer: TextTokenizer | None,
        tokenize_every: int,
    ) -> None:
        self._view, self._number, self._block, self._found = view, number, block, found
        self._tokenizer, self._tokenize_every = tokenizer, tokenize_every
        self._settings: CodeSettings = view.settings
        self._samples = int(view.block_sizes[number])
        self._ends = np.array([0, self._samples - 1])
        """Rows at which the manifest's offsets are tried."""
        self._checksums: dict[str, npt.NDArray[np.uint32]] = {}

    def run(self) -> None:
        """Check all members, going on after a bad one."""
        expected = list(member_row_bytes(self._settings))
        odd = sorted(set(expected) ^ set(self._block.members))
        if odd:
            self._fault(Part.MEMBERS, f"{', '.join(odd)} missing or unexpected")
        columns = self._array(CHECKSUMS, "<u4", (len(checksummed(self._settings)),))
        self._checksums = {} if columns is None else dict(zip(checksummed(self._settings), columns.T, strict=True))
        keys = self._text()
        codes = self._stack("codes.npy", 0, keys)
        for draw in range(1, self._settings.draws + 1):
            drawn = self._stack(f"draw{draw}.npy", draw, keys)
            if codes is not None and drawn is not None:
                self._found.agreeing += (codes == drawn).sum((0, 1, 2))
        if self._settings.latent_shape is not None:
            self._latents(keys)
        if codes is not None:
            self._found.stacks += b"".join(_hash(stack.tobytes()) for stack in codes)

    def _fault(self, part: Part, what: str) -> None:
        self._found.fault(part, f"block {self._block.key}: {what}")

    def _array(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        if name not in self._block.members:
            return None
        try:
            array: npt.NDArray[Any] = np.lib.format.read_array(io.BytesIO(self._block.members[name]))
        except (ValueError, EOFError) as error:
            self._fault(Part.ARRAYS, f"{name} is no plain array ({error})")
            return None
        if array.dtype != np.dtype(dtype) or array.shape != (self._samples, *shape):
            self._fault(Part.ARRAYS, f"{name} is {array.dtype} {array.shape}, not {dtype} {(self._samples, *shape)}")
            return None
        return array

    def _stack(self, name: str, draw: int, keys: list[str]) -> CodeArray | None:
        """Codes [n, H, W, D] of a member, counted; None where they cannot be used."""
        codes = self._array(name, "<u2", self._settings.code_shape)
        if codes is None:
            return None
        places = np.full(2, self._number), self._ends
        self._check_rows(
            name, keys, lambda: self._view.read_codes(*places, draw).tobytes(), codes[self._ends].tobytes()
        )
        counts = self._found.drawn if draw else self._found.argmin
        for depth, size in enumerate(self._settings.codebook_sizes):
            layer = codes[..., depth]
            if layer.max() >= size:
                row = int((layer >= size).any((1, 2)).argmax())
                what = f"{name} has code {layer[row].max()} of {size} at depth {depth + 1}"
                self._fault(Part.RANGE, f"{what}, key {keys[row] if row < len(keys) else row!r}")
            counts[depth] += np.bincount(layer.ravel(), minlength=counts.shape[1])[: counts.shape[1]]
        return codes

    def _latents(self, keys: list[str]) -> None:
        latents = self._array("latents.npy", "<f2", self._settings.latent_shape or ())
        if latents is None:
            return
        places = np.full(2, self._number), self._ends
        ends = latents[self._ends].tobytes()
        self._check_rows("latents.npy", keys, lambda: self._view.read_latents(*places).tobytes(), ends)
        finite = np.isfinite(latents).all((1, 2, 3))
        if not finite.all():
            row = int(finite.argmin())
            self._fault(Part.RANGE, f"latents.npy is not finite, key {keys[row] if row < len(keys) else row!r}")

    def _text(self) -> list[str]:
        """The block's keys, with captions and classes counted; [] where they cannot be used."""
        if "samples.json" not in self._block.members:
            return []
        try:
            content = json.loads(self._block.members["samples.json"])
            keys, captions, labels = (content[name] for name in ("keys", "captions", "labels"))
            sizes = {len(keys), len(captions), len(labels)}
            if sizes != {self._samples} or not _well_typed(keys, captions, labels):
                raise ValueError(f"lists of {sizes} entries, not {self._samples}, or entries of another type")
        except (ValueError, KeyError, TypeError) as error:
            self._fault(Part.ARRAYS, f"samples.json is damaged ({error})")
            return []
        for section, entries in zip(SECTIONS, (keys, captions, labels), strict=True):
            self._check_rows(section, keys, partial(self._text_at_ends, section), [entries[0], entries[-1]])
        self._count_text(keys, captions, labels)
        return list(keys)

    def _text_at_ends(self, section: str) -> list[Any]:
        return [self._view.text_run(section, self._number, row, 1)[0] for row in self._ends.tolist()]

    def _check_rows(self, part: str, keys: list[str], read: Callable[[], T], expected: T) -> None:
        """Hold all rows of a part against their checksums, and what the manifest's offsets give against the tar's."""
        try:
            different = np.flatnonzero(checksums_of(part, self._block.members, self._samples) != self._checksums[part])
        except (KeyError, ValueError):  # told already, or about to be
            different = self._ends
        else:
            if len(different):
                which = keys[different[0]] if different[0] < len(keys) else int(different[0])
                self._fault(
                    Part.CHECKSUMS, f"{part} of {len(different)} samples is not as it was written, key {which!r}"
                )
        if np.isin(self._ends, different).any():
            return
        try:
            found = read()
        except ShardError:
            found = None
        if found != expected:
            member = "samples.json" if part in SECTIONS else part
            self._fault(Part.MEMBERS, f"the manifest's offset of {member} leads to other bytes")

    def _count_text(self, keys: list[str], captions: list[list[str]], labels: list[int | None]) -> None:
        found = self._found
        found.keys += b"".join(_hash(key.encode(errors="surrogatepass")) for key in keys)
        found.captioned += sum(map(bool, captions))
        classes = [label for label in labels if label is not None]
        found.labelled += len(classes)
        found.classes = max([found.classes, *(label + 1 for label in classes)])
        found.characters.update(len(text) for texts in captions for text in texts)
        if len(found.uncaptioned) < EXAMPLES:
            bare = [f"{found.file}/{key}" for key, texts in zip(keys, captions, strict=True) if not texts]
            found.uncaptioned = (found.uncaptioned + bare)[:EXAMPLES]
        if self._tokenizer is not None:
            chosen = captions[:: self._tokenize_every]
            found.tokens.update(self._tokenizer.count(text) for texts in chosen for text in texts)


def _well_typed(keys: list[Any], captions: list[Any], labels: list[Any]) -> bool:
    return (
        all(isinstance(key, str) for key in keys)
        and all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in captions)
        and all(label is None or (type(label) is int and label >= 0) for label in labels)
    )


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
