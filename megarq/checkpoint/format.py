"""The checkpoint on disk: tensors under their full names, in files written by all ranks, free of how the run was cut.

    RUN/checkpoints/
        latest                          the name of the newest whole checkpoint, written after it
        step-00000120/
            rank-00000.safetensors      this rank's fragments, keyed "<kind>/<parameter name>"
            rank-00001.safetensors
            metadata.json               written last: a folder without it is not a checkpoint

Worked example: a parameter [6, 4] under tp=2 (cut along dimension 0) and ZeRO over dp=2. Data rank 1 of tensor rank 0
holds the flat range 6..11 of its [3, 4] slice: Fragment(shape=[6, 4], dim=0, part=0, parts=2, start=6), 6 numbers.

Kinds: "param" (fp32 master weights), "exp_avg" and "exp_avg_sq" (Adam's moments), "ema", "buffer" (whole, from rank 0).
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megarq.errors import CheckpointError

VERSION = 1
METADATA = "metadata.json"
_HEADER = "fragments"
_DAMAGED = "the checkpoint is damaged. Write the step before it into `latest` to go on from there."


@dataclass(frozen=True)
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

    def slice_of(self, full: Tensor) -> Tensor:
        """The slice of the full tensor that the fragment lies in."""
        return full if self.parts == 1 else full.chunk(self.parts, self.dim)[self.part]


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def write_rank_file(folder: Path, rank: int, tensors: Mapping[str, tuple[Fragment, Tensor]]) -> dict[str, Any]:
    """Write one rank's fragments, keyed "<kind>/<name>"; returns the file's entry for the metadata."""
    path = folder / rank_file(rank)
    header = {key: asdict(fragment) for key, (fragment, _) in tensors.items()}
    flat = {key: tensor.detach().reshape(-1).cpu().contiguous() for key, (_, tensor) in tensors.items()}
    save_file(flat, path, metadata={_HEADER: json.dumps(header)})
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


class Checkpoint:
    """One checkpoint, opened for reading; tensors are read when asked for."""

    def __init__(self, folder: Path, metadata: dict[str, Any]) -> None:
        self.folder = folder
        self.metadata = metadata
        self._places: dict[str, list[tuple[Path, Fragment]]] = defaultdict(list)
        for entry in metadata["files"]:
            for key, fragment in _read_header(folder / entry["name"]).items():
                self._places[key].append((folder / entry["name"], fragment))

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
                raise CheckpointError(f"{path} {found}, {entry['bytes']} were written: {_DAMAGED}")
        return cls(folder, metadata)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Read this rank's share of the files through. Raises CheckpointError where a byte is not the one written."""
        for entry in self.metadata["files"][rank::world_size]:
            path = self.folder / entry["name"]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise CheckpointError(f"{path} has the sha256 {digest}, {entry['sha256']} was written: {_DAMAGED}")

    def names(self, kind: str = "param") -> list[str]:
        """Full names of the tensors of a kind, sorted."""
        prefix = f"{kind}/"
        return sorted(key.removeprefix(prefix) for key in self._places if key.startswith(prefix))

    def tensor(self, name: str, kind: str = "param") -> Tensor:
        """One full tensor, put together from its fragments. Raises CheckpointError where any part is missing."""
        places = self._places.get(f"{kind}/{name}")
        if not places:
            raise CheckpointError(f"{self.folder} holds no {kind} of {name}: use a checkpoint of this model.")
        shape, key = places[0][1].shape, f"{kind}/{name}"
        slices: dict[tuple[int, int, int], Tensor] = {}
        covered = 0
        full: Tensor | None = None
        for path, fragment in places:
            with safe_open(path, "pt") as file:
                numbers = file.get_tensor(key)
            if full is None:
                full = torch.empty(shape, dtype=numbers.dtype)
            place = (fragment.dim, fragment.part, fragment.parts)
            if place not in slices:
                slices[place] = torch.empty_like(fragment.slice_of(full), memory_format=torch.contiguous_format)
            slices[place].view(-1)[fragment.start : fragment.start + numbers.numel()] = numbers
            covered += numbers.numel()
        assert full is not None
        if covered != prod(shape):
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} has {covered} of {prod(shape)} numbers. The checkpoint is damaged; "
                "use another step's folder."
            )
        for (dim, part, parts), values in slices.items():
            Fragment(shape, dim, part, parts).slice_of(full).copy_(values)
        return full


def _is_file_entry(entry: Any) -> bool:
    """Whether an entry of the metadata names a file of the folder itself."""
    if not isinstance(entry, dict) or not {"name", "bytes", "sha256"} <= entry.keys():
        return False
    return isinstance(entry["name"], str) and Path(entry["name"]).name == entry["name"]


def _read_header(path: Path) -> dict[str, Fragment]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {_DAMAGED}") from error
    return {key: Fragment(**{**fields, "shape": tuple(fields["shape"])}) for key, fields in header.items()}
