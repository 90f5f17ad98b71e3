"""An RQ-VAE to finetune, from wherever it is: weights, codebook with its moving averages, and the discriminator.

FOLDER/config.json                an exported model, an RQ-VAE folder, or the folder of code shards
FOLDER/checkpoints/               a run of train_rqvae.py: its newest whole checkpoint
FOLDER/config.yaml, model.pt      the layout of the authors' released checkpoints
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at, checkpoints_folder
from megarq.config.models import RQVAEConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.inference.authors import read_checkpoint, read_document
from megarq.inference.model_folder import CONFIG, read_info
from megarq.inference.pretrained import load_rqvae
from megarq.inference.runs import check_architecture, choose_weights, rqvae_of_checkpoint, run_section
from megarq.rqvae.authors import config_from_authors, state_from_authors
from megarq.rqvae.model import RQVAE, fingerprint

_TRAINING_ONLY = {"decay", "restart_unused_codes", "dropout"}
"""Fields of the model's configuration that a finetuning may change: they are about training, not about its tensors."""
_DISCRIMINATOR = "discriminator."
_STEPS = "quantizer.steps"


@dataclass
class FirstWeights:
    """What a run starts from."""

    config: RQVAEConfig
    """The architecture."""
    state: Mapping[str, Tensor]
    """State dict of our RQVAE, fp32 on the CPU; restarts are counted from 0 again."""
    origin: str
    """Where it is from, for logs: the folder, which weights, and the RQ-VAE's fingerprint."""
    discriminator: Mapping[str, Tensor] = field(default_factory=dict)
    """State dict of the discriminator under the authors' names (main.0.weight ..); empty where none was kept."""


def read_first_weights(path: str | Path, weights: str | None = None) -> FirstWeights:
    """Read an RQ-VAE to train on.

    Args:
        path: an exported model, an RQ-VAE folder, a run of train_rqvae.py, or a folder in the authors' layout.
        weights: "ema" or "param"; None for a run's moving average where it kept one, and the authors' `state_dict`.

    Raises:
        CheckpointError: nothing of the kind is there, or it is damaged.
        ConfigError: weights that are not there to choose.
    """
    folder = Path(path)
    if (folder / CONFIG).exists():
        return _exported(folder, weights)
    if checkpoints_folder(folder).is_dir():
        return weights_of_checkpoint(_checkpoint(folder), weights)
    if (folder / "config.yaml").exists():
        source = read_checkpoint(folder, weights)
        config = config_from_authors(source.document)
        rqvae = RQVAE(config)
        rqvae.load_state_dict(state_from_authors(source.state, config))
        return _first(rqvae, f"{folder}, {source.weights} weights", source.discriminator)
    raise _nothing(folder)


def weights_of_checkpoint(checkpoint: Checkpoint, weights: str | None = None) -> FirstWeights:
    """The same of a checkpoint of train_rqvae.py."""
    kind = choose_weights(checkpoint, weights)
    discriminator = {
        name.removeprefix(_DISCRIMINATOR): checkpoint.tensor(name, stored)
        for stored in ("param", "buffer")
        for name in checkpoint.names(stored)
        if name.startswith(_DISCRIMINATOR)
    }
    return _first(rqvae_of_checkpoint(checkpoint, weights), f"{checkpoint.folder}, {kind} weights", discriminator)


def read_architecture(path: str | Path) -> RQVAEConfig:
    """The configuration of the RQ-VAE that `read_first_weights` would read. Raises CheckpointError as it does."""
    folder = Path(path)
    if (folder / CONFIG).exists():
        return read_info(folder).rqvae
    if checkpoints_folder(folder).is_dir():
        return run_section(_checkpoint(folder), RQVAEConfig, "model")
    if (folder / "config.yaml").exists():
        return config_from_authors(read_document(folder))
    raise _nothing(folder)


def check_same_architecture(ours: RQVAEConfig, theirs: RQVAEConfig, path: str | Path) -> None:
    """Raise ConfigError, naming the keys, where a run's model is not the one it should start from."""
    wanted, found = _comparable(ours), _comparable(theirs)
    differing = [f"model.{key}={wanted[key]} ({found[key]} there)" for key in wanted if wanted[key] != found[key]]
    if differing:
        raise ConfigError(
            f"--init-from {path} is another RQ-VAE: {', '.join(differing)}. Set these keys as they are there, leave "
            "--model out, or start from another."
        )


def _comparable(config: RQVAEConfig) -> dict[str, object]:
    alike = len(set(config.sizes)) == 1
    sizes = {"codebook_size": max(config.sizes), "codebook_sizes": None if alike else list(config.sizes)}
    return {key: value for key, value in (asdict(config) | sizes).items() if key not in _TRAINING_ONLY}


def _exported(folder: Path, weights: str | None) -> FirstWeights:
    if weights is not None:
        raise ConfigError(f"--init-weights {weights}: {folder} holds one set of weights. Leave it out.")
    return _first(load_rqvae(folder), str(folder), {})


def _checkpoint(folder: Path) -> Checkpoint:
    checkpoint = checkpoint_at(folder)
    check_architecture(checkpoint, "rq-vae", folder)
    return checkpoint


def _first(rqvae: RQVAE, origin: str, discriminator: Mapping[str, Tensor]) -> FirstWeights:
    state = rqvae.state_dict()
    state[_STEPS] = state[_STEPS].new_zeros(())
    return FirstWeights(rqvae.config, state, f"{origin}, RQ-VAE {fingerprint(rqvae)[:12]}", discriminator)


def _nothing(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"--init-from {folder} holds neither config.json nor checkpoints nor config.yaml. Give an exported model, an "
        "RQ-VAE folder, a run of train_rqvae.py, or config.yaml and model.pt in one folder."
    )
