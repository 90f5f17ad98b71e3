"""The lawful layouts of a run over a number of GPUs, and the command that starts one."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import yaml

from megarq.config.layout import check_layout
from megarq.config.names import CONFIGS, suggestion
from megarq.config.run import ParallelConfig, RQTransformerRunConfig
from megarq.errors import ConfigError
from megarq.planning.layout import Layout

CHOICES = ("tp", "pp", "dp", "zero", "sequence", "activation_checkpointing")
"""What layouts differ in, besides the micro-batch."""


def lawful_layouts(config: RQTransformerRunConfig, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout that a run may start in, each with micro-batches of one sample.

    Tensor groups stay inside a node. ZeRO over one data-parallel rank cuts nothing and is listed as stage 1 alone.
    Raises ConfigError, with the reason that the plainest one is refused, where there is none.
    """
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ConfigError(
            f"--gpus {gpus} with --gpus-per-node {gpus_per_node}: the nodes would differ. "
            f"Give a multiple of {gpus_per_node}, or another --gpus-per-node."
        )
    refused: list[ConfigError] = []
    lawful = 0
    for layout in _layouts(config, gpus, gpus_per_node):
        try:
            check_layout(*_checked(config, layout), ds=shipped_ds_config(layout), world_size=gpus)
        except ConfigError as error:
            refused.append(error)
        else:
            lawful += 1
            yield layout
    if not lawful:
        raise ConfigError(f"no layout over {gpus} GPUs is lawful: {refused[0]} Change --gpus or --global-batch.")


def _layouts(config: RQTransformerRunConfig, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """From the plainest to the most intricate."""
    in_node = min(gpus, gpus_per_node)
    for pp in _divisors(gpus):
        for tp in [tp for tp in _divisors(gpus // pp) if in_node % tp == 0]:
            dp = gpus // pp // tp
            layout = Layout(tp, pp, dp, zero=1, precision=config.train.precision, ema=bool(config.train.ema_decay))
            for zero in (1,) if pp > 1 or dp == 1 else (1, 2, 3):
                for sequence in (False, True) if tp > 1 else (False,):
                    for recompute in (False, True):
                        yield replace(layout, zero=zero, sequence=sequence, activation_checkpointing=recompute)


def _checked(config: RQTransformerRunConfig, layout: Layout) -> tuple[Any, ParallelConfig, Any]:
    """Model, parallel and train as a run of this layout has them."""
    return config.model, ParallelConfig(layout.tp, layout.pp, layout.sequence), config.train


def micro_batches(config: RQTransformerRunConfig, layout: Layout) -> Iterator[Layout]:
    """The layout with each micro-batch that divides a rank's share of the global batch, smallest first.

    `train.micro_batch_size` leaves that one alone.
    """
    share = config.train.global_batch_size // layout.dp
    stated = config.train.micro_batch_size
    for size in [stated] if stated else _divisors(share):
        yield replace(layout, micro_batch=size, accumulation=share // size)


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def chosen_layouts(text: str, layouts: Sequence[Layout]) -> list[Layout]:
    """Those among the lawful layouts that "tp=8,pp=4,zero=1" speaks of. Raises ConfigError."""
    wanted: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in CHOICES:
            raise ConfigError(
                f"--layout {text}: {key!r} is none of {', '.join(CHOICES)}.{suggestion(key, CHOICES)} "
                "Give for example --layout tp=8,pp=4,zero=1."
            )
        try:
            wanted[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            wanted[key] = value
        known = sorted({getattr(layout, key) for layout in layouts})
        if wanted[key] not in known:
            raise ConfigError(
                f"--layout {text}: no lawful layout has {key}={value}. Choose {key} among {', '.join(map(str, known))}."
            )
    chosen = [layout for layout in layouts if all(getattr(layout, key) == value for key, value in wanted.items())]
    if not chosen:
        raise ConfigError(
            f"--layout {text} is none of the {len(layouts)} lawful layouts. Choose others, or leave it out to see them."
        )
    return chosen


def ds_config_name(layout: Layout) -> str:
    """The shipped configuration of a layout."""
    return "pipeline.json" if layout.pp > 1 else f"zero{layout.zero}.json"


def shipped_ds_config(layout: Layout) -> dict[str, Any]:
    """What that file says."""
    content: dict[str, Any] = json.loads((CONFIGS / "deepspeed" / ds_config_name(layout)).read_text(encoding="utf-8"))
    return content


def launch_command(
    model: str, config: RQTransformerRunConfig, layout: Layout, gpus_per_node: int, overrides: Sequence[str]
) -> str:
    """What to type: once on a single node, on each node where there are more."""
    nodes = -(-layout.world // gpus_per_node)
    settings = {
        "train.global_batch_size": config.train.global_batch_size,
        "train.micro_batch_size": layout.micro_batch,
        "train.activation_checkpointing": str(layout.activation_checkpointing).lower(),
        "parallel.tp": layout.tp,
        "parallel.pp": layout.pp,
        "parallel.sequence": str(layout.sequence).lower(),
    }
    launcher = f"deepspeed --num_gpus {layout.world}"
    if nodes > 1:
        place = "--rdzv-backend c10d --rdzv-endpoint $HEAD_NODE:29500"
        launcher = f"torchrun --nnodes {nodes} --nproc-per-node {layout.world // nodes} {place}"
    tokenizer = " --tokenizer tokenizer.json" if config.model.condition == "text" else ""
    kept = [text for text in overrides if text.partition("=")[0] not in settings]
    return (
        f"{launcher} megarq/train.py --ds_config {ds_config_name(layout)} --model {model} --data CODES{tokenizer} "
        f"--output RUN {shlex.join([*kept, *(f'{key}={value}' for key, value in settings.items())])}"
    )
