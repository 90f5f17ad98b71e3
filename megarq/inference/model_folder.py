"""The exported model on disk, but for its tensors: config.json, and how a folder appears whole or not at all.

FOLDER/config.json          {"format": "megarq-model", "version": 1,
                             "rqvae": {RQVAEConfig}, "rqvae_fingerprint": sha256,           an RQ-VAE folder ends here
                             "transformer": {RQTransformerConfig}, "sampling": {SamplingConfig},
                             "tokenizer": "tokenizer.json" | "tokenizer.model" | null,
                             "weights": "ema" | "param", "step": optimiser steps}
FOLDER/rqvae.safetensors
FOLDER/model.safetensors    or its parts, see tensor_files
FOLDER/tokenizer.json       or tokenizer.model
FOLDER/README.md            the model card
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from megarq.config.load import build
from megarq.config.models import RQTransformerConfig, RQVAEConfig
from megarq.config.run import SamplingConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.files import file_sha256, write_atomically

CONFIG = "config.json"
FORMAT, VERSION = "megarq-model", 1
TOKENIZERS = ("tokenizer.json", "tokenizer.model")

Config = TypeVar("Config")


@dataclass
class ModelInfo:
    """What config.json says."""

    rqvae: RQVAEConfig
    """The RQ-VAE's configuration."""
    rqvae_fingerprint: str
    """sha256 of the RQ-VAE's weights; code shards carry the same."""
    transformer: RQTransformerConfig | None = None
    """The RQ-Transformer's; none in the folder of an RQ-VAE."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How pictures are drawn unless told otherwise."""
    tokenizer: str | None = None
    """Name of the tokenizer's file, where there is one."""
    weights: str = "param"
    """Whether the weights are a moving average, "ema", or the last step's, "param"."""
    step: int | None = None
    """Optimiser steps behind the weights, where known."""


def write_info(folder: Path, info: ModelInfo) -> None:
    """Write config.json."""
    document = {"format": FORMAT, "version": VERSION, **asdict(info)}
    if info.transformer is None:
        document = {key: document[key] for key in ("format", "version", "rqvae", "rqvae_fingerprint")}
    write_atomically(folder / CONFIG, json.dumps(document, indent=2) + "\n")


def read_info(folder: Path) -> ModelInfo:
    """Read config.json. Raises CheckpointError where it is missing, damaged or of another format."""
    path = folder / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is not an exported model. Make one with tools/export.py."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): export the model again.") from error
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} is of format {found[0]!r} version {found[1]!r}; this release reads {FORMAT} version {VERSION}. "
            "Export the model again, or use the release that wrote it."
        )
    absent = [key for key in ("rqvae", "rqvae_fingerprint") if not document.get(key)]
    if absent:
        raise CheckpointError(f"{path} lacks {', '.join(absent)}: export the model again.")
    described = document.get("transformer")
    return ModelInfo(
        stored_config(RQVAEConfig, document["rqvae"], f"{path}: rqvae"),
        document["rqvae_fingerprint"],
        None if described is None else stored_config(RQTransformerConfig, described, f"{path}: transformer"),
        _stored_sampling(document.get("sampling", {}), path),
        document.get("tokenizer"),
        document.get("weights", "param"),
        document.get("step"),
    )


def model_fingerprint(folder: Path) -> str:
    """sha256 (hex) over the names and contents of a folder's configuration, weights and tokenizer: which model it is,
    wherever it lies. The card may be edited. Raises CheckpointError where a file cannot be read."""
    wanted = ("model*.safetensors", "rqvae.safetensors", *TOKENIZERS, CONFIG)
    sha256 = hashlib.sha256()
    try:
        for path in sorted({path for pattern in wanted for path in folder.glob(pattern)}):
            sha256.update(f"{path.name} {file_sha256(path)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): copy or export the folder again.") from error
    return sha256.hexdigest()


def stored_config(kind: type[Config], values: Any, source: str) -> Config:
    """A configuration dataclass from the mapping it was stored as. Raises CheckpointError where they do not fit."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{source} is {values!r}, not a section of keys: export or save it again.")
    try:
        return build(kind, [(source, values)])
    except ConfigError as error:
        raise CheckpointError(f"{error} Use the release that wrote it, or write it again.") from error


def _stored_sampling(values: Any, path: Path) -> SamplingConfig:
    """Sampling settings, which here may hold one value for each depth."""
    known = {entry.name for entry in fields(SamplingConfig)}
    if not isinstance(values, Mapping) or not values.keys() <= known:
        raise CheckpointError(f"{path}: sampling={values!r}: expected {', '.join(sorted(known))}. Export it again.")
    return SamplingConfig(**values)


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A temporary neighbour of `output` to fill; on success it takes that name, replacing an earlier export.

    Raises ConfigError where `output` holds anything but an exported model: nobody's files are deleted.
    """
    output = Path(output).resolve()
    foreign = _foreign_files(output)
    if foreign:
        raise ConfigError(
            f"{output} already holds {', '.join(foreign[:3])}, which no export writes: give --output another folder."
        )
    temporary, old = output.with_name(f".{output.name}.tmp"), output.with_name(f".{output.name}.old")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _foreign_files(folder: Path) -> list[str]:
    if folder.is_file():
        return ["a file"]
    ours = (CONFIG, *TOKENIZERS, "README.md", "model.safetensors.index.json", "rqvae.safetensors")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [
        name for name in names if name not in ours and not (name.startswith("model") and name.endswith(".safetensors"))
    ]
