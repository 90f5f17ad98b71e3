"""Reading code shards: any rows of any block, without unpacking anything. The format is told in manifest.py.

    codes = CodeShards.open("runs/demo/codes")                # reads manifest.json alone
    codes.read_codes(block, row, draw)                        # arrays [n] -> uint16 [n, H, W, D]; draw 0: argmin
    codes.read_run(block, first, draw, out)                   # rows first .. first + len(out) - 1 in one read
    train, validation = codes.split(validation_shards=1)      # views; blocks are counted within each
    fewer = codes.without([3, 17])                            # a view: the samples with these numbers are left out

A file offset is known for every row, so a row, or a run of them, costs one positioned read of its own bytes. Captions
lie one sample to a line (code_writer.py); the line offsets of recently used blocks are kept, not the text. That a file
is whole is checked when it is opened, and every row that is read is held against its checksum.
"""

import json
import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from megarq.data.manifest import CHECKSUMS, SECTIONS, Manifest, ShardRecord, checksummed, member_row_bytes
from megarq.data.order import IntArray
from megarq.errors import DataError

MAX_OPEN_FILES = 512
MAX_LINE_TABLES = 2048


class ShardError(DataError):
    """A shard that cannot be read, or that holds other bytes than were written."""

    def __init__(self, message: str, blocks: npt.ArrayLike = (), passing: bool = False) -> None:
        """blocks: numbers, within what was read from, of the blocks that are out of reach.

        passing: the whole file is, as it may be for a while where storage has a hiccup.
        """
        super().__init__(message)
        self.blocks: IntArray = np.asarray(blocks, np.int64)
        self.passing = passing


class CodeShards:
    """The samples of a folder of code shards, or of some of its shards (a view)."""

    def __init__(
        self, folder: Path, manifest: Manifest, shards: Sequence[int], left_out: npt.ArrayLike | None = None
    ) -> None:
        """The view of the shards with these numbers; users call `open`, then `without`, `subset` or `split`.

        left_out: numbers of the samples in the folder that the view does without, ascending.
        """
        self.folder = folder
        self.manifest = manifest
        self.settings = manifest.settings
        self._shards = np.array(shards, np.int64)
        self._left_out = np.array([] if left_out is None else left_out, np.int64)
        records = self._records = [manifest.shards[number] for number in shards]
        self._files = _OpenFiles(folder, records)
        self._line_tables: OrderedDict[int, npt.NDArray[np.int32]] = OrderedDict()
        blocks = [block for record in records for block in record.blocks]
        self._rows: IntArray = np.array([block.samples for block in blocks], np.int64)
        counts = [len(record.blocks) for record in records]
        self._shard_of_block: IntArray = np.repeat(np.arange(len(records)), counts)
        self._first_id = _numbers(self._rows, counts, [shard.samples for shard in manifest.shards], self._shards)
        self.all_blocks = sum(len(shard.blocks) for shard in manifest.shards)
        """Blocks of the whole folder."""
        self.block_numbers = _numbers(
            np.ones_like(self._rows), counts, [len(shard.blocks) for shard in manifest.shards], self._shards
        )
        """[blocks] number of each block in the whole folder."""
        before, behind = (np.searchsorted(self._left_out, self._first_id + rows) for rows in (0, self._rows))
        self._first_kept = self._first_id - before
        self.block_sizes: IntArray = self._rows - (behind - before)
        """[blocks] samples of each block, those left out not counted."""
        self._row_bytes = member_row_bytes(self.settings)
        self._starts: dict[str, IntArray] = {}
        for name, row_bytes in self._row_bytes.items():
            ends = np.array([sum(block.members[name]) for block in blocks], np.int64)
            self._starts[name] = ends - self._rows * row_bytes
        self._columns = {part: column for column, part in enumerate(checksummed(self.settings))}
        self._last_checksums: tuple[tuple[int, int, int], npt.NDArray[np.uint32]] | None = None
        self._text = np.array([block.members["samples.json"] for block in blocks], np.int64).reshape(-1, 2)

    @classmethod
    def open(cls, folder: str | Path) -> "CodeShards":
        """All shards of a finished folder. Raises: DataError for a missing or damaged manifest."""
        manifest = Manifest.load(Path(folder))
        return cls(Path(folder), manifest, range(len(manifest.shards)))

    def faulty_files(self) -> dict[Path, DataError]:
        """The shards of the view that are missing, or of another size than recorded."""
        faulty = {}
        for record in self._records:
            try:
                check_size(self.folder, record)
            except DataError as error:
                faulty[self.folder / record.file] = error
        return faulty

    def without(self, sample_ids: npt.ArrayLike) -> "CodeShards":
        """The view without the samples of these numbers. All other samples keep theirs."""
        left_out = np.union1d(self._left_out, np.asarray(sample_ids, np.int64))
        return CodeShards(self.folder, self.manifest, self._shards.tolist(), left_out)

    def subset(self, shards: Sequence[int]) -> "CodeShards":
        """The view of some of this view's shards, by their place in it. Sample ids stay those of the folder."""
        return CodeShards(self.folder, self.manifest, [int(self._shards[place]) for place in shards], self._left_out)

    def split(self, validation_shards: int) -> tuple["CodeShards", "CodeShards | None"]:
        """(training view, view of the last `validation_shards` shards; None for 0).

        Raises: DataError where either part would be empty.
        """
        if validation_shards == 0:
            return self, None
        kept = min(max(len(self._shards) - validation_shards, 0), len(self._shards))
        parts = self.subset(range(kept)), self.subset(range(kept, len(self._shards)))
        if any(part.samples == 0 for part in parts):
            raise DataError(
                f"data.validation_shards={validation_shards}: {self.folder} has {len(self._shards)} shards, and both "
                "parts need samples. Hold out fewer, or make more and smaller shards (--samples-per-shard)."
            )
        return parts

    @property
    def samples(self) -> int:
        """Samples in the view."""
        return int(self.block_sizes.sum())

    @property
    def recorded(self) -> int:
        """Samples in the view's shards, those left out too."""
        return int(self._rows.sum())

    @property
    def captioned(self) -> int:
        """How many of the `recorded` samples have at least one caption."""
        return sum(record.captioned for record in self._records)

    @property
    def labelled(self) -> int:
        """How many of the `recorded` samples have a class."""
        return sum(record.labelled for record in self._records)

    @property
    def classes(self) -> int:
        """1 + the largest class in the view; 0 where there is none."""
        return max((record.classes for record in self._records), default=0)

    def check_model(
        self, code_shape: Sequence[int], codebook_sizes: Sequence[int], fingerprint: str | None = None
    ) -> None:
        """Raise DataError where a model of this shape, or with this RQ-VAE's fingerprint, cannot learn the codes."""
        ours = self.settings
        if tuple(code_shape) != ours.code_shape or tuple(codebook_sizes) != ours.codebook_sizes:
            raise DataError(
                f"{self.folder} holds codes of shape {ours.code_shape} from codebooks of {ours.codebook_sizes}, the "
                f"model expects {tuple(code_shape)} and {tuple(codebook_sizes)}. Choose the model that fits "
                "(model.code_shape, model.codebook_size), or pretokenize with its RQ-VAE."
            )
        if fingerprint is not None:
            self.check_fingerprint(fingerprint)

    def check_fingerprint(self, expected: str) -> None:
        """Raise DataError where these are the codes of another RQ-VAE than `expected`."""
        if expected != self.settings.fingerprint:
            raise DataError(
                f"{self.folder} holds codes of the RQ-VAE {self.settings.fingerprint[:12]}, but this model has the "
                f"RQ-VAE {expected[:12]}: the same numbers mean other pictures. Pretokenize with this RQ-VAE "
                "(tools/pretokenize.py --rqvae), or use the one that made the codes."
            )

    def sample_ids(self, block: IntArray, row: IntArray) -> IntArray:
        """[n], [n] -> numbers [n] of the samples in the whole folder."""
        kept = self._first_kept[block] + row
        return kept + np.searchsorted(self._left_out - np.arange(len(self._left_out)), kept, side="right")

    def read_codes(self, block: IntArray, row: IntArray, draw: npt.ArrayLike = 0) -> npt.NDArray[np.uint16]:
        """[n], [n], [n] -> code stacks [n, H, W, D]: the argmin's (draw 0) or of draw 1 .. draws."""
        draw = np.broadcast_to(np.asarray(draw, np.int64), block.shape)
        assert draw.size == 0 or 0 <= draw.min() <= draw.max() <= self.settings.draws
        out = np.empty((len(block), *self.settings.code_shape), "<u2")
        for number in np.unique(draw):
            self._read(f"draw{number}.npy" if number else "codes.npy", block, row, np.flatnonzero(draw == number), out)
        return out

    def read_latents(self, block: IntArray, row: IntArray) -> npt.NDArray[np.float16]:
        """[n], [n] -> latents [n, H, W, C]. Raises: DataError where none are stored."""
        if self.settings.latent_shape is None:
            raise DataError(f"{self.folder} holds no latents. Pretokenize with --latents.")
        out = np.empty((len(block), *self.settings.latent_shape), "<f2")
        self._read("latents.npy", block, row, np.arange(len(block)), out)
        return out

    def read_run(self, block: int, first: int, draw: int, out: npt.NDArray[np.uint16]) -> None:
        """Fill out [n, H, W, D] with the code stacks of rows first .. first + n - 1 of a block, in one read."""
        name = f"draw{draw}.npy" if draw else "codes.npy"
        rows = self._file_rows(np.full(len(out), block), first + np.arange(len(out)))
        whole = out
        if rows[-1] - rows[0] >= len(rows):  # samples between them are left out
            whole = np.empty((int(rows[-1] - rows[0]) + 1, *out.shape[1:]), out.dtype)
        offset = int(self._starts[name][block] + rows[0] * self._row_bytes[name])
        data = whole.reshape(-1).view(np.uint8)
        self._fill(block, offset, data)
        self._check(name, block, int(rows[0]), data, range(0, len(data) + 1, self._row_bytes[name]))
        if whole is not out:
            out[:] = whole[rows - rows[0]]

    def text_run(self, section: str, block: int, first: int, count: int) -> list[Any]:
        """What a section ("keys", "captions" or "labels") says of rows first .. first + count - 1, in one read."""
        rows = self._file_rows(np.full(count, block), first + np.arange(count))
        line = SECTIONS.index(section) * (int(self._rows[block]) + 1) + 1 + rows
        ends = self._line_ends(block)
        bounds = (ends[line[0] - 1 : line[-1] + 1] - ends[line[0] - 1]).tolist()
        buffer = np.empty(bounds[-1], np.uint8)
        self._fill(block, int(self._text[block, 0] + ends[line[0] - 1]), buffer)
        self._check(section, block, int(rows[0]), buffer, bounds)
        try:
            entries = json.loads(b"[" + buffer.tobytes().rstrip(b",\n") + b"]")
            if len(entries) != line[-1] - line[0] + 1:
                raise ValueError(f"{len(entries)} {section} on {line[-1] - line[0] + 1} lines")
        except ValueError as error:
            raise self._damaged(block, str(error)) from error
        return entries if len(entries) == count else [entries[row] for row in (rows - rows[0]).tolist()]

    def captions(self, block: int, row: int) -> list[str]:
        """All captions of a sample."""
        return cast(list[str], self.text_run("captions", block, row, 1)[0])

    def files(self, blocks: IntArray) -> dict[Path, int]:
        """The shards that these blocks lie in, with the bytes that each must have."""
        numbers = np.unique(self._shard_of_block[blocks]).tolist()
        return {self.folder / self._records[number].file: self._records[number].bytes for number in numbers}

    def file_of(self, block: int) -> str:
        """Name of the shard that a block lies in."""
        return self._records[int(self._shard_of_block[block])].file

    def path_of(self, block: int) -> Path:
        """The shard that a block lies in."""
        return self.folder / self.file_of(block)

    def key(self, block: int, row: int) -> str:
        """The name of a sample."""
        return cast(str, self.text_run("keys", block, row, 1)[0])

    def label(self, block: int, row: int) -> int | None:
        """The class of a sample, if it has one."""
        return cast(int | None, self.text_run("labels", block, row, 1)[0])

    def _read(self, name: str, block: IntArray, row: IntArray, where: IntArray, out: npt.NDArray[Any]) -> None:
        """Fill out[where] with those rows of member `name`; file by file, in the order of the bytes."""
        row_bytes = self._row_bytes[name]
        shards, rows = self._shard_of_block[block[where]], self._file_rows(block[where], row[where])
        offsets = self._starts[name][block[where]] + rows * row_bytes
        flat = out.reshape(len(out), -1).view(np.uint8)
        for i in np.lexsort((offsets, shards)).tolist():
            here, data = int(block[where[i]]), flat[where[i]]
            self._fill(here, int(offsets[i]), data)
            self._check(name, here, int(rows[i]), data, (0, row_bytes))

    def _fill(self, block: int, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Read from the shard that a block lies in."""
        shard = int(self._shard_of_block[block])
        try:
            self._files.read_into(shard, offset, buffer)
        except DataError as error:
            raise ShardError(str(error), np.flatnonzero(self._shard_of_block == shard), passing=True) from error

    def _check(self, part: str, block: int, first: int, data: npt.NDArray[np.uint8], bounds: Sequence[int]) -> None:
        """Raise ShardError where rows first .. of one part of a block are not those that were written.

        bounds: where each row begins in the data, and the end.
        """
        count = len(bounds) - 1
        place = block, first, count
        if self._last_checksums is None or self._last_checksums[0] != place:
            checksums = np.empty((count, len(self._columns)), "<u4")
            offset = int(self._starts[CHECKSUMS][block] + first * self._row_bytes[CHECKSUMS])
            self._fill(block, offset, checksums.reshape(-1).view(np.uint8))
            self._last_checksums = place, checksums
        expected = self._last_checksums[1][:, self._columns[part]]
        view, crc32 = data.data, zlib.crc32
        if [crc32(view[start:end]) for start, end in pairwise(bounds)] != expected.tolist():
            raise self._damaged(block, f"{part} and its checksum differ")

    def _file_rows(self, block: IntArray, row: IntArray) -> IntArray:
        """[n], [n] -> rows in the file, where those left out are too."""
        return self.sample_ids(block, row) - self._first_id[block] if len(self._left_out) else row

    def _line_ends(self, block: int) -> npt.NDArray[np.int32]:
        """Offset behind each line of a block's samples.json, from the cache of recently used blocks."""
        if block in self._line_tables:
            self._line_tables.move_to_end(block)
            return self._line_tables[block]
        offset, size = self._text[block]
        buffer = np.empty(int(size), np.uint8)
        self._fill(block, int(offset), buffer)
        ends = (np.flatnonzero(buffer == ord("\n")) + 1).astype(np.int32)
        if len(ends) != 3 * self._rows[block] + 4:
            raise self._damaged(block, f"{len(ends)} lines")
        self._line_tables[block] = ends
        if len(self._line_tables) > MAX_LINE_TABLES:
            self._line_tables.popitem(last=False)
        return ends

    def _damaged(self, block: int, reason: str) -> ShardError:
        """To be raised of a block; nothing of it stays in memory."""
        self._line_tables.pop(block, None)
        self._last_checksums = None
        return ShardError(
            f"{self.folder / self.file_of(block)}: a block is damaged ({reason}). Copy the shard again, or remove it "
            "and run tools/pretokenize.py again.",
            [block],
        )


def check_size(folder: Path, shard: ShardRecord) -> None:
    """Raise DataError where a recorded shard is missing or not of the recorded size."""
    path = folder / shard.file
    if not path.is_file():
        raise DataError(f"missing code shard {path}. Copy it again, or make it again with tools/pretokenize.py.")
    size = path.stat().st_size
    if size != shard.bytes:
        raise DataError(
            f"code shard {path} has {size} bytes, the manifest says {shard.bytes}: it is truncated or of another run. "
            "Copy it again, or remove it and run tools/pretokenize.py again."
        )


def _numbers(lengths: IntArray, per_shard: Sequence[int], of_shard: Sequence[int], shards: IntArray) -> IntArray:
    """First number of each block where blocks of these lengths are numbered through a folder, others between them.

    per_shard: blocks of each of these shards; of_shard: the length of every shard of the folder.
    """
    starts = np.cumsum(lengths) - lengths
    firsts = np.cumsum([0, *of_shard])[:-1]
    in_view = np.cumsum([0, *(of_shard[shard] for shard in shards)])[:-1]
    return starts + np.repeat(firsts[shards] - in_view, per_shard)


class _OpenFiles:
    """Positioned reads from many files, of which a bounded number is open. Each process opens its own."""

    def __init__(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        self._folder, self._records = folder, records
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._most = min(MAX_OPEN_FILES, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def read_into(self, number: int, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill `buffer` from file `number`.

        Raises: DataError where it is missing, not whole, or ends before; the next read opens it again.
        """
        path = self._folder / self._records[number].file
        try:
            count = os.preadv(self._file(number).fileno(), [buffer.data], offset)
            if count != len(buffer):
                raise DataError(f"code shard {path} ends at {offset + count}: truncated. Copy it again.")
        except (OSError, DataError) as error:
            if number in self._open:
                self._open.pop(number).close()
            if isinstance(error, DataError):
                raise
            raise DataError(f"code shard {path} cannot be read ({error}). Check its disk.") from error

    def _file(self, number: int) -> BinaryIO:
        file = self._open.get(number)
        if file is not None:
            self._open.move_to_end(number)
            return file
        record = self._records[number]
        check_size(self._folder, record)
        while len(self._open) >= self._most:
            self._open.popitem(last=False)[1].close()
        file = self._open[number] = cast(BinaryIO, (self._folder / record.file).open("rb", buffering=0))
        return file
