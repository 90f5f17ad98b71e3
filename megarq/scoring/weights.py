"""Files of the networks that scores are computed with: which there are, where they are found, reading them safely.

A file is given, or lies under its published name in torch's or the Hugging Face hub's cache. Nothing is downloaded, and
nothing is unpickled but tensors.
"""

import argparse
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.hub
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megarq.errors import CheckpointError, ConfigError
from megarq.files import file_sha256

FEATURE_WEIGHTS, RANKER_WEIGHTS = "--feature-weights", "--ranker-weights"
"""Options that give files: NETWORK=FILE to be scored with, and the one FILE of a ranker."""
_DIGITS = 12
"""Of a sha256, in a message."""


@dataclass(frozen=True)
class Network:
    """A network whose weights were published."""

    files: tuple[str, ...]
    """Names that the published file has; in torch's cache it bears one of them."""
    address: str
    """Where it was published."""
    sha256: tuple[str, ...] = ()
    """The sha256 of a published file, or what it begins with, as far as its name says."""
    hub: tuple[str, str] | None = None
    """Repository and file of it on the Hugging Face hub; one of another name than `files` has an unknown sha256."""

    @property
    def begins(self) -> str:
        """The sha256 that a published file may have, in short."""
        return " or ".join(f"{sha256[:_DIGITS]}.." for sha256 in self.sha256)


NETWORKS = {
    "inception": Network(
        ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        "github.com/toshas/torch-fidelity releases v0.2.0 (the same file: github.com/mseitzer/pytorch-fid fid_weights)",
        ("6726825d",),
    ),
    "vgg16": Network(("vgg16-397923af.pth",), "download.pytorch.org/models/vgg16-397923af.pth", ("397923af",)),
    "clip": Network(
        ("open_clip_model.safetensors",),
        "huggingface.co/timm/vit_base_patch32_clip_224.openai (OpenAI's ViT-B/32 as open_clip has it)",
        ("e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",),
        hub=("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"),
    ),
    "dinov2": Network(
        ("dinov2_vitl14_pretrain.pth",),
        "dl.fbaipublicfiles.com/dinov2/dinov2_vitl14 (or huggingface.co/timm/vit_large_patch14_dinov2.lvd142m)",
        ("d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",),
        hub=("timm/vit_large_patch14_dinov2.lvd142m", "model.safetensors"),
    ),
    "resnet101": Network(
        ("resnet101-63fe2227.pth", "resnet101-cd907fc2.pth"),
        "download.pytorch.org/models/resnet101-63fe2227.pth",
        ("63fe2227", "cd907fc2"),
    ),
}


@dataclass(frozen=True)
class Weights:
    """The file of one network."""

    network: str
    """A name in NETWORKS."""
    path: Path
    """Where it is."""
    option: str = FEATURE_WEIGHTS
    """Of the command that it is given by."""

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return file_sha256(self.path)

    @property
    def published(self) -> bool:
        """The file may be the published one: its sha256 begins as that does, where that is known."""
        known = NETWORKS[self.network]
        hubs_own = known.hub and self.path.name == known.hub[1] and self.path.name not in known.files
        return not known.sha256 or bool(hubs_own) or self.sha256.startswith(known.sha256)

    @property
    def notes(self) -> list[str]:
        """What a result should say of a file that is not the published one."""
        if self.published:
            return []
        known = NETWORKS[self.network].begins
        return [
            f"the weights of {self.network} have sha256 {self.sha256[:_DIGITS]}.., not {known}: "
            "scores cannot be held against published ones."
        ]

    def read(self) -> dict[str, Tensor]:
        """The named tensors. Raises: CheckpointError for a file that holds none, or more than tensors."""
        return read_state(self.path)


def add_feature_weights(parser: argparse.ArgumentParser) -> None:
    """The option that `parse_weights` reads."""
    parser.add_argument(
        FEATURE_WEIGHTS,
        action="append",
        default=[],
        metavar="FILE",
        help=f"Inception's weights, or NETWORK=FILE for {', '.join(NETWORKS)}; may be repeated",
    )


def parse_weights(options: Sequence[str]) -> dict[str, Path]:
    """The files of `--feature-weights`, by network: FILE is Inception's, NETWORK=FILE any other.

    Raises: ConfigError for an unknown network, or two files of one.
    """
    given: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or "/" in name:
            name, path = "inception", option
        if name not in NETWORKS:
            raise ConfigError(f"--feature-weights {option}: no network {name!r}. Known: {', '.join(NETWORKS)}.")
        if name in given:
            raise ConfigError(f"--feature-weights gives {name} twice: {given[name]} and {path}. Leave one out.")
        given[name] = Path(path)
    return given


def find_weights(
    network: str, given: Mapping[str, Path] | Path | None = None, option: str = FEATURE_WEIGHTS
) -> Weights:
    """The file given for a network, by an option, or the one in a cache.

    Raises: CheckpointError where there is none, naming the published file; for a damaged one in torch's cache.
    """
    known = NETWORKS[network]
    path = given.get(network) if isinstance(given, Mapping) else given
    if path is not None:
        if not path.is_file():
            raise CheckpointError(f"{path}, weights of {network}: no such file. Give {_how(network, option)}.")
        return Weights(network, path, option)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in known.files:
        if (cache / name).is_file():
            weights = Weights(network, cache / name, option)
            if not weights.published:
                raise CheckpointError(
                    f"{weights.path} has sha256 {weights.sha256[:_DIGITS]}.., not {known.begins}: it is damaged. "
                    "Copy it there again."
                )
            return weights
    if known.hub and isinstance(found := try_to_load_from_cache(*known.hub), str):
        return Weights(network, Path(found), option)
    raise CheckpointError(f"no weights of {network} in {cache}. Give {_how(network, option)}.")


def _how(network: str, option: str) -> str:
    known = NETWORKS[network]
    of = f"{network}=" if option == FEATURE_WEIGHTS and network != "inception" else ""
    begins = f", sha256 {known.begins}" if known.sha256 else ""
    return f"{option} {of}FILE: {known.files[0]}{begins}, from {known.address}"


def read_state(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, or of a torch file read with weights_only.

    Raises: CheckpointError for a file that is damaged, a TorchScript archive, or holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which holds code. Save its tensors where you trust it: "
                "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'tensors.pth')."
            )
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as plain tensors ({reason}). Copy it again, or save its state_dict alone."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, not named tensors. Save the network's state_dict."
        )
    return loaded


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def misfit(weights: Weights, error: Exception) -> CheckpointError:
    """What to raise where `load_state_dict` refused the tensors of a file: it names the first few keys of each kind."""
    problems = []
    for line in str(error).splitlines()[1:]:
        kind, _, keys = line.strip().partition(": ")
        names = keys.rstrip(". ").split(", ")
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problems.append(f"{kind}: {', '.join(names[:3])}{more}" if kind.endswith("state_dict") else line.strip())
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    return CheckpointError(
        f"{weights.path} is no file of {weights.network} ({'; '.join(problems[:4]) or error}{more}). "
        f"Give {_how(weights.network, weights.option)}."
    )
