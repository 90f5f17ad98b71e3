"""Every rule on how a model is cut over ranks, checked before any process group exists."""

from collections.abc import Mapping
from typing import Any

from megarq.config.deepspeed import batch_sizes, check_zero, zero_stage
from megarq.config.models import RQTransformerConfig
from megarq.config.run import ParallelConfig, TrainConfig
from megarq.errors import ConfigError


def check_layout(
    model: RQTransformerConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    ds: Mapping[str, Any],
    world_size: int,
) -> None:
    """Raise ConfigError, naming the rule and what to do, where an RQ-Transformer cannot be trained in a layout.

    Args:
        model: what is cut.
        parallel: tensor- and pipeline-parallel sizes.
        train: batch sizes, compilation.
        ds: DeepSpeed's configuration, as read or complete.
        world_size: all ranks.
    """
    parallel.validate()
    data_parallel = parallel.data_parallel_size(world_size)
    batch_sizes(train, data_parallel)
    check_zero(ds, parallel, data_parallel)
    _check_tensor(model, parallel)
    _check_pipeline(model, parallel)
    if train.compile and zero_stage(ds) == 3:
        raise ConfigError(
            "train.compile=true with ZeRO stage 3: the hooks that gather its parameters break every compiled graph. "
            "Use --ds_config zero1.json or zero2.json, or train.compile=false."
        )


def _check_tensor(model: RQTransformerConfig, parallel: ParallelConfig) -> None:
    """Each rank holds whole heads, and equal slices of the width and of the vocabularies."""
    cut = {
        "model.embed_dim": model.embed_dim,
        "model.body.heads": model.body.heads,
        "model.head.heads": model.head.heads,
        "model.codebook_size": max(model.sizes),
    }
    if model.condition == "text":
        cut["model.cond_vocab_size"] = model.cond_vocab_size
    if parallel.sequence:
        cut["model.code_shape's H x W x D"] = model.positions * model.depth
    for name, size in cut.items():
        if size % parallel.tp:
            raise ConfigError(
                f"{name}={size} is not divisible by parallel.tp={parallel.tp}. Choose a tp that divides it."
            )
    body = model.cond_length + model.positions - 1
    if parallel.sequence and body < parallel.tp:
        raise ConfigError(
            f"parallel.sequence over parallel.tp={parallel.tp}: the body has {body} tokens, fewer than ranks. "
            "Set parallel.sequence=false or lower parallel.tp."
        )


def _check_pipeline(model: RQTransformerConfig, parallel: ParallelConfig) -> None:
    """Each stage holds a layer, and no two stages share one."""
    if parallel.pp == 1:
        return
    layers = model.body.layers + model.head.layers + 3  # the inputs of body and head, and the outputs
    if parallel.pp > layers:
        raise ConfigError(
            f"parallel.pp={parallel.pp}, but the model has {layers} layers: a stage needs one. "
            f"Use parallel.pp={layers} or less."
        )
    if model.body_input == model.head_input == "learned":
        raise ConfigError(
            f"parallel.pp={parallel.pp} with learned embeddings that body and head share: one table cannot lie on two "
            "stages. Use parallel.pp=1, or set model.body_input or model.head_input to codebook."
        )
