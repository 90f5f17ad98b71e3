"""Saving and loading whole models: the RQ-VAE alone, or with the RQ-Transformer that writes its codes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megarq.checkpoint.run_folder import checkpoint_at, checkpoints_folder
from megarq.config.models import RQTransformerConfig, RQVAEConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.inference.frozen import Form, freezable
from megarq.inference.model_folder import CONFIG, ModelInfo, read_info, write_info
from megarq.inference.runs import check_architecture, rqvae_of_checkpoint
from megarq.inference.tensor_files import PART_BYTES, read_tensors, write_tensors
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.tokenizer import TextTokenizer
from megarq.transformer.rq_transformer import RQTransformer

MODEL, RQVAE_STEM = "model", "rqvae"


class Pretrained(NamedTuple):
    """An exported model in memory, in evaluation mode."""

    transformer: RQTransformer
    rqvae: RQVAE
    tokenizer: TextTokenizer | None
    info: ModelInfo


def save_rqvae(rqvae: RQVAE, folder: str | Path) -> None:
    """Write the RQ-VAE's part of a folder, config.json last. The folder may hold other files, such as code shards.

    Raises CheckpointError where it holds another RQ-VAE.
    """
    folder = Path(folder)
    info = ModelInfo(rqvae.config, fingerprint(rqvae))
    if (folder / CONFIG).exists():
        found = read_info(folder)
        if found.rqvae_fingerprint != info.rqvae_fingerprint:
            raise CheckpointError(
                f"{folder} already holds the RQ-VAE {found.rqvae_fingerprint[:12]}, not {info.rqvae_fingerprint[:12]}: "
                "give another folder."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_rqvae(rqvae, folder)
    write_info(folder, info)


def write_rqvae(rqvae: RQVAE, folder: Path) -> None:
    """Write rqvae.safetensors, in the dtypes that the model has."""
    state = rqvae.state_dict()
    write_tensors(folder, RQVAE_STEM, state, state.__getitem__)


def load_rqvae(path: str | Path, device: str | torch.device = "cpu") -> RQVAE:
    """Load an RQ-VAE in evaluation mode, in fp32.

    Args:
        path: an exported model, an RQ-VAE folder, a folder of code shards, or a run of train_rqvae.
        device: where to put it.

    Raises:
        CheckpointError: none is there, or it is damaged or does not have the fingerprint it was saved with.
        ConfigError: the device does not exist.
    """
    path, device = Path(path), find_device(device)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Check the path.")
    if (path / CONFIG).exists():
        return _read_rqvae(path, read_info(path)).to(device)
    if checkpoints_folder(path).is_dir():
        checkpoint = checkpoint_at(path)
        check_architecture(checkpoint, "rq-vae", path)
        return rqvae_of_checkpoint(checkpoint).to(device)
    raise CheckpointError(
        f"{path} holds no RQ-VAE: give the --output of train_rqvae.py, pretokenize.py, import_pretrained.py or "
        "export.py."
    )


def _read_rqvae(folder: Path, info: ModelInfo) -> RQVAE:
    rqvae = RQVAE(info.rqvae).eval()
    read_tensors(folder, RQVAE_STEM, rqvae.state_dict())
    found = fingerprint(rqvae)
    if found != info.rqvae_fingerprint:
        raise CheckpointError(
            f"{folder}: rqvae.safetensors has the fingerprint {found[:12]}, config.json names "
            f"{info.rqvae_fingerprint[:12]}. Use the two files of one export."
        )
    return rqvae


def write_transformer(
    folder: Path,
    config: RQTransformerConfig,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write model.safetensors or its parts: the parameters, under our names, each as `read` gives it."""
    with torch.device("meta"):
        like = dict(RQTransformer(config).to(dtype).named_parameters())
    write_tensors(folder, MODEL, like, read, part_bytes)


def load_pretrained(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    form: Form | None = None,
    tp: TensorGroup = ALONE,
) -> Pretrained:
    """Load an exported model; the RQ-Transformer in `dtype`, the RQ-VAE in fp32.

    Beside the model, one tensor is in memory at a time. `form` is what the linear layers' weights become; `tp` shares
    the RQ-Transformer among the ranks of a tensor group, each of which reads its part of the files.

    Raises:
        CheckpointError: the folder is missing, damaged, of another format version, or holds only an RQ-VAE.
        ConfigError: the device does not exist, or the dtype is not a floating-point one.
    """
    folder, device = Path(folder), find_device(device)
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype}: use torch.float32, torch.bfloat16 or torch.float16.")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the --output of tools/export.py or import_pretrained.py."
        )
    info = read_info(folder)
    if info.transformer is None:
        raise CheckpointError(
            f"{folder} holds an RQ-VAE alone, no RQ-Transformer: export the run of megarq/train.py to sample from it."
        )
    check_fit(info.transformer, info.rqvae)
    rqvae = _read_rqvae(folder, info).to(device)
    transformer = _read_transformer(folder, info, device, dtype, form, tp)
    transformer.load_codebook(rqvae.codebook_weights())
    return Pretrained(transformer, rqvae, _read_tokenizer(folder, info), info)


def _read_transformer(
    folder: Path, info: ModelInfo, device: torch.device, dtype: torch.dtype, form: Form | None, tp: TensorGroup
) -> RQTransformer:
    """The RQ-Transformer without its codebook."""
    assert info.transformer is not None
    with _default_dtype(dtype):  # on the CPU, whose memory is not taken before it is written
        transformer = RQTransformer(info.transformer, tp, shared_codebook=info.rqvae.shared_codebook).eval()
    parameters, layers = dict(transformer.named_parameters()), freezable(transformer)

    def store(name: str, tensor: Tensor) -> None:
        tensor = tensor.to(device, dtype)
        if form is not None and name in layers:
            layers[name].freeze(form, tensor)
        else:
            parameters[name].data = tensor

    read_tensors(folder, MODEL, parameters, store, tp)
    return transformer.to(device)  # the buffers


def _read_tokenizer(folder: Path, info: ModelInfo) -> TextTokenizer | None:
    if info.tokenizer is None or info.transformer is None:
        return None
    if not (folder / info.tokenizer).is_file():
        raise CheckpointError(f"{folder / info.tokenizer} is missing: copy or export the folder again.")
    tokenizer = TextTokenizer.load(folder / info.tokenizer)
    check_tokenizer(tokenizer, info.transformer)
    return tokenizer


def check_tokenizer(tokenizer: TextTokenizer, config: RQTransformerConfig) -> None:
    """Raise CheckpointError where the tokenizer knows tokens that the model does not."""
    if tokenizer.vocab_size > config.cond_vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.cond_vocab_size} "
            "(model.cond_vocab_size): use the tokenizer that the model was trained with."
        )


def check_fit(transformer: RQTransformerConfig, rqvae: RQVAEConfig) -> None:
    """Raise CheckpointError where the RQ-Transformer's codes are not the RQ-VAE's."""
    pairs = {
        "code shape": (list(transformer.code_shape), list(rqvae.code_shape)),
        "codebook sizes": (list(transformer.sizes), list(rqvae.sizes)),
    }
    if transformer.uses_codebook:
        pairs["codebook vectors' length"] = ([transformer.codebook_dim], [rqvae.codebook_dim])
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise CheckpointError(
                f"the RQ-Transformer's {what} {ours} differs from the RQ-VAE's {theirs}: they were not trained "
                "together. Use the RQ-VAE that the RQ-Transformer was trained on."
            )


def find_device(device: str | torch.device) -> torch.device:
    """The device of a name. Raises ConfigError where there is none."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={str(device)!r} cannot be used ({str(error).splitlines()[0]}): try cpu.") from error
    return found


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
