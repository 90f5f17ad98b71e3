"""The description of a folder of code shards: `manifest.json`, and one record beside each shard until it is complete.

    {"format": "megarq-codes", "version": 3,
     "samples": 1797, "captioned": 1797, "labelled": 0, "classes": 0, "skipped": 0,
     "code_shape": [8, 8, 4], "codebook_sizes": [256, 256, 256, 256], "draws": 8, "temperature": 0.5,
     "latent_shape": [8, 8, 64] or null, "fingerprint": "9f3c...", "transform": "center", "resolution": 32, "seed": 0,
     "batch_size": 64, "block_size": 1024, "precision": "fp32", "compiled": false, "caption_field": null,
     "threads": 0,
     "faults": {"unreadable image": 3}, "perplexity": [31.2, 40.1, 55.0, 61.8],
     "shards": [{"file": "000000.tar", "sha256": "...", "bytes": 7096320, "samples": 1797, ...,
                 "blocks": [{"key": "000000", "samples": 1024, "members": {"codes.npy": [512, 524416], ...}}, ...]}]}

A member's two numbers are the byte offset and the size of its data in the tar. The array of an .npy member is the tail
of its data, so row i of n begins at offset + size - (n - i) * bytes per row. Latents are float16 [n, H, W, C].
crc32.npy is uint32 [n, parts]: of each sample the CRC-32 of its bytes in each part, as `checksummed` lists them.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megarq.data.files import data_file
from megarq.errors import DataError

FORMAT = "megarq-codes"
VERSION = 3
MANIFEST = "manifest.json"
CHECKSUMS = "crc32.npy"
"""The member of a block that holds the checksums of its samples."""
SECTIONS = ("keys", "captions", "labels")
"""Of a block's samples.json, in order: n + 1 lines each, the first of them its head."""


@dataclass(frozen=True)
class CodeSettings:
    """What the bytes of the shards follow from, besides the pictures. All shards of a folder share them."""

    code_shape: tuple[int, int, int]
    """(H, W, D) of a code stack."""
    codebook_sizes: tuple[int, ...]
    """Codes in the codebook of each depth."""
    draws: int
    """Drawn stacks beside the argmin stack."""
    temperature: float
    """Temperature of the distribution Q that the stacks are drawn from."""
    latent_shape: tuple[int, int, int] | None
    """(H, W, C) of the stored latents, where they are stored."""
    fingerprint: str
    """sha256 of the RQ-VAE's weights."""
    transform: str
    """Name of the transform from pictures to the RQ-VAE's input."""
    resolution: int
    """Height and width of that input in pixels."""
    seed: int
    """Seed of the draws and of the transform."""
    batch_size: int
    """Pictures in one pass of the encoder."""
    block_size: int
    """Largest number of samples in a block."""
    precision: str = "fp32"
    """Arithmetic of the encoder: fp32, bf16 or fp16. Distances are fp32 in each."""
    compiled: bool = False
    """Whether the encoder was compiled, which rounds a little differently."""
    caption_field: str | None = None
    """Field of a picture's .json that its captions were taken from, where one was chosen."""
    threads: int = 0
    """Threads of the encoder on a CPU, whose sums round differently with another number; 0 on a GPU."""


@dataclass(frozen=True)
class BlockRecord:
    """One block: the samples whose codes, draws and captions lie together."""

    key: str
    """Name of the block's members in the tar, up to the first dot."""
    samples: int
    """Samples in the block."""
    members: dict[str, tuple[int, int]]
    """(byte offset, size) of each member's data by the rest of its name, such as "codes.npy"."""


@dataclass(frozen=True)
class ShardRecord:
    """One finished tar."""

    file: str
    """Its name in the folder."""
    source: str
    """Name of the image shard that it was made from."""
    sha256: str
    """Checksum of the whole tar."""
    bytes: int
    """Its size."""
    samples: int
    """Samples in it."""
    captioned: int
    """Samples with at least one caption."""
    labelled: int
    """Samples with a class."""
    classes: int
    """1 + the largest class; 0 where there is none."""
    skipped: int
    """Pictures of the image shard that could not be used."""
    perplexity: tuple[float, ...]
    """exp(entropy of Q) at each depth, averaged over the first block; empty where there are no samples."""
    faults: dict[str, int]
    """What was wrong with the image shard's samples, used or not: how many of each kind."""
    blocks: tuple[BlockRecord, ...]
    """Its blocks, in order."""
    source_bytes: int = 0
    """Size of the image shard when it was read, where that is a local file."""


@dataclass(frozen=True)
class Manifest:
    """A finished folder of code shards."""

    settings: CodeSettings
    """What all shards share."""
    shards: tuple[ShardRecord, ...]
    """The shards, in order."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def perplexity(self) -> tuple[float, ...]:
        """exp(entropy of Q) at each depth, averaged over the first block of the first shard that has one."""
        return next((shard.perplexity for shard in self.shards if shard.samples), ())

    @property
    def faults(self) -> dict[str, int]:
        """What was wrong with the samples of all image shards: how many of each kind."""
        return dict(sum((Counter(shard.faults) for shard in self.shards), Counter[str]()))

    def save(self, folder: Path) -> None:
        """Write manifest.json, atomically."""
        totals = {
            name: sum(getattr(shard, name) for shard in self.shards)
            for name in ("samples", "captioned", "labelled", "skipped")
        }
        content = (
            {"format": FORMAT, "version": VERSION}
            | totals
            | {"classes": max((shard.classes for shard in self.shards), default=0)}
            | asdict(self.settings)
            | {"faults": self.faults, "perplexity": self.perplexity, "shards": [asdict(shard) for shard in self.shards]}
        )
        _write_json(folder / MANIFEST, content)

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Read manifest.json. Raises: DataError where it is missing, damaged, of another version or inconsistent."""
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{folder} holds no {MANIFEST}: it is no finished folder of code shards. "
                "Make one, or finish it, with tools/pretokenize.py."
            )
        content = _read_json(path)
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise DataError(
                f"{path}: format {content.get('format')!r} version {content.get('version')!r}, "
                f"but this version of MegaRQ reads {FORMAT!r} version {VERSION}. Make the shards again."
            )
        try:
            settings = settings_from(content)
            manifest = Manifest(settings, tuple(_shard_from(shard, settings) for shard in content["shards"]))
            if manifest.samples != content["samples"]:
                raise ValueError(f"the shards have {manifest.samples} samples, the total says {content['samples']}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {_reason(error)}. Make the shards again.") from error
        return manifest


def save_record(folder: Path, settings: CodeSettings, shard: ShardRecord) -> None:
    """Write the record of a finished shard beside it, until all are gathered in the manifest."""
    _write_json(record_path(folder, shard.file), {"settings": asdict(settings), "shard": asdict(shard)})


def load_record(folder: Path, file: str) -> tuple[CodeSettings, ShardRecord] | None:
    """The record beside a shard, or None where there is none. Raises: DataError where it is damaged."""
    path = record_path(folder, file)
    if not path.is_file():
        return None
    content = _read_json(path)
    try:
        settings = settings_from(content["settings"])
        return settings, _shard_from(content["shard"], settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {_reason(error)}. Remove it to make its shard again.") from error


def record_path(folder: Path, file: str) -> Path:
    """Where the record of shard `file` lies until the manifest is written."""
    return folder / Path(file).with_suffix(".json").name


def settings_from(content: dict[str, Any]) -> CodeSettings:
    """The settings among the fields of a JSON object. Raises: KeyError, TypeError or ValueError where damaged."""
    values = {field.name: content[field.name] for field in fields(CodeSettings)}
    for name in ("code_shape", "codebook_sizes", "latent_shape"):
        values[name] = None if values[name] is None else tuple(int(size) for size in values[name])
    settings = CodeSettings(**values)
    if len(settings.code_shape) != 3 or len(settings.codebook_sizes) != settings.code_shape[2]:
        raise ValueError(f"code_shape {settings.code_shape} with codebook_sizes {settings.codebook_sizes}")
    return settings


def _shard_from(content: dict[str, Any], settings: CodeSettings) -> ShardRecord:
    row_bytes = member_row_bytes(settings)
    blocks = tuple(_block_from(block, row_bytes, int(content["bytes"])) for block in content["blocks"])
    shard = ShardRecord(**content | {"blocks": blocks, "perplexity": tuple(content["perplexity"])})
    if not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", shard.file):
        raise ValueError(f"{shard.file!r} is no plain name of a tar in this folder")
    if shard.samples != sum(block.samples for block in blocks):
        raise ValueError(f"{shard.file} claims {shard.samples} samples, but its blocks hold another number")
    return shard


def _block_from(content: dict[str, Any], row_bytes: dict[str, int], shard_bytes: int) -> BlockRecord:
    members = {name: (int(offset), int(size)) for name, (offset, size) in content["members"].items()}
    block = BlockRecord(**content | {"members": members})
    for name, bytes_of_row in row_bytes.items():
        offset, size = members[name]
        if offset < 0 or size < block.samples * bytes_of_row or offset + size > shard_bytes:
            raise ValueError(f"member {block.key}.{name} at {offset} of size {size} does not fit")
    return block


def checksummed(settings: CodeSettings) -> list[str]:
    """Of what a sample's checksums are, in order: its row of each array, and its line in each section of the text."""
    return [*_array_row_bytes(settings), *SECTIONS]


def member_row_bytes(settings: CodeSettings) -> dict[str, int]:
    """Bytes of one sample in each member that a block must have (0 for the JSON, whose rows differ)."""
    return _array_row_bytes(settings) | {"samples.json": 0, CHECKSUMS: 4 * len(checksummed(settings))}


def _array_row_bytes(settings: CodeSettings) -> dict[str, int]:
    height, width, depth = settings.code_shape
    names = ["codes.npy", *(f"draw{draw}.npy" for draw in range(1, settings.draws + 1))]
    sizes = dict.fromkeys(names, height * width * depth * 2)
    if settings.latent_shape is not None:
        sizes["latents.npy"] = settings.latent_shape[0] * settings.latent_shape[1] * settings.latent_shape[2] * 2
    return sizes


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Make the shards again, or copy the folder again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object. Make the shards again.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with data_file(path) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")
