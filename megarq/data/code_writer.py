"""Writing one code shard: an uncompressed tar of blocks whose bytes depend on their content alone.

    000003.tar:  000000.codes.npy  000000.draw1.npy .. 000000.drawN.npy  [000000.latents.npy]  000000.samples.json
                 000000.crc32.npy  000001.codes.npy  ...

`samples.json` is one JSON object of three lists, {"keys", "captions", "labels"}, with one sample's entry on each line,
so that a reader can take one sample's captions out without parsing the block:

    {"keys": [            line 0
    "cat7",               lines 1 .. n
    "dog1"
    ],"captions": [       line n + 1
    ["a cat", "my cat"],  lines n + 2 .. 2n + 1
    []
    ],"labels": [         line 2n + 2
    null,                 lines 2n + 3 .. 3n + 2
    4
    ]}                    line 3n + 3
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from megarq.data.files import HashingFile, data_file
from megarq.data.manifest import CHECKSUMS, SECTIONS, BlockRecord, CodeSettings, ShardRecord, checksummed


@dataclass(frozen=True)
class CodeBlock:
    """Up to `block_size` encoded samples."""

    codes: npt.NDArray[np.uint16]
    """[n, H, W, D] argmin stacks."""
    draws: Sequence[npt.NDArray[np.uint16]]
    """[n, H, W, D] drawn stacks."""
    latents: npt.NDArray[np.float16] | None
    """[n, H, W, C], where they are stored."""
    keys: Sequence[str]
    """n names."""
    captions: Sequence[Sequence[str]]
    """n lists of captions."""
    labels: Sequence[int | None]
    """n classes."""


def write_shard(
    folder: Path, index: int, settings: CodeSettings, source: str, blocks: Iterable[CodeBlock]
) -> ShardRecord:
    """Write `{index:06d}.tar`, which appears under that name only when whole.

    Returns its record, with `skipped` 0, no perplexity and no faults: the caller knows them. Raises: DataError where
    the folder cannot be written.
    """
    path = folder / f"{index:06d}.tar"
    samples = captioned = labelled = classes = 0
    records = []
    with data_file(path) as raw:
        file = HashingFile(raw)
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, block in enumerate(blocks):
                records.append(_write_block(tar, f"{number:06d}", settings, block))
                samples += len(block.keys)
                captioned += sum(bool(captions) for captions in block.captions)
                labels = [label for label in block.labels if label is not None]
                labelled += len(labels)
                classes = max([classes, *(label + 1 for label in labels)])
        size, sha256 = file.tell(), file.hexdigest()
    return ShardRecord(
        path.name, source, sha256, size, samples, captioned, labelled, classes, 0, (), {}, tuple(records)
    )


def _write_block(tar: tarfile.TarFile, key: str, settings: CodeSettings, block: CodeBlock) -> BlockRecord:
    samples = len(block.keys)
    assert samples == len(block.captions) == len(block.labels)
    assert len(block.draws) == settings.draws and (block.latents is None) == (settings.latent_shape is None)
    stacks = {"codes.npy": block.codes} | {f"draw{n}.npy": draw for n, draw in enumerate(block.draws, start=1)}
    content: dict[str, bytes] = {}
    for name, stack in stacks.items():
        content[name] = _npy_bytes(stack, np.dtype("<u2"), (samples, *settings.code_shape))
    if block.latents is not None:
        content["latents.npy"] = _npy_bytes(block.latents, np.dtype("<f2"), (samples, *(settings.latent_shape or ())))
    content["samples.json"] = samples_json(block.keys, block.captions, block.labels)
    checksums = np.stack([checksums_of(part, content, samples) for part in checksummed(settings)], axis=1)
    content[CHECKSUMS] = _npy_bytes(checksums, np.dtype("<u4"), checksums.shape)
    members = {}
    for name, data in content.items():
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size = len(data)
        members[name] = (tar.offset + tarfile.BLOCKSIZE, len(data))
        tar.addfile(info, io.BytesIO(data))
    return BlockRecord(key, samples, members)


def checksums_of(part: str, content: Mapping[str, bytes], samples: int) -> npt.NDArray[np.uint32]:
    """[n] of every sample's bytes in one part of a block, given its members. Raises: ValueError where one is cut."""
    rows: Iterable[bytes | memoryview]
    if part in SECTIONS:
        first = SECTIONS.index(part) * (samples + 1) + 1
        rows = content["samples.json"].splitlines(keepends=True)[first : first + samples]
    else:
        array = np.load(io.BytesIO(content[part]), allow_pickle=False)
        rows = [row.data for row in array.reshape(samples, -1).view(np.uint8)]
    return np.fromiter(map(zlib.crc32, rows), "<u4", samples)


def _npy_bytes(array: npt.NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    assert array.shape == shape and array.dtype == dtype, f"{array.dtype} {array.shape}, not {dtype} {shape}"
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def samples_json(keys: Sequence[str], captions: Sequence[Sequence[str]], labels: Sequence[int | None]) -> bytes:
    """The text member of a block: valid JSON with one entry on each line, as the head of this file shows."""
    sections = [
        f'"{name}": [\n' + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]"
        for name, entries in (("keys", keys), ("captions", captions), ("labels", labels))
    ]
    return ("{" + ",".join(sections) + "}\n").encode("utf-8", errors="replace")
