"""A model in the layout of the authors' released checkpoints, for their code and for `import_pretrained`.

    RQ-VAE alone            OUTPUT/config.yaml, model.pt
    with RQ-Transformer     OUTPUT/rqvae/ and OUTPUT/rqtransformer/, each the same; and the tokenizer

model.pt holds a state_dict and, of an RQ-VAE's run that trained one, the discriminator's.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import RQVAELossConfig, SamplingConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.files import write_atomically
from megarq.inference.export import export_run
from megarq.inference.first_weights import FirstWeights, weights_of_checkpoint
from megarq.inference.model_folder import CONFIG, ModelInfo, new_folder, read_info
from megarq.inference.pretrained import load_pretrained, load_rqvae
from megarq.inference.runs import run_section
from megarq.rqvae import authors as rqvae_layout
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.transformer import authors as transformer_layout


def export_authors(
    source: str | Path,
    output: str | Path,
    step: int | None = None,
    weights: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelInfo:
    """Write a run's checkpoint, or an exported model, in the authors' layout.

    Args:
        source: the --output of train.py or train_rqvae.py, or an exported model.
        output: the folder to write; nothing that is there is replaced.
        step, weights: of a run, as in `export_run`.
        dtype: of the RQ-Transformer's weights.

    Returns:
        What an exported model's config.json says, or would.

    Raises:
        CheckpointError: as `export_run`; a disk that is full.
        ConfigError: `output` holds anything.
    """
    source, output = Path(source), Path(output).resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"{output} exists: this layout replaces nothing. Give --output another folder.")
    if (source / CONFIG).exists():
        if step is not None or weights is not None:
            raise ConfigError(f"--step {step}, --weights {weights}: {source} is exported already. Leave them out.")
        with new_folder(output) as folder:
            return _write_exported(source, folder, dtype)
    checkpoint = checkpoint_at(source, step)
    with new_folder(output) as folder:
        if checkpoint.metadata.get("architecture") == "rq-vae":
            return _write_rqvae_run(checkpoint, weights, folder)
        exported = folder / "exported"
        export_run(source, exported, step, weights, dtype)
        info = _write_exported(exported, folder, dtype)
        shutil.rmtree(exported)
        return info


def _write_rqvae_run(checkpoint: Checkpoint, weights: str | None, folder: Path) -> ModelInfo:
    first = weights_of_checkpoint(checkpoint, weights)
    rqvae = RQVAE(first.config)
    rqvae.load_state_dict(first.state)
    _write_rqvae(rqvae, folder, run_section(checkpoint, RQVAELossConfig, "loss"), first)
    return ModelInfo(first.config, fingerprint(rqvae))


def _write_exported(source: Path, folder: Path, dtype: torch.dtype) -> ModelInfo:
    info = read_info(source)
    if info.transformer is None:
        _write_rqvae(load_rqvae(source), folder)
        return info
    model = load_pretrained(source, dtype=dtype)
    _write_rqvae(model.rqvae, folder / "rqvae")
    document = transformer_layout.config_to_authors(info.transformer)
    if info.sampling != SamplingConfig():
        document["sampling"] = _sampling(info.sampling)
    state = {name: parameter.detach() for name, parameter in model.transformer.named_parameters()}
    state = transformer_layout.state_to_authors(state, info.transformer)
    _write(folder / "rqtransformer", document, {"state_dict": state})
    if info.tokenizer is not None:
        shutil.copyfile(source / info.tokenizer, folder / info.tokenizer)
    return info


def _write_rqvae(
    rqvae: RQVAE, folder: Path, loss: RQVAELossConfig | None = None, first: FirstWeights | None = None
) -> None:
    loss = loss or RQVAELossConfig()
    document = rqvae_layout.config_to_authors(rqvae.config, loss.reconstruction, loss.commitment_weight)
    content: dict[str, Any] = {"state_dict": rqvae_layout.state_to_authors(rqvae.state_dict(), rqvae.config)}
    if first is not None and first.discriminator:
        content["discriminator"] = dict(first.discriminator)
    _write(folder, document, content)


def _sampling(sampling: SamplingConfig) -> dict[str, Any]:
    """What `import_pretrained` reads back."""
    values = {"top_k": sampling.top_k, "top_p": sampling.top_p, "temp": sampling.temperature}
    if sampling.guidance != 1:  # theirs knows none
        values["guidance"] = sampling.guidance
    return {key: value for key, value in values.items() if value is not None}


def _write(folder: Path, document: Mapping[str, Any], content: Mapping[str, Mapping[str, Tensor]]) -> None:
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(document, sort_keys=False))
    try:
        torch.save(content, folder / "model.pt")
    except RuntimeError as error:  # what torch makes of a full disk
        raise CheckpointError(
            f"{folder / 'model.pt'} cannot be written ({str(error).splitlines()[0]}). Free space or choose another "
            "output folder, then run again."
        ) from error
