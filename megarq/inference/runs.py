"""What inference reads of a training run: its configuration, and the weights of one of its checkpoints."""

from pathlib import Path

import torch

from megarq.checkpoint.format import Checkpoint
from megarq.config.models import RQVAEConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.inference.model_folder import Config, stored_config
from megarq.rqvae.model import RQVAE


def run_section(checkpoint: Checkpoint, kind: type[Config], section: str) -> Config:
    """A section of the run's configuration, as the checkpoint stored it. Raises CheckpointError where it is absent."""
    document = checkpoint.metadata.get("config") or {}
    if section not in document:
        raise CheckpointError(f"{checkpoint.folder} stores no configuration of {section}: use a whole checkpoint.")
    return stored_config(kind, document[section], f"{checkpoint.folder}: {section}")


def choose_weights(checkpoint: Checkpoint, weights: str | None) -> str:
    """ "ema" or "param": as asked, or the moving average where the run kept one.

    Raises ConfigError for another word, CheckpointError for a moving average that the run did not keep.
    """
    if weights not in (None, "ema", "param"):
        raise ConfigError(f"--weights {weights}: use ema or param.")
    averaged = bool(checkpoint.names("ema"))
    if weights == "ema" and not averaged:
        raise CheckpointError(
            f"{checkpoint.folder} keeps no moving average of the weights: train with train.ema_decay, or use "
            "--weights param."
        )
    return weights or ("ema" if averaged else "param")


def check_architecture(checkpoint: Checkpoint, expected: str, run: str | Path) -> None:
    """Raise CheckpointError where the run trained another network than `expected`."""
    found = checkpoint.metadata.get("architecture")
    if found != expected:
        raise CheckpointError(f"{run} trained an {found}, not an {expected}: give the folder of the other run.")


@torch.no_grad()
def rqvae_of_checkpoint(checkpoint: Checkpoint, weights: str | None = None) -> RQVAE:
    """The RQ-VAE of a checkpoint, on the CPU, in evaluation mode. Raises CheckpointError where anything is missing."""
    kind = choose_weights(checkpoint, weights)
    model = RQVAE(run_section(checkpoint, RQVAEConfig, "model"))
    trained = dict(model.named_parameters())
    for name, target in model.state_dict().items():
        tensor = checkpoint.tensor(name, kind if name in trained else "buffer")
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {list(tensor.shape)}, the model needs {list(target.shape)}: the "
                "checkpoint is damaged. Use another step's."
            )
        target.copy_(tensor)
    return model.eval()
