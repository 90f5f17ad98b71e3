"""Every rule about DeepSpeed's own configuration, the JSON given as --ds_config.

What it leaves out or calls "auto" is filled from the run's configuration; what it states otherwise is a ConfigError
that names both. DeepSpeed ignores unknown keys at its top level in silence; here an unknown key anywhere stops the run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarq.config.names import suggestion
from megarq.config.run import ParallelConfig, TrainConfig
from megarq.errors import ConfigError

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
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
}


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
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
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
    resolved["zero_optimization"] = _without_auto(_zero(ds.get("zero_optimization", {}), parallel))
    resolved.setdefault("zero_allow_untested_optimizer", True)
    resolved["zero_force_ds_cpu_optimizer"] = False
    resolved.setdefault("steps_per_print", 10**12)
    return resolved


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


def _zero(zero: Mapping[str, Any], parallel: ParallelConfig) -> dict[str, Any]:
    stage = zero.get("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"ds_config says zero_optimization.stage={stage!r}: use 1, 2 or 3.")
    if parallel.pp > 1 and stage > 1:
        raise ConfigError(
            f"parallel.pp={parallel.pp} with ZeRO stage {stage}: DeepSpeed pipelines allow stages 0 and 1. "
            "Use --ds_config zero1.json or parallel.pp=1."
        )
    # Stage 0 reports no gradient norm, and counts it wrongly under tensor parallelism: it runs as stage 1.
    return {**zero, "stage": max(1, stage)}
