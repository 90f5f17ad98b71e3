"""Reading code shards: any rows of any block, without unpacking anything. The format is told in manifest.py.

    codes = CodeShards.open("runs/demo/codes")                # checks that every shard is there and whole
    codes.read_codes(block, row, draw)                        # arrays [n] -> uint16 [n, H, W, D]; draw 0: argmin
    train, validation = codes.split(validation_shards=1)      # views; blocks are counted within each

A file offset is known for every row, so a row costs one positioned read of its own bytes. Captions lie one sample to a
line (code_writer.py); the line offsets of recently used blocks are kept, not the text.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from megarq.data.manifest import Manifest, ShardRecord, member_row_bytes
from megarq.data.order import IntArray
from megarq.errors import DataError

MAX_OPEN_FILES = 512
MAX_LINE_TABLES = 2048


class CodeShards:
    """The samples of a folder of code shards, or of some of its shards (a view)."""

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[int]) -> None:
        """The view of the shards with these numbers; users call `open`, then `subset` or `split`."""
        self.folder = folder
        self.manifest = manifest
        self.settings = manifest.settings
        self._shards = np.array(shards, np.int64)
        self._files = _OpenFiles([folder / manifest.shards[number].file for number in shards])
        self._line_tables: OrderedDict[int, IntArray] = OrderedDict()
        records = self._records()
        blocks = [block for record in records for block in record.blocks]
        self.block_sizes: IntArray = np.array([block.samples for block in blocks], np.int64)
        """[blocks] samples of each block."""
        self._shard_of_block: IntArray = np.array(
            [place for place, record in enumerate(records) for _ in record.blocks], np.int64
        )
        first_ids = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        in_view = np.cumsum(self.block_sizes) - self.block_sizes
        jumps = first_ids[self._shards] - np.cumsum([0, *(record.samples for record in records)])[:-1]
        self._first_id: IntArray = in_view + jumps[self._shard_of_block]
        self._row_bytes = member_row_bytes(self.settings)
        self._starts: dict[str, IntArray] = {}
        for name, row_bytes in self._row_bytes.items():
            ends = np.array([sum(block.members[name]) for block in blocks], np.int64)
            self._starts[name] = ends - self.block_sizes * row_bytes
        self._text = np.array([block.members["samples.json"] for block in blocks], np.int64).reshape(-1, 2)

    @classmethod
    def open(cls, folder: str | Path) -> "CodeShards":
        """All shards of a finished folder.

        Raises: DataError for a missing or damaged manifest, a missing shard, or one of another size than recorded.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        for shard in manifest.shards:
            check_size(folder, shard)
        return cls(folder, manifest, range(len(manifest.shards)))

    def subset(self, shards: Sequence[int]) -> "CodeShards":
        """The view of some of this view's shards, by their place in it. Sample ids stay those of the folder."""
        return CodeShards(self.folder, self.manifest, [self._shards[place] for place in shards])

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
    def captioned(self) -> int:
        """Samples of the view with at least one caption."""
        return sum(record.captioned for record in self._records())

    @property
    def labelled(self) -> int:
        """Samples of the view with a class."""
        return sum(record.labelled for record in self._records())

    @property
    def classes(self) -> int:
        """1 + the largest class in the view; 0 where there is none."""
        return max((record.classes for record in self._records()), default=0)

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
        return self._first_id[block] + row

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

    def captions(self, block: int, row: int) -> list[str]:
        """All captions of a sample."""
        return cast(list[str], self._text_entry(block, int(self.block_sizes[block]) + 2 + row))

    def key(self, block: int, row: int) -> str:
        """The name of a sample."""
        return cast(str, self._text_entry(block, 1 + row))

    def label(self, block: int, row: int) -> int | None:
        """The class of a sample, if it has one."""
        return cast(int | None, self._text_entry(block, 2 * int(self.block_sizes[block]) + 3 + row))

    def _records(self) -> list[ShardRecord]:
        return [self.manifest.shards[number] for number in self._shards]

    def _read(self, name: str, block: IntArray, row: IntArray, where: IntArray, out: npt.NDArray[Any]) -> None:
        """Fill out[where] with those rows of member `name`; file by file, in the order of the bytes."""
        row_bytes = self._row_bytes[name]
        shards = self._shard_of_block[block[where]]
        offsets = self._starts[name][block[where]] + row[where] * row_bytes
        flat = out.reshape(len(out), -1).view(np.uint8)
        for i in np.lexsort((offsets, shards)).tolist():
            self._files.read_into(int(shards[i]), int(offsets[i]), flat[where[i]])

    def _text_entry(self, block: int, line: int) -> object:
        """One line of a block's samples.json."""
        shard = int(self._shard_of_block[block])
        offset, _ = self._text[block]
        ends = self._line_ends(block)
        buffer = np.empty(int(ends[line] - ends[line - 1]), np.uint8)
        self._files.read_into(shard, int(offset + ends[line - 1]), buffer)
        try:
            return json.loads(buffer.tobytes().rstrip(b",\n"))
        except ValueError as error:
            raise self._damaged(block, str(error)) from error

    def _line_ends(self, block: int) -> IntArray:
        """Offset behind each line of a block's samples.json, from the cache of recently used blocks."""
        if block in self._line_tables:
            self._line_tables.move_to_end(block)
            return self._line_tables[block]
        offset, size = self._text[block]
        buffer = np.empty(int(size), np.uint8)
        self._files.read_into(int(self._shard_of_block[block]), int(offset), buffer)
        ends = np.flatnonzero(buffer == ord("\n")) + 1
        if len(ends) != 3 * self.block_sizes[block] + 4:
            raise self._damaged(block, f"{len(ends)} lines")
        self._line_tables[block] = ends
        if len(self._line_tables) > MAX_LINE_TABLES:
            self._line_tables.popitem(last=False)
        return ends

    def _damaged(self, block: int, reason: str) -> DataError:
        name = self._records()[self._shard_of_block[block]].file
        return DataError(
            f"{self.folder / name}: the captions of a block are damaged ({reason}). Copy the shard again, or remove it "
            "and run tools/pretokenize.py again."
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


class _OpenFiles:
    """Positioned reads from many files, of which a bounded number is open. Each process opens its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def read_into(self, number: int, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill `buffer` from file `number`. Raises: DataError where it has gone or ends before."""
        try:
            count = os.preadv(self._file(number).fileno(), [buffer.data], offset)
        except OSError as error:
            raise DataError(
                f"code shard {self._paths[number]} cannot be read ({error}). Check that it is still there."
            ) from error
        if count != len(buffer):
            raise DataError(f"code shard {self._paths[number]} ends at {offset + count}: truncated. Copy it again.")

    def _file(self, number: int) -> BinaryIO:
        file = self._open.get(number)
        if file is None:
            file = self._open[number] = cast(BinaryIO, self._paths[number].open("rb", buffering=0))
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        return file
