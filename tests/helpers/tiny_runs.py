"""A tiny RQ-Transformer trained two ways on the same made-up batches: by the engine on many ranks, and by plain torch.

    engine_run(run, config, ds)     the real Session, Trainer, TransformerTask and checkpoints, on all ranks of a group
    plain_run(config)               one process, torch.optim.AdamW, nothing from megarq.engine

Both return the metrics of every step. B is the global batch; batch b holds samples b*B .. b*B + B - 1.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.config.models import RQTransformerConfig, RQVAEConfig, StackConfig
from megarq.config.run import CheckpointConfig, LogConfig, ParallelConfig, RQTransformerRunConfig, TrainConfig
from megarq.data.loader import CodeBatch
from megarq.data.order import LoaderState
from megarq.engine.session import Session
from megarq.engine.snapshot import whole_transformer
from megarq.engine.start import resolve_and_place
from megarq.engine.transformer_run import build_transformer
from megarq.engine.transformer_task import TransformerTask
from megarq.parallel.initialization import derived_seed, named_generator
from megarq.parallel.layers import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from megarq.planning.flops import layer_flops
from megarq.rqvae.model import RQVAE
from megarq.transformer.parameters import decayed
from megarq.transformer.rq_transformer import RQTransformer

Metrics = list[dict[str, Any]]
CPU = torch.device("cpu")
STEPS, BATCH = 6, 8
SAMPLES_PER_EPOCH = 10 * BATCH


class KilledError(Exception):
    """Raised between two steps, in place of a kill."""


def tiny_config(
    condition: str = "text", soft: bool = False, dropout: float = 0.0, **train: Any
) -> RQTransformerRunConfig:
    """A run of six steps with clipping that bites, warm-up and cosine; `train` changes fields of TrainConfig."""
    cond = {"text": (5, 12), "class": (1, 7), "none": (1, 1)}[condition]
    model = RQTransformerConfig(
        code_shape=[2, 2, 3],
        codebook_size=16,
        codebook_dim=8,
        embed_dim=32,
        body=StackConfig(layers=3, heads=4),
        head=StackConfig(layers=2, heads=4),
        cond_length=cond[0],
        cond_vocab_size=cond[1],
        dropout=dropout,
    )
    defaults: dict[str, Any] = {
        "steps": STEPS,
        "global_batch_size": BATCH,
        "lr": 5e-3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "clip": 0.5,
        "precision": "fp32",
        "seed": 3,
    }
    config = RQTransformerRunConfig(
        model=model,
        train=TrainConfig(**(defaults | train)),
        checkpoint=CheckpointConfig(every=100, keep=0),
        log=LogConfig(validate_every=STEPS),
    )
    config.objective.targets = "soft" if soft else "draws"
    return config


def ds_config(stage: int) -> dict[str, Any]:
    """ZeRO of a stage; under stage 3 even the smallest parameters are cut."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {"zero_optimization": zero}


def tiny_rqvae() -> RQVAE:
    """The frozen RQ-VAE whose codebook the transformer reads; the same everywhere."""
    torch.manual_seed(0)
    rqvae = RQVAE(
        RQVAEConfig(
            resolution=2,
            channels=32,
            channel_multipliers=[1],
            res_blocks=1,
            attention_resolutions=[],
            latent_channels=8,
            codebook_dim=8,
            codebook_size=16,
            depth=3,
        )
    )
    return rqvae.eval().requires_grad_(False)


def tiny_model(config: RQTransformerRunConfig, rqvae: RQVAE) -> RQTransformer:
    """The whole transformer with its first weights."""
    model = RQTransformer(config.model)
    model.initialize(config.train.seed)
    model.load_codebook(rqvae.codebook_weights())
    return model


def global_batch(config: RQTransformerRunConfig, number: int) -> CodeBatch:
    """All samples of batch `number`."""
    generator = torch.Generator().manual_seed(1000 + number)
    model, first = config.model, number * BATCH
    latents = torch.randn(BATCH, 2, 2, model.codebook_dim, generator=generator).half()
    return CodeBatch(
        codes=torch.randint(model.codebook_size, (BATCH, *model.code_shape), generator=generator),
        cond=torch.randint(model.cond_vocab_size, (BATCH, model.cond_length), generator=generator),
        latents=latents if config.objective.targets == "soft" else None,
        weights=torch.ones(BATCH),
        sample_ids=torch.arange(first, first + BATCH),
        epochs=torch.full((BATCH,), first // SAMPLES_PER_EPOCH),
        state=LoaderState.at(first + BATCH, SAMPLES_PER_EPOCH),
    )


@dataclass
class Batches:
    """One data-parallel rank's shares of the batches from `start` on; KilledError in place of batch `kill_at`."""

    config: RQTransformerRunConfig
    rank: int
    ranks: int
    start: LoaderState
    kill_at: int | None = None

    def __iter__(self) -> Iterator[CodeBatch]:
        number = self.start.position(SAMPLES_PER_EPOCH) // BATCH
        share = slice(self.rank * BATCH // self.ranks, (self.rank + 1) * BATCH // self.ranks)
        while number != self.kill_at:
            batch = global_batch(self.config, number)
            parts = {k: v[share] for k, v in vars(batch).items() if isinstance(v, Tensor)}
            yield replace(batch, **parts)
            number += 1
        raise KilledError


class WatchedTask(TransformerTask):
    """Keeps the whole weights as they are after the last step."""

    def __init__(self, engine: Any, weights: dict[str, Tensor], **options: Any) -> None:
        super().__init__(engine, **options)
        self.weights = weights

    def validate(self) -> None:
        model = whole_transformer(self._engine, self._module, self._groups, self._rqvae)
        if model is not None:
            self.weights.update({name: p.detach().clone() for name, p in model.named_parameters()})


def engine_run(
    run: Path,
    config: RQTransformerRunConfig,
    ds: dict[str, Any],
    parallel: ParallelConfig | None = None,
    kill_at: int | None = None,
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Start the run or go on with it, on all ranks of the default group; the run's folder holds what it wrote.

    Returns this rank's weights after the last step.
    """
    config = replace(config, parallel=parallel or config.parallel)
    resolved, topology = resolve_and_place(config, ds, dist.get_world_size(), dist.get_rank())
    session = Session.open(config, resolved, topology, run, device)
    rqvae = tiny_rqvae().to(device)
    model = build_transformer(config, resolved, session.groups, device, layer_flops(config.model), rqvae)
    weights: dict[str, Tensor] = {}
    task = partial(
        WatchedTask,
        weights=weights,
        module=model,
        config=config,
        rqvae=rqvae,
        tokenizer=None,
        validation=None,
        groups=session.groups,
        device=device,
        samples_per_epoch=SAMPLES_PER_EPOCH,
    )
    batches = Batches(config, topology.data_rank, topology.dp, session.start, kill_at)
    try:
        session.train(model, decayed, task, batches, SAMPLES_PER_EPOCH, lambda step: 1.0)
    except KilledError:
        assert kill_at is not None
    return weights


def metrics_of(run: Path) -> Metrics:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plain_run(
    config: RQTransformerRunConfig, data_ranks: int = 1
) -> tuple[Metrics, dict[str, Tensor], dict[str, Tensor]]:
    """The same training in plain torch: metrics of each step, last weights, and their moving average.

    With dropout each of `data_ranks` shares of a batch draws its own masks, as so many data-parallel ranks do; here the
    shares follow each other. bf16 means forward and backward of rounded weights, everything else in fp32.
    """
    rqvae, train = tiny_rqvae(), config.train
    model = tiny_model(config, rqvae).train()
    runner = copy.deepcopy(model) if train.precision == "bf16" else model
    if train.precision == "bf16":
        for p in runner.parameters():  # the codebook stays fp32
            p.data = p.data.bfloat16()
    matrices = (nn.Linear, ColumnParallelLinear, RowParallelLinear, QKVParallelLinear)
    decayed = [module.weight for module in model.modules() if isinstance(module, matrices)]
    others = [p for p in model.parameters() if all(p is not weight for weight in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=tuple(train.betas),
        lr=train.lr,
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics: Metrics = []
    for step in range(train.steps or 0):
        progress = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
        warm = (step + 1) / train.warmup_steps if step < train.warmup_steps else 1.0
        rate = train.lr * warm if warm < 1 else train.lr * (1 + cos(pi * max(0.0, progress))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, rounded in zip(model.parameters(), runner.parameters(), strict=True):
            p.grad = torch.zeros_like(p)
            rounded.data.copy_(p.data)
        terms = plain_backward(model, runner, rqvae, config, step, data_ranks)
        norm = nn.utils.clip_grad_norm_(model.parameters(), train.clip or float("inf"))
        optimizer.step()
        for name, p in model.named_parameters():
            decay = train.ema_decay or 0.0
            average[name] = decay * average[name] + (1 - decay) * p.detach()
        metrics.append(terms | {"grad_norm": norm.item(), "lr": rate})
    return metrics, {name: p.detach() for name, p in model.named_parameters()}, average


def plain_backward(
    model: RQTransformer,
    runner: RQTransformer,
    rqvae: RQVAE,
    config: RQTransformerRunConfig,
    step: int,
    data_ranks: int,
) -> dict[str, float]:
    """Mean losses of a batch; the gradients of `runner` are added to those of `model`, which holds the fp32 weights."""
    batch, train = global_batch(config, step), config.train
    micro = train.micro_batch_size or BATCH // data_ranks
    count = BATCH // micro
    means: dict[str, float] = {}
    for index in range(count):
        rank, micro_step = divmod(index, count // data_ranks)
        part = slice(index * micro, (index + 1) * micro)
        share = replace(batch, **{k: v[part] for k, v in vars(batch).items() if isinstance(v, Tensor)})
        torch.manual_seed(derived_seed(train.seed, step, micro_step, rank))
        terms = plain_losses(runner, rqvae, share, config)
        gradients = torch.autograd.grad(terms["loss"], list(runner.parameters()))
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad += gradient / count
        for name, value in terms.items():
            means[name] = means.get(name, 0.0) + value.item() / count
    return means


def plain_losses(
    model: RQTransformer, rqvae: RQVAE, batch: CodeBatch, config: RQTransformerRunConfig
) -> dict[str, Tensor]:
    """The objective in torch's own operations."""
    codes = batch.codes
    soft = F.one_hot(codes, config.model.codebook_size).float()
    if batch.latents is not None:
        generators = [named_generator(config.train.seed, "draw", i, 0) for i in batch.sample_ids.tolist()]
        codes, soft = rqvae.draw_codes(batch.latents.float(), config.objective.temperature, generators)
    logits, caption_logits = model(codes, batch.cond)
    image = -(soft * logits.float().log_softmax(-1)).sum(-1).mean()
    if caption_logits is None:
        return {"loss": image, "image_loss": image}
    caption = F.cross_entropy(caption_logits.float().flatten(0, 1), batch.cond[:, 1:].flatten())
    return {"loss": 0.9 * image + 0.1 * caption, "image_loss": image, "caption_loss": caption}


def largest_deviation(ours: Metrics, expected: Metrics, names: tuple[str, ...] = ("loss", "grad_norm")) -> float:
    """Largest relative difference of any step."""
    assert len(ours) == len(expected), f"{len(ours)} steps, not {len(expected)}"
    pairs = [(a[name], b[name]) for a, b in zip(ours, expected, strict=True) for name in names]
    return max(abs(a - b) / abs(b) for a, b in pairs)
