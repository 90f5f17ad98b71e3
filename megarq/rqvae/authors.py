"""The authors' RQ-VAE checkpoints in our terms: `arch` of their config.yaml, and their state dict.

    arch: {type: rq-vae, hparams: {embed_dim, n_embed, latent_shape, code_shape, ...}, ddconfig: {ch, ch_mult, ...}}
    encoder.*, decoder.*, quant_conv.*, post_quant_conv.*     as ours
    quantizer.codebooks.<depth>.{weight, cluster_size_ema, embed_ema}   a shared codebook once per depth, identical
    discriminator.*                                           ignored here; finetuning takes it

Whatever would make the answers of the imported model differ is refused. The way back writes the same layout: what their
code builds from it, and what is read here, is the model that was written.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megarq.config.models import RQVAEConfig
from megarq.errors import CheckpointError
from megarq.rqvae.model import RQVAE

_IGNORED = "discriminator."
_OURS_ALONE = "quantizer.steps"


def config_from_authors(source: Mapping[str, Any]) -> RQVAEConfig:
    """Our configuration for the whole of an authors' RQ-VAE config.yaml.

    Raises CheckpointError for missing keys and for variants that our model does not have, ConfigError for values
    that contradict each other.
    """
    arch = _section(source, "arch")
    hparams, ddconfig = _section(arch, "arch.hparams"), _section(arch, "arch.ddconfig")
    _refuse_other_variants(arch, hparams, ddconfig)
    height, width, depth = _shape(hparams, "code_shape")
    latent_height, latent_width, latent_dim = _shape(hparams, "latent_shape")
    sizes = _required(hparams, "arch.hparams.n_embed")
    config = RQVAEConfig(
        resolution=_required(ddconfig, "arch.ddconfig.resolution"),
        image_channels=_required(ddconfig, "arch.ddconfig.in_channels"),
        channels=_required(ddconfig, "arch.ddconfig.ch"),
        channel_multipliers=list(_required(ddconfig, "arch.ddconfig.ch_mult")),
        res_blocks=_required(ddconfig, "arch.ddconfig.num_res_blocks"),
        attention_resolutions=_attention_levels(ddconfig),
        latent_channels=_required(ddconfig, "arch.ddconfig.z_channels"),
        codebook_dim=_required(hparams, "arch.hparams.embed_dim"),
        codebook_size=sizes if isinstance(sizes, int) else max(sizes),
        codebook_sizes=None if isinstance(sizes, int) else list(sizes),
        depth=depth,
        shared_codebook=_required(hparams, "arch.hparams.shared_codebook"),
        decay=_decay(hparams),
        restart_unused_codes=hparams.get("restart_unused_codes", True),
        dropout=ddconfig.get("dropout", 0.0),
    )
    config.validate()
    if (latent_height, latent_width) != (height, width) or latent_dim != config.codebook_dim:
        raise CheckpointError(
            f"arch.hparams.latent_shape={[latent_height, latent_width, latent_dim]} with code_shape="
            f"{[height, width, depth]} and embed_dim={config.codebook_dim}: only one stack of codes for each latent, "
            "as long as the codebook's vectors, can be imported. Use a checkpoint whose shapes agree."
        )
    if config.code_shape != (height, width, depth):
        raise CheckpointError(
            f"arch.hparams.code_shape={[height, width, depth]}, but resolution {config.resolution} and ch_mult "
            f"{config.channel_multipliers} give {list(config.code_shape)}. Mend config.yaml or use its own model.pt."
        )
    return config


def _attention_levels(ddconfig: Mapping[str, Any]) -> list[int]:
    """The resolutions with attention that some level has; their code ignores the others."""
    levels = len(_required(ddconfig, "arch.ddconfig.ch_mult"))
    present = [_required(ddconfig, "arch.ddconfig.resolution") // 2**level for level in range(levels)]
    wanted = _required(ddconfig, "arch.ddconfig.attn_resolutions")
    return [resolution for resolution in wanted if resolution in present]


def state_from_authors(state: Mapping[str, Any], config: RQVAEConfig) -> dict[str, Tensor]:
    """The state dict of our `RQVAE(config)` for the authors' `state`, in fp32 on the CPU.

    Raises CheckpointError, with their names, for missing or unknown tensors, wrong shapes, and depths that disagree
    about a shared codebook.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in RQVAE(config).state_dict().items() if name != _OURS_ALONE}
    theirs = {name: tensor for name, tensor in state.items() if not name.startswith(_IGNORED)}
    copies = _shared_copies(expected, config.depth) if config.shared_codebook else {}
    _check_names_and_shapes(theirs, expected | {copy: expected[name] for copy, name in copies.items()})
    different = [copy for copy, name in copies.items() if not torch.equal(theirs[copy], theirs[name])]
    if different:
        raise CheckpointError(
            f"The codebook is shared, but these differ from depth 0's: {_listed(different)}. "
            "Set arch.hparams.shared_codebook to false, or use an undamaged checkpoint."
        )
    ours = {name: theirs[name].detach().to("cpu", torch.float32).contiguous() for name in expected}
    return ours | {_OURS_ALONE: torch.zeros((), dtype=torch.int64)}


def config_to_authors(
    config: RQVAEConfig, reconstruction: str = "mse", commitment_weight: float = 0.25
) -> dict[str, Any]:
    """Their config.yaml of our configuration; `reconstruction` and `commitment_weight` are those of the training."""
    height, width, depth = config.code_shape
    hparams = {
        "bottleneck_type": "rq",
        "embed_dim": config.codebook_dim,
        "n_embed": config.codebook_size if config.codebook_sizes is None else list(config.codebook_sizes),
        "latent_shape": [height, width, config.codebook_dim],
        "code_shape": [height, width, depth],
        "shared_codebook": config.shared_codebook,
        "decay": config.decay,
        "restart_unused_codes": config.restart_unused_codes,
        "loss_type": reconstruction,
        "latent_loss_weight": commitment_weight,
    }
    ddconfig = {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.resolution,
        "in_channels": config.image_channels,
        "out_ch": config.image_channels,
        "ch": config.channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
    }
    arch = {"type": "rq-vae", "code_hier": 1, "hparams": hparams, "ddconfig": ddconfig, "checkpointing": False}
    return {"arch": arch}


def state_to_authors(state: Mapping[str, Tensor], config: RQVAEConfig) -> dict[str, Tensor]:
    """Their state dict of that of our `RQVAE(config)`; a shared codebook stands in it once for each depth."""
    theirs = {name: tensor.detach().to("cpu") for name, tensor in state.items() if name != _OURS_ALONE}
    copies = _shared_copies({name: tensor.shape for name, tensor in theirs.items()}, config.depth)
    return theirs | ({copy: theirs[name] for copy, name in copies.items()} if config.shared_codebook else {})


def _section(mapping: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    value = _required(mapping, path)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}={value!r} in the RQ-VAE's config.yaml: expected a section with keys of its own.")
    return value


def _required(mapping: Mapping[str, Any], path: str) -> Any:
    key = path.rpartition(".")[2]
    if mapping.get(key) is None:
        raise CheckpointError(
            f"{path} is missing from the RQ-VAE's config.yaml. Use the config.yaml that was published beside model.pt."
        )
    return mapping[key]


def _shape(hparams: Mapping[str, Any], key: str) -> tuple[int, int, int]:
    value = list(_required(hparams, f"arch.hparams.{key}"))
    if len(value) != 3:
        raise CheckpointError(f"arch.hparams.{key}={value}: expected three numbers.")
    return value[0], value[1], value[2]


def _decay(hparams: Mapping[str, Any]) -> float:
    decay = hparams.get("decay", 0.99)
    if isinstance(decay, int | float):
        return float(decay)
    if len(set(decay)) != 1:
        raise CheckpointError(
            f"arch.hparams.decay={list(decay)}: our codebooks share one decay. It matters only to further training: "
            "write one number into config.yaml."
        )
    return float(decay[0])


def _refuse_other_variants(arch: Mapping[str, Any], hparams: Mapping[str, Any], ddconfig: Mapping[str, Any]) -> None:
    """CheckpointError for what the authors' code can express and our model cannot; absent keys are taken as ours."""
    in_channels = _required(ddconfig, "arch.ddconfig.in_channels")
    only = (
        ("arch.type", arch.get("type", "rq-vae"), "rq-vae"),
        ("arch.code_hier", arch.get("code_hier", 1), 1),
        ("arch.hparams.bottleneck_type", hparams.get("bottleneck_type", "rq"), "rq"),
        ("arch.ddconfig.double_z", ddconfig.get("double_z", False), False),
        ("arch.ddconfig.resamp_with_conv", ddconfig.get("resamp_with_conv", True), True),
        ("arch.ddconfig.give_pre_end", ddconfig.get("give_pre_end", False), False),
        ("arch.ddconfig.out_ch", ddconfig.get("out_ch", in_channels), in_channels),
    )
    for path, value, supported in only:
        if value != supported:
            raise CheckpointError(
                f"{path}={value!r} cannot be imported: only {path}={supported!r} can. Choose another checkpoint."
            )


def _shared_copies(expected: Mapping[str, torch.Size], depth: int) -> dict[str, str]:
    """The authors' names of a shared codebook at depths after the first, with the name it has at depth 0."""
    first = "quantizer.codebooks.0."
    names = [name for name in expected if name.startswith(first)]
    return {name.replace(first, f"quantizer.codebooks.{d}."): name for d in range(1, depth) for name in names}


def _check_names_and_shapes(theirs: Mapping[str, Any], expected: Mapping[str, torch.Size]) -> None:
    missing = [name for name in expected if name not in theirs]
    unknown = [name for name in theirs if name not in expected]
    if missing or unknown:
        found = [f"missing {_listed(missing)}"] * bool(missing) + [f"unknown {_listed(unknown)}"] * bool(unknown)
        raise CheckpointError(
            f"The RQ-VAE's state dict does not fit its config.yaml: {'; '.join(found)}. "
            "Use the config.yaml that was published beside model.pt."
        )
    wrong = [
        f"{name} {list(getattr(theirs[name], 'shape', []))} instead of {list(shape)}"
        for name, shape in expected.items()
        if not isinstance(theirs[name], Tensor) or theirs[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"The RQ-VAE's state dict does not fit its config.yaml: {_listed(wrong)}. "
            "Use the config.yaml that was published beside model.pt."
        )


def _listed(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
