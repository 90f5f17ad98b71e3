"""Stage 2: training the RQ-Transformer on code shards."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megarq.config.deepspeed import batch_sizes
from megarq.config.run import RQTransformerRunConfig
from megarq.data.code_shards import CodeShards, ShardError
from megarq.data.exclusion import excluded_samples
from megarq.data.loader import CodeBatch, CodeLoader, validation_batches
from megarq.data.lost import LostBlocks
from megarq.data.manifest import MANIFEST
from megarq.data.mixture import Mixture, Source
from megarq.data.order import IntArray
from megarq.engine.build import construction
from megarq.engine.fragments import write_sharded
from megarq.engine.lost_samples import too_many
from megarq.engine.pipeline import build_stage, describe_pipeline
from megarq.engine.session import Session, copy_once
from megarq.engine.transformer_task import TransformerTask
from megarq.errors import ConfigError, DataError
from megarq.inference.pretrained import load_rqvae, save_rqvae
from megarq.parallel.together import alike, from_rank_zero
from megarq.parallel.topology import ProcessGroups
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.tokenizer import TextTokenizer
from megarq.transformer.parameters import decayed
from megarq.transformer.rq_transformer import RQTransformer
from megarq.transformer.stages import Stage

PAUSE = 5.0
"""Seconds between looks at shards that are missing."""

logger = logging.getLogger(__name__)


def train_transformer(
    session: Session,
    sources: Sequence[Source],
    tokenizer_file: Path | None,
    validation: Path | None,
    layer_flops: Mapping[str, int],
    flops_per_image: float,
) -> None:
    """Train or go on training. Raises ConfigError, DataError or CheckpointError where the parts do not fit.

    Args:
        session: this rank of the run; its config is an RQTransformerRunConfig.
        sources: folders of code shards; the first holds the RQ-VAE of all.
        tokenizer_file: tokenizer.json or .model; needed by a model with captions.
        validation: another folder of code shards, in place of `data.validation_shards`.
        layer_flops: of each layer's forward pass, by which the stages of a pipeline are balanced.
        flops_per_image: of a training step.
    """
    config, topology = session.config, session.groups.topology
    assert isinstance(config, RQTransformerRunConfig)
    manifests = [source.folder / MANIFEST for source in sources]
    lists = [path for source in sources for path in source.exclusions]
    session.see(*manifests, *lists, tokenizer_file, validation and validation / MANIFEST, contents=True)
    rqvae = alike(lambda: load_rqvae(sources[0].folder, session.device)).requires_grad_(False)
    going_on = session.checkpoint is not None
    patience = retry_seconds(config) if going_on else 0
    excluded, faulty = from_rank_zero(lambda: check_and_exclude(sources, validation, going_on, patience))
    train_data, held_out = alike(lambda: open_data(config, sources, excluded, validation, rqvae))
    if session.checkpoint is not None:
        train_data.folders[0].check_fingerprint(session.checkpoint.metadata["rqvae_fingerprint"])
    tokenizer = alike(lambda: open_tokenizer(config, tokenizer_file))
    loader, held_out_batches = alike(lambda: make_batches(session, train_data, held_out, tokenizer, faulty))
    files = loader.files() | (held_out.files() if held_out else {})
    session.read({file: size for file, size in files.items() if file not in faulty})
    module = build_transformer(config, session.ds, session.groups, session.device, layer_flops, rqvae)
    session.keep_beside(lambda run: save_rqvae(rqvae, run / "rqvae"))
    if tokenizer_file is not None and tokenizer is not None:
        session.keep_beside(lambda run: copy_once(tokenizer_file, run, f"tokenizer{tokenizer_file.suffix}"))
    task = partial(
        TransformerTask,
        module=module,
        config=config,
        rqvae=rqvae,
        tokenizer=tokenizer,
        validation=held_out_batches,
        groups=session.groups,
        device=session.device,
        samples_per_epoch=loader.samples_per_epoch,
        sample_prompts=from_rank_zero(
            lambda: first_captions((held_out or train_data).folders[0], config.log.sample_count)
        ),
    )
    trained_on = {"rqvae_fingerprint": fingerprint(rqvae), "data": train_data.describe()}
    notes = [] if session.checkpoint is None else changed_data(session.checkpoint.metadata.get("data"), train_data)
    notes += [f"going on without a shard: {reason}" for reason in faulty.values()]
    if topology.pp > 1:
        notes.append(describe_pipeline(layer_flops, topology.pp, batch_sizes(config.train, topology.dp)[1]))
    session.train(
        module, decayed, task, loader, loader.samples_per_epoch, lambda step: flops_per_image, trained_on, notes
    )


def build_transformer(
    config: RQTransformerRunConfig,
    ds: Mapping[str, Any],
    groups: ProcessGroups,
    device: torch.device,
    layer_flops: Mapping[str, int],
    rqvae: RQVAE,
) -> Stage:
    """The transformer with its first weights and the RQ-VAE's codebook, or this rank's stage of it."""
    shared, recompute = rqvae.config.shared_codebook, config.train.activation_checkpointing
    module: Stage
    with construction(ds, groups, device, config.parallel.sharded_init):
        if groups.topology.pp > 1:
            module = build_stage(config.model, groups, layer_flops, shared, recompute)
        else:
            module = RQTransformer(
                config.model, groups.tensor, shared_codebook=shared, activation_checkpointing=recompute
            )
    module.initialize(config.train.seed, write_sharded)
    module.load_codebook(rqvae.codebook_weights())
    return module


def retry_seconds(config: RQTransformerRunConfig) -> float:
    """How long a shard is waited for: not so long that it would be taken for a hang."""
    return min(config.data.retry_seconds, config.faults.hang_seconds / 2 or math.inf)


def lost_from(data: Mixture, faulty: Mapping[Path, DataError], config: RQTransformerRunConfig) -> LostBlocks:
    """Which blocks are lost at the start: those of the faulty shards."""
    lost = LostBlocks(len(data.block_sizes), retry_seconds(config))
    lost.add(data.blocks_in(faulty))
    return lost


def make_batches(
    session: Session,
    train: Mixture,
    held_out: Mixture | None,
    tokenizer: TextTokenizer | None,
    faulty: Mapping[Path, DataError],
) -> tuple[CodeLoader, Callable[[], Iterator[CodeBatch]] | None]:
    """Training batches, and what starts a pass over the held-out ones.

    faulty: shards that the run must do without. Raises DataError where the shards lack any, and LostDataError where
    those hold more samples than may be lost.
    """
    config, topology = session.config, session.groups.topology
    assert isinstance(config, RQTransformerRunConfig)
    options: dict[str, Any] = {
        "cond_length": config.model.cond_length,
        "condition": config.model.condition,
        "global_batch_size": config.train.global_batch_size,
        "rank": topology.data_rank,
        "world_size": topology.dp,
        "seed": config.train.seed,
        "targets": config.objective.targets,
    }
    lost = lost_from(train, faulty, config)
    if (count := int(train.block_sizes[lost.mask].sum())) > config.data.max_lost_rate * train.samples:
        raise too_many(count, train.samples, config.data.max_lost_rate, list(map(str, faulty.values())))
    encode = partial(encode_caption, tokenizer, config.model.cond_length) if tokenizer else None
    loader = CodeLoader(
        train,
        caption_encoder=partial(encode, config.data.bpe_dropout) if encode else None,
        caption_dropout=config.data.caption_dropout,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=session.device.type == "cuda",
        start=session.start,
        lost=lost,
        **options,
    )
    if held_out is None:
        return loader, None
    whole = partial(encode, 0.0) if encode else None
    away = lost_from(held_out, faulty, config)
    start_pass = partial(validation_batches, held_out, caption_encoder=whole, lost=away, **options)
    start_pass()  # what the shards lack is said now, not at the first validation
    return loader, start_pass


def first_captions(data: CodeShards, count: int) -> list[str]:
    """A caption of each of the first samples that have one; none where there are no captions, or they are lost."""
    if data.captioned == 0:
        return []
    try:
        captions = data.text_run("captions", 0, 0, min(count, int(data.block_sizes[0])))
    except ShardError:
        return []
    return [of_sample[0] for of_sample in captions if of_sample]


def encode_caption(tokenizer: TextTokenizer, length: int, dropout: float, caption: str, seed: int | None) -> list[int]:
    """Token ids of a caption; dropout only where a seed is given."""
    return tokenizer.encode(caption, length, 0.0 if seed is None else dropout, seed)


def check_and_exclude(
    sources: Sequence[Source], validation: Path | None, going_on: bool, patience: float = 0
) -> tuple[list[IntArray], dict[Path, DataError]]:
    """(numbers of the samples to leave out of each folder, shards that are missing or cut and what is wrong with each).

    Raises DataError where a list is missing, and in a new run where a shard is: one that goes on waits for it for
    `patience` seconds, and then does without.
    """
    folders = [CodeShards.open(source.folder) for source in sources]
    read = [*folders, *([CodeShards.open(validation)] if validation else [])]
    deadline = time.monotonic() + patience
    while faulty := {path: why for folder in read for path, why in folder.faulty_files().items()}:
        if (left := deadline - time.monotonic()) <= 0:
            break
        logger.warning("%s Waiting for it for %.0f s.", next(iter(faulty.values())), left)
        time.sleep(min(PAUSE, left))
    if faulty and not going_on:
        raise next(iter(faulty.values()))
    return excluded_samples(folders, [source.exclusions for source in sources], going_on), faulty


def open_data(
    config: RQTransformerRunConfig,
    sources: Sequence[Source],
    excluded: Sequence[IntArray],
    validation: Path | None,
    rqvae: RQVAE,
) -> tuple[Mixture, Mixture | None]:
    """Training and held-out samples. Raises DataError where they are damaged or of another model or RQ-VAE."""
    splits = [
        CodeShards.open(source.folder).without(samples).split(config.data.validation_shards)
        for source, samples in zip(sources, excluded, strict=True)
    ]
    train = [part for part, _ in splits]
    held_out = [part for _, part in splits if part is not None]
    if validation is not None:
        held_out = [CodeShards.open(validation)]
    for data in (*train, *held_out):
        check_data(config, data, rqvae)
    return Mixture(train, [source.weight for source in sources]), Mixture(held_out) if held_out else None


def check_data(config: RQTransformerRunConfig, data: CodeShards, rqvae: RQVAE) -> None:
    """Raise DataError where codes are of another model, RQ-VAE or temperature than the run's."""
    data.check_model(config.model.code_shape, config.model.sizes, fingerprint(rqvae))
    if config.model.condition == "class" and data.classes > config.model.cond_vocab_size:
        raise DataError(
            f"{data.folder} holds class {data.classes - 1}, the model has {config.model.cond_vocab_size} classes. "
            "Set model.cond_vocab_size."
        )
    if config.objective.targets == "draws" and data.settings.temperature != config.objective.temperature:
        raise DataError(
            f"{data.folder} was drawn at temperature {data.settings.temperature}, objective.temperature is "
            f"{config.objective.temperature}. Set objective.temperature={data.settings.temperature}, or "
            "pretokenize again."
        )


def changed_data(saved: Any, data: Mixture) -> list[str]:
    """A line for the log where a run goes on with other samples or weights than those it was saved with."""
    ours = data.describe()
    if saved in (None, ours):
        return []
    return [f"changed since the checkpoint: the data, {saved} -> {ours}: this epoch's samples may repeat or be missed"]


def open_tokenizer(config: RQTransformerRunConfig, file: Path | None) -> TextTokenizer | None:
    """The tokenizer of a model with captions. Raises ConfigError where it is missing or too large."""
    if config.model.condition != "text":
        return None
    if file is None:
        raise ConfigError("the model is conditioned on captions: give --tokenizer tokenizer.json or tokenizer.model.")
    tokenizer = TextTokenizer.load(file)
    if tokenizer.vocab_size > config.model.cond_vocab_size:
        raise ConfigError(
            f"{file} has {tokenizer.vocab_size} tokens, model.cond_vocab_size is {config.model.cond_vocab_size}. "
            f"Set model.cond_vocab_size={tokenizer.vocab_size} or train a smaller tokenizer."
        )
    return tokenizer
