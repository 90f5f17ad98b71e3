"""Named tensors in safetensors files: written whole or not at all, read strictly, one tensor in memory at a time.

FOLDER/model.safetensors                            where it fits one file, or else
FOLDER/model-00001-of-00002.safetensors ..          parts, and
FOLDER/model.safetensors.index.json                 {"metadata": {"total_size": bytes}, "weight_map": {name: file}}
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megarq.errors import CheckpointError
from megarq.files import write_atomically
from megarq.parallel.topology import ALONE, TensorGroup

PART_BYTES = 5 * 10**9
"""Most bytes of one file, unless a single tensor is larger."""


def write_tensors(
    folder: Path, stem: str, like: Mapping[str, Tensor], read: Callable[[str], Tensor], part_bytes: int = PART_BYTES
) -> None:
    """Write tensors, holding one part of them at a time.

    Args:
        folder: exists already.
        stem: the files' name, before `.safetensors`.
        like: shape and dtype to write for each name; meta tensors will do.
        read: gives the tensor of a name, in any dtype, on any device.
        part_bytes: start another file rather than exceed this.

    Raises:
        CheckpointError: `read` gives another shape.
    """
    parts = _split(like, part_bytes)
    for number, names in enumerate(parts, start=1):
        tensors = {}
        for name in names:
            tensor = read(name).detach()
            if tensor.shape != like[name].shape:
                raise CheckpointError(
                    f"{name} is {list(tensor.shape)}, but the model needs {list(like[name].shape)}: "
                    "weights and configuration belong to different models. Use those of one run."
                )
            tensors[name] = tensor.to("cpu", like[name].dtype).contiguous()
        _save(folder / _file_name(stem, number, len(parts)), tensors)
    if len(parts) > 1:
        places = {name: _file_name(stem, number, len(parts)) for number, names in enumerate(parts, 1) for name in names}
        total = sum(tensor.nbytes for tensor in like.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomically(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1))


def read_tensors(
    folder: Path,
    stem: str,
    targets: Mapping[str, Tensor],
    store: Callable[[str, Tensor], None] | None = None,
    tp: TensorGroup = ALONE,
) -> None:
    """Read the tensors of the files one by one, of a parameter that is cut over a tensor group this rank's part.

    Args:
        folder, stem: as they were written.
        targets: what is to be read; shapes are held against these.
        store: takes each name and tensor, on the CPU and in the file's dtype; by default it is copied into its target.
        tp: the group that `partition_dim` of the targets refers to.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unknown or of another shape.
    """
    files = _find(folder, stem)
    found = {name for names in files.values() for name in names}
    problems = [f"missing {name}" for name in sorted(targets.keys() - found)]
    problems += [f"unknown {name}" for name in sorted(found - targets.keys())]
    if problems:
        raise _misfit(folder / f"{stem}.safetensors", problems)
    store = store or (lambda name, tensor: _copy(tensor, targets[name]))
    for path, names in files.items():
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in names}
                shapes = {name: (part.get_shape(), _whole_shape(targets[name], tp)) for name, part in slices.items()}
                problems = [
                    f"{name} is {found}, not {wanted}" for name, (found, wanted) in shapes.items() if found != wanted
                ]
                if problems:
                    raise _misfit(path, problems)
                for name in names:
                    store(name, slices[name][_own_part(targets[name], tp)])
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def _copy(tensor: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        target.copy_(tensor)


def _whole_shape(target: Tensor, tp: TensorGroup) -> list[int]:
    dim = getattr(target, "partition_dim", None)
    return [size * tp.size if place == dim else size for place, size in enumerate(target.shape)]


def _own_part(target: Tensor, tp: TensorGroup) -> tuple[slice, ...]:
    """Where the target lies in the whole tensor."""
    dim = getattr(target, "partition_dim", None)
    starts = [size * tp.rank if place == dim else 0 for place, size in enumerate(target.shape)]
    return tuple(slice(start, start + size) for start, size in zip(starts, target.shape, strict=True))


def _split(like: Mapping[str, Tensor], part_bytes: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, tensor in like.items():
        if parts[-1] and filled + tensor.nbytes > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += tensor.nbytes
    return parts


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}). Free space or choose another output folder, then run again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _find(folder: Path, stem: str) -> dict[Path, list[str]]:
    """The files that there should be, each with the names it should hold."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        try:
            with safe_open(whole, "pt") as file:
                return {whole: list(file.keys())}
        except (SafetensorError, OSError) as error:
            raise _damaged(whole, error) from error
    if not index.is_file():
        raise CheckpointError(f"{whole} is missing: copy or export the folder again.")
    files: dict[Path, list[str]] = {}
    try:
        for name, place in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(folder / Path(place).name, []).append(name)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from error
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, of {index.name}: copy or export it again.")
    return files


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}): it is damaged. Copy or export the folder again.")


def _misfit(path: Path, problems: list[str]) -> CheckpointError:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return CheckpointError(
        f"{path} does not fit its config.json: {'; '.join(problems[:5])}{more}. Use the two files of one export."
    )
