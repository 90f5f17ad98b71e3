"""From a training run to one folder that needs neither the run nor DeepSpeed.

RUN of train.py         -> config.json, model.safetensors, rqvae.safetensors, tokenizer, README.md
RUN of train_rqvae.py   -> config.json, rqvae.safetensors, README.md
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.models import RQTransformerConfig
from megarq.config.run import SamplingConfig
from megarq.errors import CheckpointError
from megarq.inference.model_card import model_card
from megarq.inference.model_folder import TOKENIZERS, ModelInfo, new_folder, write_info
from megarq.inference.pretrained import (
    check_fit,
    check_tokenizer,
    load_rqvae,
    write_rqvae,
    write_transformer,
)
from megarq.inference.runs import check_architecture, choose_weights, rqvae_of_checkpoint, run_section
from megarq.inference.tensor_files import PART_BYTES
from megarq.rqvae.model import fingerprint
from megarq.text.tokenizer import TextTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of the precisions that weights are stored and used in."""
_SHOWN = ("model", "objective", "train", "parallel", "sampling", "loss", "data")


def export_run(
    run: str | Path,
    output: str | Path,
    step: int | None = None,
    weights: str | None = None,
    dtype: torch.dtype = torch.float32,
    part_bytes: int = PART_BYTES,
) -> ModelInfo:
    """Export a checkpoint of a run. At most one part of the weights is in memory at a time.

    Args:
        run: the --output of train.py or train_rqvae.py.
        output: the folder to write; an earlier export there is replaced when the new one is whole.
        step: of the checkpoint; by default the newest whole one.
        weights: "ema", "param", or None for the moving average where the run kept one.
        dtype: of the RQ-Transformer's weights. The RQ-VAE stays fp32, since codes depend on its last bits.
        part_bytes: most bytes of one file of weights.

    Returns:
        What the folder's config.json says.

    Raises:
        CheckpointError: the run, its checkpoint, RQ-VAE or tokenizer is missing, damaged or of another model.
        ConfigError: `output` holds anything but an exported model.
    """
    checkpoint = checkpoint_at(run, step)
    if checkpoint.metadata.get("architecture") == "rq-vae":
        return _export_rqvae(checkpoint, Path(output).resolve(), weights)
    check_architecture(checkpoint, "rq-transformer", run)
    return _export_model(checkpoint, Path(run), Path(output).resolve(), weights, dtype, part_bytes)


def _export_rqvae(checkpoint: Checkpoint, output: Path, weights: str | None) -> ModelInfo:
    rqvae = rqvae_of_checkpoint(checkpoint, weights)
    info = ModelInfo(rqvae.config, fingerprint(rqvae))
    with new_folder(output) as folder:
        write_rqvae(rqvae, folder)
        _finish(folder, info, output.name, _training(checkpoint))
    return info


def _export_model(
    checkpoint: Checkpoint, run: Path, output: Path, weights: str | None, dtype: torch.dtype, part_bytes: int
) -> ModelInfo:
    config = run_section(checkpoint, RQTransformerConfig, "model")
    kind = choose_weights(checkpoint, weights)
    rqvae = load_rqvae(run / "rqvae")
    check_fit(config, rqvae.config)
    info = ModelInfo(
        rqvae.config,
        fingerprint(rqvae),
        config,
        run_section(checkpoint, SamplingConfig, "sampling"),
        weights=kind,
        step=checkpoint.metadata.get("step"),
    )
    trained_on = checkpoint.metadata.get("rqvae_fingerprint", info.rqvae_fingerprint)
    if trained_on != info.rqvae_fingerprint:
        raise CheckpointError(
            f"{run / 'rqvae'} is the RQ-VAE {info.rqvae_fingerprint[:12]}, but {checkpoint.folder} was trained on "
            f"codes of {trained_on[:12]}. Put the RQ-VAE of its code shards there."
        )
    with new_folder(output) as folder:
        if config.condition == "text":
            tokenizer = _run_tokenizer(run)
            check_tokenizer(tokenizer, config)
            info.tokenizer = tokenizer.save(folder).name
        write_rqvae(rqvae, folder)
        write_transformer(folder, config, lambda name: checkpoint.tensor(name, kind), dtype, part_bytes)
        _finish(folder, info, output.name, _training(checkpoint))
    return info


def _run_tokenizer(run: Path) -> TextTokenizer:
    for name in TOKENIZERS:
        if (run / name).is_file():
            return TextTokenizer.load(run / name)
    raise CheckpointError(
        f"{run} holds neither {' nor '.join(TOKENIZERS)}: put the --tokenizer it was trained with there."
    )


def _finish(folder: Path, info: ModelInfo, title: str, training: Mapping[str, Any] | None) -> None:
    """Write the card, and config.json last."""
    (folder / "README.md").write_text(model_card(info, title, training), encoding="utf-8")
    write_info(folder, info)


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.metadata.get("config") or {}
    return {section: config[section] for section in _SHOWN if section in config}
