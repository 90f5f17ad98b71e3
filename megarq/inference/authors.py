"""From checkpoints in the layout of the authors' released ones to an exported model.

    RQVAE_DIR/config.yaml, model.pt              {"state_dict": ..., maybe "state_dict_ema", "discriminator"}
    RQTRANSFORMER_DIR/config.yaml, model.pt      {"state_dict": ..., maybe "state_dict_ema"}

A state dict may have DistributedDataParallel's `module.` before all names, and the discriminator's may stand within the
RQ-VAE's, as `discriminator.main.0.weight` .. What the tensors are called, each network's own room knows:
megarq.rqvae.authors and megarq.transformer.authors.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from megarq.config.models import RQTransformerConfig
from megarq.config.run import SamplingConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.inference.model_card import model_card
from megarq.inference.model_folder import ModelInfo, new_folder, write_info
from megarq.inference.pretrained import check_fit, check_tokenizer, write_rqvae, write_transformer
from megarq.inference.settings import check_guidance, depth_settings
from megarq.rqvae.authors import config_from_authors as rqvae_config_from_authors
from megarq.rqvae.authors import state_from_authors as rqvae_state_from_authors
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.tokenizer import TextTokenizer
from megarq.transformer.authors import config_from_authors, state_from_authors

_KEYS = {"param": "state_dict", "ema": "state_dict_ema"}
_DISCRIMINATOR, _WRAPPED = "discriminator.", "module."


class AuthorsCheckpoint(NamedTuple):
    """A config.yaml with the weights beside it."""

    document: Mapping[str, Any]
    state: Mapping[str, Tensor]
    weights: str
    discriminator: Mapping[str, Tensor]
    """State dict of the RQ-VAE's discriminator; empty where the file holds none."""


def import_pretrained(
    rqvae: str | Path,
    output: str | Path,
    rqtransformer: str | Path | None = None,
    tokenizer: str | Path | None = None,
    weights: str | None = None,
) -> ModelInfo:
    """Write an exported model (or, without an RQ-Transformer, an RQ-VAE folder) from the authors' checkpoints.

    Args:
        rqvae: folder with config.yaml and model.pt, or another single .pt file.
        output: the folder to write; an earlier export there is replaced when the new one is whole.
        rqtransformer: folder of the RQ-Transformer.
        tokenizer: tokenizer.json or .model of a text model; without it the model answers token ids alone.
        weights: "ema", "param", or None for the last step's (what the authors' own loader reads).

    Returns:
        What the folder's config.json says.

    Raises:
        CheckpointError: a file is missing, damaged, holds more than tensors, or the two models do not fit.
        ConfigError: settings that no model has; a folder that holds anything but an exported model.
        DataError: the tokenizer is missing or damaged.
    """
    source = read_checkpoint(rqvae, weights)
    model = RQVAE(rqvae_config_from_authors(source.document)).eval()
    model.load_state_dict(rqvae_state_from_authors(source.state, model.config))
    info = ModelInfo(model.config, fingerprint(model))
    if rqtransformer is None:
        if tokenizer is not None:
            raise ConfigError(
                f"--tokenizer {tokenizer} without --rqtransformer: an RQ-VAE alone reads no text. Leave it out."
            )
        with new_folder(output) as folder:
            write_rqvae(model, folder)
            _finish(folder, info, Path(output).resolve().name)
        return info
    return _import_model(model, info, Path(rqtransformer), Path(output).resolve(), tokenizer, weights)


def _import_model(
    rqvae: RQVAE, info: ModelInfo, source: Path, output: Path, tokenizer: str | Path | None, weights: str | None
) -> ModelInfo:
    document, state, info.weights, _ = read_checkpoint(source, weights)
    config = info.transformer = config_from_authors(document)
    config.validate()
    check_fit(config, rqvae.config)
    info.sampling = _sampling(document, config)
    text = None if tokenizer is None else TextTokenizer.load(tokenizer)
    if text is not None:
        if config.condition != "text":
            raise ConfigError(
                f"--tokenizer {tokenizer}: this model's condition is {config.condition}, not text. Leave it out."
            )
        check_tokenizer(text, config)
    ours = state_from_authors(state, config)
    with new_folder(output) as folder:
        if text is not None:
            info.tokenizer = text.save(folder).name
        write_rqvae(rqvae, folder)
        write_transformer(folder, config, ours.__getitem__, torch.float32)
        _finish(folder, info, output.name)
    return info


def _finish(folder: Path, info: ModelInfo, title: str) -> None:
    (folder / "README.md").write_text(model_card(info, title), encoding="utf-8")
    write_info(folder, info)


def read_checkpoint(folder: str | Path, weights: str | None = None) -> AuthorsCheckpoint:
    """Read config.yaml and the weights of a folder, which stay on disk until used. Raises CheckpointError."""
    folder = Path(folder)
    document = read_document(folder)
    path = _weights_file(folder)
    content = _read_tensors(path)
    if weights not in (None, *_KEYS):
        raise ConfigError(f"--weights {weights}: use ema or param.")
    present = [kind for kind in ("param", "ema") if isinstance(content.get(_KEYS[kind]), Mapping)]
    kind = weights or (present[0] if present else "param")
    if kind not in present:
        raise CheckpointError(
            f"{path} has no {_KEYS[kind]!r}, only {', '.join(map(repr, content)) or 'nothing'}: "
            f"{'use --weights ' + present[0] if present else 'it is not a checkpoint of this layout'}."
        )
    return AuthorsCheckpoint(
        document, _unwrapped(content[_KEYS[kind]]), kind, _discriminator(content, _KEYS[present[0]])
    )


def _discriminator(content: Mapping[str, Any], key: str) -> Mapping[str, Tensor]:
    """The discriminator of a file: by itself, or within the state dict of that key."""
    alone = content.get("discriminator")
    if isinstance(alone, Mapping):
        return _unwrapped(alone)
    state = _unwrapped(content[key])
    within = {name: tensor for name, tensor in state.items() if name.startswith(_DISCRIMINATOR)}
    return _unwrapped({name.removeprefix(_DISCRIMINATOR): tensor for name, tensor in within.items()})


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict under the names that it has without DistributedDataParallel."""
    if not all(name.startswith(_WRAPPED) for name in state):
        return state
    return {name.removeprefix(_WRAPPED): tensor for name, tensor in state.items()}


def read_document(folder: str | Path) -> Mapping[str, Any]:
    """Read a folder's config.yaml alone. Raises CheckpointError where it describes no model."""
    path = Path(folder) / "config.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        below = sorted(str(found.parent) for found in Path(folder).glob("*/config.yaml"))
        nearest = f" There {'is' if len(below) == 1 else 'are'} {', '.join(below)}." if below else ""
        raise CheckpointError(
            f"{path} is missing: give the folder that holds config.yaml and model.pt.{nearest}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not YAML ({error}): copy it again.") from error
    if not isinstance(document, Mapping) or not isinstance(document.get("arch"), Mapping):
        raise CheckpointError(f"{path} has no section arch: give the config.yaml that was published beside model.pt.")
    return document


def _weights_file(folder: Path) -> Path:
    if (folder / "model.pt").is_file():
        return folder / "model.pt"
    others = sorted(folder.glob("*.pt"))
    if len(others) != 1:
        found = ", ".join(path.name for path in others) or "no .pt file"
        raise CheckpointError(f"{folder} has no model.pt but {found}: leave one checkpoint beside config.yaml.")
    return others[0]


def _read_tensors(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read safely ({_first_line(error)}): it is damaged, or holds more than tensors, "
            "which may run a stranger's code. Save its state_dict alone in another file."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({_first_line(error)}): copy it again.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}: expected a mapping with a state_dict.")
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sampling(document: Mapping[str, Any], config: RQTransformerConfig) -> SamplingConfig:
    """Their `sampling: {top_k, top_p, temp}`, where given, with the `guidance` that our export adds."""
    section = document.get("sampling") or {}
    top_k, top_p, temperature = (
        _one_or_each(section.get(key), default) for key, default in (("top_k", None), ("top_p", 1.0), ("temp", 1.0))
    )
    depth_settings(config.sizes, top_k, top_p, temperature)
    return SamplingConfig(top_k, top_p, temperature, check_guidance(section.get("guidance", 1.0), config.condition))


def _one_or_each(value: Any, default: Any) -> Any:
    if value is None:
        return default
    if not isinstance(value, list):
        return value
    return value[0] if len(set(value)) == 1 else value
