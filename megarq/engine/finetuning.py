"""Stage 1 from the weights of another RQ-VAE: which configuration the run has, and what it starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megarq.checkpoint.run_folder import checkpoints_folder
from megarq.config.load import config_around, read_yaml
from megarq.config.models import RQVAEConfig
from megarq.config.run import RQVAERunConfig
from megarq.engine.session import RESOLVED, Session
from megarq.inference.first_weights import (
    FirstWeights,
    check_same_architecture,
    read_architecture,
    read_first_weights,
)
from megarq.inference.model_folder import stored_config
from megarq.parallel.together import alike


class InitFrom(NamedTuple):
    """What --init-from and --init-weights say."""

    path: str
    """An exported model, an RQ-VAE folder, a run of train_rqvae.py, or a folder in the authors' layout."""
    weights: str | None = None
    """"ema" or "param"; None for the source's own choice."""


def config_of_source(init: InitFrom, run: str, overrides: Sequence[str]) -> RQVAERunConfig:
    """The configuration of a run without --model: defaults around the architecture it starts from.

    A run that goes on has it in its own folder, and no longer needs what it started from. Raises CheckpointError where
    neither has one, ConfigError as `load_config`.
    """
    resolved = Path(run) / RESOLVED
    if checkpoints_folder(run).is_dir() and resolved.is_file():
        model = stored_config(RQVAEConfig, read_yaml(resolved).get("model"), f"{resolved}: model")
        return config_around(model, str(resolved), overrides)
    return config_around(read_architecture(init.path), init.path, overrides)


def first_weights(session: Session, init: InitFrom | None) -> tuple[FirstWeights | None, list[str]]:
    """What a new run starts from, and lines for its log; no weights where it goes on from a checkpoint (collective).

    Raises, on all ranks, CheckpointError where the weights are missing or damaged, ConfigError where they are of
    another architecture.
    """
    config = session.config
    assert isinstance(config, RQVAERunConfig)
    if init is None:
        at_random = config.finetuned_from is not None and session.checkpoint is None
        return None, [_told_random(config)] if at_random else []
    if session.checkpoint is not None:
        return None, [f"the run goes on from its own checkpoint: --init-from {init.path} is not read"]

    def read() -> FirstWeights:
        check_same_architecture(config.model, read_architecture(init.path), init.path)
        return read_first_weights(init.path, init.weights)

    first = alike(read)
    return first, [f"first weights: {first.origin}, {_told_discriminator(config, bool(first.discriminator))}"]


def _told_random(config: RQVAERunConfig) -> str:
    return (
        f"WARNING: the run starts from random weights, with a configuration that finetunes {config.finetuned_from}. "
        "Give its run or exported model as --init-from, or finetuned_from=null and more train.epochs."
    )


def _told_discriminator(config: RQVAERunConfig, given: bool) -> str:
    if not given:
        anew = "; this run's starts anew: loss.discriminator_start and loss.discriminator_warmup give it time"
        return "without a discriminator" + (anew if config.loss.adversarial_weight else "")
    return "with its discriminator" if config.loss.adversarial_weight else "its discriminator is left out"
