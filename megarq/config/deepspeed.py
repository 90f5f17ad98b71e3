"""Every rule about DeepSpeed's own configuration, the JSON given as --ds_config.

What it leaves out or calls "auto" is filled from the run's configuration; what it states otherwise is a ConfigError
that names both. DeepSpeed ignores unknown keys at its top level in silence; here an unknown key anywhere stops the run.
"""

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megarq.config.names import suggestion
from megarq.config.run import ParallelConfig, TrainConfig
from megarq.errors import ConfigError

logger = logging.getLogger(__name__)

_OURS_INSTEAD = {
    "activation_checkpointing": "train.activation_checkpointing=true",
    "amp": "train.precision=bf16",
    "checkpoint": "checkpoint.every and checkpoint.keep",
    "fp16": "train.precision=bf16 or train.precision=fp32",
    "scheduler": "train.schedule, train.lr and train.warmup_steps",
}
_SCALARS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "zero_allow_untested_optimizer",
}
_SECTIONS = {
    "data_types": {"grad_accum_dtype"},
    "optimizer": {"type", "params"},
    "optimizer.params": {"lr", "betas", "eps", "weight_decay", "adam_w_mode"},
    "flops_profiler": {
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    },
    "pipeline": {"pipe_partitioned", "grad_partitioned"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
}

_OFFLOADS = ("offload_optimizer", "offload_param")


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON file, with every key known. Raises ConfigError."""
    try:
        ds = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ds_config {path} is not JSON: {error}. Correct the file.") from error
    if not isinstance(ds, dict):
        raise ConfigError(f"--ds_config {path} holds a {type(ds).__name__}: expected an object of DeepSpeed's keys.")
    _refuse_unknown(ds, path)
    _refuse_wrong_values(ds, path)
    return ds


def _declared_sections() -> dict[str, Any]:
    """Sections that the DeepSpeed release in use declares itself, as pydantic models."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
    }


def _known_keys() -> dict[str, set[str]]:
    """Keys of each section, "" being the top level."""
    sections = {
        name: {key for field, info in model.model_fields.items() for key in (field, info.alias) if key}
        for name, model in _declared_sections().items()
    } | _SECTIONS
    return sections | {"": _SCALARS | {name for name in sections if "." not in name}}


def _refuse_unknown(ds: Mapping[str, Any], path: Path) -> None:
    known = _known_keys()

    def walk(section: str, content: Mapping[str, Any]) -> None:
        for key, value in content.items():
            full = f"{section}.{key}" if section else key
            if not section and key in _OURS_INSTEAD:
                if _is_off(value):
                    continue
                raise ConfigError(f"{path}: {key} is not taken from ds_config. Use {_OURS_INSTEAD[key]} instead.")
            if key not in known[section]:
                raise ConfigError(f"{path}: unknown key {full}.{suggestion(key, known[section]) or ' Remove it.'}")
            if full not in known or (section and value is None):
                continue
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{path}: {full}={json.dumps(value)}: expected an object of {', '.join(sorted(known[full]))}."
                )
            walk(full, value)

    walk("", ds)


def _is_off(section: Any) -> bool:
    """Whether a section says that it is not wanted, {"enabled": false}."""
    return isinstance(section, Mapping) and section.get("enabled") in (False, "auto")


def _refuse_wrong_values(ds: Mapping[str, Any], path: Path) -> None:
    from pydantic import ValidationError

    for name, model in _declared_sections().items():
        if "." in name or name not in ds:
            continue
        try:
            model(**_without_auto(ds[name]))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (name, *first["loc"])))
            raise ConfigError(f"{path}: {key}={first['input']!r}: {first['msg']}. Correct the value.") from error


def resolve_ds_config(
    ds: Mapping[str, Any], train: TrainConfig, parallel: ParallelConfig, data_parallel: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for a run, complete. Raises ConfigError where it contradicts the run's own.

    Args:
        ds: the JSON as read.
        train: the run's batch, precision and clipping.
        parallel: tensor- and pipeline-parallel sizes.
        data_parallel: number of data-parallel ranks.
    """
    micro, accumulation = batch_sizes(train, data_parallel)
    taken = {key: value for key, value in ds.items() if key != "optimizer" and key not in _OURS_INSTEAD}
    resolved = _without_auto(taken)
    _check_optimizer(ds.get("optimizer", {}), train)
    expected = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", micro),
        "gradient_accumulation_steps": (
            "train.global_batch_size / (train.micro_batch_size x data-parallel ranks)",
            accumulation,
        ),
        "gradient_clipping": ("train.clip", train.clip),
    }
    for key, (name, value) in expected.items():
        _agree(resolved, key, name, value)
    bf16 = dict(resolved.get("bf16", {}))
    _agree(bf16, "enabled", "train.precision=bf16", train.precision == "bf16", prefix="bf16.")
    resolved["bf16"] = bf16
    resolved.setdefault("communication_data_type", "fp32")
    resolved["data_types"] = {"grad_accum_dtype": "fp32"} | resolved.get("data_types", {})
    _check_monitors(resolved)
    check_zero(ds, parallel, data_parallel)
    zero = ds.get("zero_optimization", {})
    if zero.get("stage", 1) == 0:
        logger.warning("zero_optimization.stage=0 runs as stage 1: DeepSpeed's stage 0 reports no gradient norm.")
    resolved["zero_optimization"] = _without_auto({**zero, "stage": max(1, zero.get("stage", 1))})
    _fill_pipeline(resolved, parallel)
    resolved.setdefault("zero_allow_untested_optimizer", True)
    resolved["zero_force_ds_cpu_optimizer"] = False
    resolved.setdefault("steps_per_print", 10**12)
    return resolved


def _check_monitors(ds: Mapping[str, Any]) -> None:
    """DeepSpeed looks for a monitor's package on rank 0 alone, where the others would wait for it."""
    for section, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if ds.get(section, {}).get("enabled") and find_spec(package) is None:
            raise ConfigError(
                f"ds_config says {section}.enabled=true, but {package} is not installed. Give pip install {package}, "
                "or turn it off."
            )


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """What is stated: keys that say "auto" are left to the run, or to DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }


def batch_sizes(train: TrainConfig, data_parallel: int) -> tuple[int, int]:
    """(samples per rank at once, micro-steps per update). Raises ConfigError where the batch does not divide."""
    total = train.global_batch_size
    if total % data_parallel:
        raise ConfigError(
            f"train.global_batch_size={total} is not divisible by the {data_parallel} data-parallel ranks. "
            f"Use a multiple of {data_parallel}."
        )
    share = total // data_parallel
    micro = train.micro_batch_size or share
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size={micro} does not divide a rank's share of the batch, {share} "
            f"(train.global_batch_size={total} over {data_parallel} data-parallel ranks). Use a divisor of {share}."
        )
    return micro, share // micro


def zero_stage(ds: Mapping[str, Any]) -> int:
    """ZeRO stage of a configuration."""
    stage: int = ds.get("zero_optimization", {}).get("stage", 1)
    return stage


def _agree(section: dict[str, Any], key: str, name: str, value: Any, prefix: str = "") -> None:
    stated = section.get(key, "auto")
    if stated not in ("auto", value):
        raise ConfigError(
            f"ds_config says {prefix}{key}={json.dumps(stated)}, but the run's {name} gives {json.dumps(value)}. "
            'Change one of them, or write "auto" in ds_config.'
        )
    section[key] = value


def _check_optimizer(optimizer: Mapping[str, Any], train: TrainConfig) -> None:
    kind = optimizer.get("type", "AdamW")
    if kind not in ("AdamW", "auto"):
        raise ConfigError(f"ds_config says optimizer.type={kind!r}: MegaRQ trains with AdamW. Remove the section.")
    stated = dict(optimizer.get("params", {}))
    ours = {"lr": train.lr, "betas": list(train.betas), "weight_decay": train.weight_decay}
    for key, value in ours.items():
        _agree(stated, key, f"train.{key}", value, prefix="optimizer.params.")
    for key, value in (("eps", 1e-8), ("adam_w_mode", True)):
        if stated.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"ds_config says optimizer.params.{key}={json.dumps(stated[key])}, but AdamW here has "
                f"{json.dumps(value)}. Remove the key."
            )


def _fill_pipeline(resolved: dict[str, Any], parallel: ParallelConfig) -> None:
    """Activations and gradients travel whole between stages: DeepSpeed cuts only the first tensor of a state."""
    pipeline = resolved.pop("pipeline", {})
    for key in _SECTIONS["pipeline"]:
        if pipeline.get(key, False) is not False:
            raise ConfigError(
                f"ds_config says pipeline.{key}={json.dumps(pipeline[key])}: DeepSpeed would cut one tensor of those "
                "that travel between stages and assert that there is no other. Set it to false."
            )
    if parallel.pp > 1:
        resolved["pipeline"] = dict.fromkeys(sorted(_SECTIONS["pipeline"]), False)
        resolved["zero_optimization"]["overlap_comm"] = False  # which pipelines lack, and say so on every rank


def check_zero(ds: Mapping[str, Any], parallel: ParallelConfig, data_parallel: int) -> None:
    """Raise ConfigError where the section zero_optimization, as read, is not for this layout."""
    zero = ds.get("zero_optimization", {})
    stage = zero.get("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"ds_config says zero_optimization.stage={stage!r}: use 1, 2 or 3.")
    if parallel.pp > 1 and stage > 1:
        raise ConfigError(
            f"parallel.pp={parallel.pp} with ZeRO stage {stage}: DeepSpeed pipelines allow stages 0 and 1. "
            "Use --ds_config zero1.json or parallel.pp=1."
        )
    if stage == 0 and parallel.tp * parallel.pp > 1:
        raise ConfigError(
            f"parallel.tp={parallel.tp}, parallel.pp={parallel.pp} with ZeRO stage 0: it counts the gradient norm of "
            "only some ranks, and so clips wrongly. Use --ds_config zero1.json."
        )
    _check_offload(zero, stage, parallel)
    _check_secondary(zero, stage, parallel, data_parallel)


def _check_offload(zero: Mapping[str, Any], stage: int, parallel: ParallelConfig) -> None:
    for name in _OFFLOADS:
        section = zero.get(name) or {}
        device = section.get("device", "none")
        if device == "nvme":
            raise ConfigError(
                f"ds_config says zero_optimization.{name}.device=nvme: checkpoints read the states where they lie, and "
                'those on NVMe are out of reach. Use "cpu".'
            )
        if device != "cpu":
            continue
        if parallel.pp > 1:
            raise ConfigError(
                f"parallel.pp={parallel.pp} with zero_optimization.{name}: DeepSpeed pipelines keep all states on the "
                "device. Remove the section or use parallel.pp=1."
            )
        if name == "offload_param" and stage != 3:
            raise ConfigError(
                f"ds_config says zero_optimization.offload_param with stage {stage}: only stage 3 cuts parameters. "
                "Use --ds_config zero3-offload.json or remove the section."
            )
        if section.get("ratio", 1.0) != 1.0 or section.get("super_offload"):
            raise ConfigError(
                f"ds_config says zero_optimization.{name} with ratio={section.get('ratio', 1.0)}, super_offload="
                f"{json.dumps(section.get('super_offload', False))}: both need DeepSpeed's own Adam, and torch's runs "
                "here. Remove the keys."
            )


def _check_secondary(zero: Mapping[str, Any], stage: int, parallel: ParallelConfig, data_parallel: int) -> None:
    """Rules of ZeRO++ hpZ, a second copy of the parameters cut over the ranks of a node."""
    size = zero.get("zero_hpz_partition_size", 1)
    if size in ("auto", 0, 1):
        return
    said = f"ds_config says zero_optimization.zero_hpz_partition_size={size}"
    if stage != 3:
        raise ConfigError(f"{said} with stage {stage}: only stage 3 gathers parameters. Use stage 3 or remove the key.")
    if parallel.tp > 1:
        raise ConfigError(
            f"{said} with parallel.tp={parallel.tp}: DeepSpeed takes neighbouring ranks, which hold different slices "
            "of each layer. Use parallel.tp=1 or remove the key."
        )
    if data_parallel % size:
        raise ConfigError(
            f"{said}, which does not divide the {data_parallel} data-parallel ranks. Use the number of GPUs of a node."
        )


def offloads(ds: Mapping[str, Any]) -> bool:
    """Whether optimiser states, or parameters too, are kept in CPU memory."""
    zero = ds.get("zero_optimization", {})
    return any((zero.get(name) or {}).get("device") == "cpu" for name in _OFFLOADS)
