"""One rank's file: safetensors, written tensor by tensor and read run by run; neither needs a second copy in memory.

    8 bytes: length of the header | JSON {key: {dtype, shape, data_offsets}} | the tensors' bytes, without gaps

The library's own functions want all tensors in memory to write, and map whole files to read.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarq.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's numbers lie in its file."""

    dtype: torch.dtype
    count: int
    offset: int
    """First byte, in the file."""


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write tensors flattened, one after the other; returns the file's sha256, taken on the way."""
    aligned = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in aligned:
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def contents() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for _, tensor in aligned:
            yield _bytes_of(tensor.detach().reshape(-1).cpu().contiguous())

    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in contents():
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensor_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, int, int]]]:
    """A file's metadata, and of each tensor the dtype's name, its first byte in the file and the one after its last.

    Raises ValueError, KeyError or TypeError for another file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header claims {length} bytes")
        entries = json.loads(file.read(length))
    data = 8 + length
    metadata = entries.pop("__metadata__")
    places = {key: (entry["dtype"], *entry["data_offsets"]) for key, entry in entries.items()}
    return metadata, {key: (dtype, data + start, data + end) for key, (dtype, start, end) in places.items()}


def stored_tensor(dtype: str, start: int, end: int) -> StoredTensor:
    """The tensor of an entry of a header. Raises KeyError for an unknown dtype."""
    found = _DTYPES[dtype]
    return StoredTensor(found, (end - start) // found.itemsize, start)


def read_numbers(file: BufferedReader, stored: StoredTensor, start: int, into: Tensor) -> None:
    """Fill `into` [n] with a stored tensor's numbers from `start` on. Raises CheckpointError where the file ends."""
    first = stored.offset + start * stored.dtype.itemsize
    file.seek(first)
    found = file.readinto(_bytes_of(into))
    if found != into.nbytes:
        raise CheckpointError(f"{file.name} ends at byte {first + found}: it was cut short. Use another step's folder.")


class OpenFiles:
    """Files kept open for reading, at most `limit` of them: the one used longest ago is closed for another."""

    def __init__(self, limit: int = 512) -> None:
        """The default is half of what a process may usually open."""
        self._limit = limit
        self._files: OrderedDict[Path, BufferedReader] = OrderedDict()

    def get(self, path: Path) -> BufferedReader:
        """The file, open."""
        if path not in self._files:
            if len(self._files) == self._limit:
                self._files.popitem(last=False)[1].close()
            self._files[path] = path.open("rb")
        self._files.move_to_end(path)
        return self._files[path]

    def close(self) -> None:
        """Close all."""
        while self._files:
            self._files.popitem()[1].close()


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor [n]."""
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data  # one number may have any stride
