"""The checkpoint on disk: tensors under their full names, in files written by all ranks, free of how the run was cut.

    RUN/checkpoints/
        latest                          the name of the newest whole checkpoint, written after it
        step-00000120/
            rank-00000.safetensors      this rank's fragments, keyed "<kind>/<parameter name>"
            rank-00001.safetensors
            metadata.json               written last: a folder without it is not a checkpoint

Worked example: a parameter [6, 4] under tp=2 (cut along dimension 0) and ZeRO over dp=2. Data rank 1 of tensor rank 0
holds the flat range 6..11 of its [3, 4] slice: Fragment(shape=[6, 4], dim=0, part=0, parts=2, start=6), 6 numbers.

A file's header holds each parameter's fragment once, {"w": [[6, 4], 0, 0, 2, 6]}: all kinds are cut alike.

Kinds: "param" (fp32 master weights), "exp_avg" and "exp_avg_sq" (Adam's moments), "ema", "buffer" (whole).
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarq.checkpoint.rank_file import (
    OpenFiles,
    StoredTensor,
    read_numbers,
    read_tensor_header,
    stored_tensor,
    write_tensor_file,
)
from megarq.errors import CheckpointError
from megarq.files import file_sha256

VERSION = 2
METADATA = "metadata.json"
_HEADER = "fragments"
_DAMAGED = "the checkpoint is damaged. Use another step's folder."
_BUFFER = 2**18
"""Numbers that are read at once where only some of them are wanted."""
_READERS = 8
"""Threads that read files through."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Where a flat run of numbers lies in the full tensor."""

    shape: tuple[int, ...]
    """Shape of the full tensor."""
    dim: int = 0
    """Dimension that tensor parallelism cuts."""
    part: int = 0
    """Which of the equal slices along `dim` this fragment lies in."""
    parts: int = 1
    """Number of slices along `dim`: the tensor-parallel size, 1 where the tensor is not cut."""
    start: int = 0
    """First number, in the flattened slice."""

    @classmethod
    def of_slice(cls, shape: Sequence[int], dim: int | None, part: int, parts: int, start: int) -> "Fragment":
        """From `start` on in slice `part` of `parts`, which has this shape; `dim` is None for a tensor not cut."""
        if dim is None:
            return cls(tuple(shape), start=start)
        full = list(shape)
        full[dim] *= parts
        return cls(tuple(full), dim, part, parts, start)


class SharedRuns(NamedTuple):
    """Numbers that two fragments share: `rows` runs of `width`."""

    rows: int
    width: int
    first: int
    """Where the first run begins, in the one fragment."""
    other_first: int
    """The same in the other fragment."""
    step: int
    """From one run to the next, in the one fragment."""
    other_step: int
    """The same in the other fragment."""


def shared_runs(one: Fragment, count: int, other: Fragment, other_count: int) -> Iterator[SharedRuns]:
    """What two fragments, of `count` and `other_count` numbers, share; they are cut along one dimension, or uncut.

    Seen as [rows, row], row holding the cut dimension and those after it, a slice is a band of columns. The columns
    that both bands have are a grid; each fragment covers one range of its cells, and the ends of the range both cover
    may lie within a row.
    """
    if (one.part, one.parts) == (other.part, other.parts):
        row, lefts = (prod(one.shape) // one.parts,) * 2, (0, 0)
    else:
        columns = prod(one.shape[one.dim if one.parts > 1 else other.dim :])
        row = columns // one.parts, columns // other.parts
        lefts = one.part * row[0], other.part * row[1]
    left = max(lefts)
    width = min(lefts[0] + row[0], lefts[1] + row[1]) - left
    if width <= 0:
        return

    def cell(side: int, flat: int) -> int:
        """The first cell of the grid at or after a number of a flattened slice."""
        above, column = divmod(flat, row[side])
        return above * width + min(max(lefts[side] + column - left, 0), width)

    begin = max(cell(0, one.start), cell(1, other.start))
    end = min(cell(0, one.start + count), cell(1, other.start + other_count))
    first_row, last_row = -(-begin // width) * width, end // width * width
    whole = ((begin, first_row), (first_row, last_row), (last_row, end))
    for first, last in whole if first_row <= last_row else ((begin, end),):
        if first < last:
            above, column = divmod(first, width)
            firsts = tuple(above * row[side] + left - lefts[side] + column for side in (0, 1))
            rows = max((last - first) // width, 1)
            yield SharedRuns(rows, min(last - first, width), firsts[0] - one.start, firsts[1] - other.start, *row)


class _Piece(NamedTuple):
    """A stored fragment."""

    path: Path
    place: Fragment
    stored: StoredTensor


class _Entry(NamedTuple):
    """A fragment as a file's header tells of it. Of many ranks' there are a million: they are opened when read."""

    path: Path
    place: tuple[Any, ...]
    """The fields of a Fragment."""
    stored: tuple[str, int, int]
    """dtype, first byte, byte after the last."""

    def open(self) -> _Piece:
        """Raises CheckpointError where the header makes no sense."""
        try:
            return _Piece(self.path, Fragment(*self.place), stored_tensor(*self.stored))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}): {_DAMAGED}") from error


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def write_rank_file(folder: Path, rank: int, tensors: Mapping[str, tuple[Fragment, Tensor]]) -> dict[str, Any]:
    """Write one rank's fragments, keyed "<kind>/<name>"; returns the file's entry for the metadata."""
    path = folder / rank_file(rank)
    places: dict[str, Fragment] = {}
    for key, (fragment, _) in tensors.items():
        assert places.setdefault(_name_of(key), fragment) == fragment, f"kinds of {key} are cut differently"
    numbers = {key: tensor for key, (_, tensor) in tensors.items()}
    header = json.dumps({name: list(astuple(fragment)) for name, fragment in places.items()})
    digest = write_tensor_file(path, numbers, {_HEADER: header})
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


class Checkpoint:
    """One checkpoint, opened for reading; numbers are read when asked for."""

    def __init__(self, folder: Path, metadata: dict[str, Any]) -> None:
        self.folder = folder
        self.metadata = metadata
        self._files = OpenFiles()
        self._entries: dict[str, list[_Entry]] = defaultdict(list)
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for each shape, however many fragments it has
        for file in metadata["files"]:
            for key, entry in _read_header(folder / file["name"], shapes):
                self._entries[key].append(entry)

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Open a step's folder. Raises CheckpointError where it is incomplete, cut short or of another format."""
        folder = Path(folder)
        try:
            metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} has no {METADATA}: the checkpoint was never finished. Use another step's folder."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder / METADATA} is not JSON ({error}): {_DAMAGED}") from error
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{folder / METADATA} is not an object: {_DAMAGED}")
        if metadata.get("format") != "megarq-checkpoint" or metadata.get("version") != VERSION:
            raise CheckpointError(
                f"{folder} is of format {metadata.get('format')!r} version {metadata.get('version')!r}; this release "
                f"reads megarq-checkpoint version {VERSION}. Use the release that wrote it."
            )
        if not all(_is_file_entry(entry) for entry in metadata.get("files") or [None]):
            raise CheckpointError(f"{folder / METADATA} does not list the checkpoint's files: {_DAMAGED}")
        for entry in metadata["files"]:
            path = folder / entry["name"]
            size = path.stat().st_size if path.exists() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise CheckpointError(f"{path} {found}, {entry['bytes']} bytes were written: {_DAMAGED}")
        return cls(folder, metadata)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Read this rank's share of the files through. Raises CheckpointError where a byte is not the one written."""
        entries = self.metadata["files"][rank::world_size]
        with ThreadPoolExecutor(_READERS) as readers:
            digests = list(readers.map(lambda entry: file_sha256(self.folder / entry["name"]), entries))
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry["sha256"]:
                path = self.folder / entry["name"]
                raise CheckpointError(f"{path} has the sha256 {digest}, {entry['sha256']} was written: {_DAMAGED}")

    def names(self, kind: str = "param") -> list[str]:
        """Full names of the tensors of a kind, sorted."""
        prefix = f"{kind}/"
        return sorted(key.removeprefix(prefix) for key in self._entries if key.startswith(prefix))

    def tensor(self, name: str, kind: str = "param") -> Tensor:
        """One full tensor, put together from its fragments. Raises CheckpointError where any part is missing."""
        shape = self._stored(name, kind)[0].place.shape
        return self.read(name, kind, Fragment(shape), prod(shape)).view(shape)

    def read(self, name: str, kind: str, place: Fragment, count: int) -> Tensor:
        """The `count` numbers [n] of a tensor that a fragment of this or another layout covers; no others are read.

        Raises CheckpointError where the tensor has another shape, or any of the numbers is missing.
        """
        pieces = self._stored(name, kind)
        cut = next((piece.place.dim for piece in pieces if piece.place.parts > 1), place.dim)
        if pieces[0].place.shape != place.shape or (place.parts > 1 and place.dim != cut):
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} has shape {list(pieces[0].place.shape)}, cut along {cut}, the "
                f"model's is {list(place.shape)}, cut along {place.dim}. Resume with the configuration that the run "
                "was started with."
            )
        numbers = torch.empty(count, dtype=pieces[0].stored.dtype)
        found = 0
        for piece in pieces:
            for runs in shared_runs(piece.place, piece.stored.count, place, count):
                self._copy(piece, runs, numbers)
                found += runs.rows * runs.width
        if found != count:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} has {found} of {count} numbers. The checkpoint is damaged; use "
                "another step's folder."
            )
        return numbers

    def close(self) -> None:
        """Close the files; reading opens them again. The space of a removed checkpoint is free only then."""
        self._files.close()

    def _stored(self, name: str, kind: str) -> list[_Piece]:
        key = f"{kind}/{name}"
        if key not in self._entries:
            raise CheckpointError(f"{self.folder} holds no {kind} of {name}: use a checkpoint of this model.")
        return [entry.open() for entry in self._entries[key]]

    def _copy(self, piece: _Piece, runs: SharedRuns, numbers: Tensor) -> None:
        """Read runs into their places in `numbers`; short ones many at a time, with what lies between them."""
        file = self._files.get(piece.path)
        at_once = max(_BUFFER // runs.step, 1)
        for row in range(0, runs.rows, at_once):
            rows = min(at_once, runs.rows - row)
            source, target = runs.first + row * runs.step, runs.other_first + row * runs.other_step
            if rows == 1:
                read_numbers(file, piece.stored, source, numbers[target : target + runs.width])
                continue
            buffer = torch.empty((rows - 1) * runs.step + runs.width, dtype=numbers.dtype)
            read_numbers(file, piece.stored, source, buffer)
            band = buffer.as_strided((rows, runs.width), (runs.step, 1))
            numbers.as_strided((rows, runs.width), (runs.other_step, 1), target).copy_(band)


def _is_file_entry(entry: Any) -> bool:
    """Whether an entry of the metadata names a file of the folder itself."""
    if not isinstance(entry, dict) or not {"name", "bytes", "sha256"} <= entry.keys():
        return False
    return isinstance(entry["name"], str) and Path(entry["name"]).name == entry["name"]


def _name_of(key: str) -> str:
    """The parameter's name in "<kind>/<name>"."""
    return key.partition("/")[2]


def _read_header(path: Path, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> list[tuple[str, _Entry]]:
    try:
        metadata, stored = read_tensor_header(path)
        places = {}
        for name, (shape, *cut) in json.loads(metadata[_HEADER]).items():
            places[name] = (shapes.setdefault(tuple(shape), tuple(shape)), *cut)
        return [(key, _Entry(path, places[_name_of(key)], entry)) for key, entry in stored.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {_DAMAGED}") from error
