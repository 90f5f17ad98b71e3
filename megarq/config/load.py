"""From a YAML file and `key=value` arguments to a checked run configuration, and back to a file.

    configs/model/demo.yaml:  model: {embed_dim: 192, ...}    +    train.lr=1e-3
    -> defaults of the dataclass  <-  the file  <-  the command line
    -> RQTransformerRunConfig(model=RQTransformerConfig(embed_dim=192, ...), train=TrainConfig(lr=0.001, ...), ...)

Nothing is taken silently: an unknown key, a value of another type and a `${...}` each stop with the key and where it
came from.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarq.config.models import RQVAEConfig
from megarq.config.names import CONFIGS, key_suggestion, resolve_name
from megarq.config.run import RQTransformerRunConfig, RQVAERunConfig
from megarq.config.schema import expected, known_keys, leaves
from megarq.errors import ConfigError
from megarq.files import write_atomically

RunConfig = RQTransformerRunConfig | RQVAERunConfig
Config = TypeVar("Config")

ARCHITECTURES: dict[str, type[RQTransformerRunConfig] | type[RQVAERunConfig]] = {
    "rq-transformer": RQTransformerRunConfig,
    "rq-vae": RQVAERunConfig,
}
TRAINERS = {"rq-transformer": "megarq/train.py", "rq-vae": "megarq/train_rqvae.py"}
COMMAND_LINE = "command line"


@overload
def load_config(
    name_or_path: str, overrides: Sequence[str], architecture: Literal["rq-transformer"]
) -> RQTransformerRunConfig: ...
@overload
def load_config(name_or_path: str, overrides: Sequence[str], architecture: Literal["rq-vae"]) -> RQVAERunConfig: ...
@overload
def load_config(name_or_path: str, overrides: Sequence[str] = (), architecture: None = None) -> RunConfig: ...
def load_config(name_or_path: str, overrides: Sequence[str] = (), architecture: str | None = None) -> RunConfig:
    """Read and check a run's configuration.

    Args:
        name_or_path: a file, or a name in configs/model ("demo").
        overrides: `key=value` arguments, keys dotted ("train.lr=1e-3"), values as in YAML.
        architecture: "rq-transformer" or "rq-vae" where only that one will do; None takes what the file says.

    Raises:
        ConfigError: no such file, an unknown key, a value of another type, another architecture, or a configuration
            that `validate` refuses.
    """
    path = resolve_name(name_or_path, CONFIGS / "model", ".yaml")
    document = read_yaml(path)
    described = document.get("architecture", architecture)
    if described not in ARCHITECTURES:
        raise ConfigError(f"architecture={described!r} in {path}: use one of {', '.join(ARCHITECTURES)}.")
    if architecture is not None and described != architecture:
        raise ConfigError(
            f"{name_or_path} is an {described}; {TRAINERS[architecture]} trains an {architecture}. "
            f"Use {TRAINERS[described]}, or another --model."
        )
    schema = ARCHITECTURES[described]
    layers = [(str(path), document), (COMMAND_LINE, _parse_overrides(overrides, schema))]
    config = build(schema, layers)
    if config.architecture != described:
        raise ConfigError(
            f"architecture={config.architecture} on the {COMMAND_LINE}: {path} describes an {described}. "
            "Leave the key out."
        )
    config.validate()
    return config


def config_around(model: RQVAEConfig, source: str, overrides: Sequence[str] = ()) -> RQVAERunConfig:
    """A checked run configuration of stage 1 for a model that is given: defaults, then `overrides`.

    Raises ConfigError as `load_config` does, naming `source` for the model's own fields.
    """
    layers = [
        (source, {"model": dataclasses.asdict(model)}),
        (COMMAND_LINE, _parse_overrides(overrides, RQVAERunConfig)),
    ]
    config = build(RQVAERunConfig, layers)
    config.validate()
    return config


def save_config(config: Any, path: str | Path) -> None:
    """Write a configuration dataclass as YAML, whole or not at all."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode("utf-8"))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain dicts, lists and scalars, for YAML and JSON."""
    return dataclasses.asdict(config)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dict; only plain values can come out of it. Raises ConfigError where it is not one."""
    try:
        document = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {_one_line(error)}. Mend or replace it.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds a list, not keys: start from a file in {CONFIGS / 'model'}.")
    return cast(dict[str, Any], document)


def build(schema: type[Config], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """A dataclass from its defaults and layers of values, later ones winning. Does not call `validate`.

    Args:
        schema: a configuration dataclass.
        layers: (where it came from, nested values).

    Raises:
        ConfigError: an unknown key or a value of another type.
    """
    merged = OmegaConf.structured(schema)
    for source, values in layers:
        for key, value in leaves(schema, values, source):
            try:
                OmegaConf.update(merged, key, value, merge=False)
            except OmegaConfBaseException as error:
                raise ConfigError(f"{key}={_shown(value)} ({source}): expected a {expected(schema, key)}.") from error
            if _not_finite(OmegaConf.select(merged, key)):
                raise ConfigError(f"{key}={_shown(value)} ({source}): expected a finite number.")
    return cast(Config, OmegaConf.to_object(merged))


def _parse_overrides(overrides: Sequence[str], schema: type[Any]) -> dict[str, Any]:
    """`key=value` arguments as a nested dict; the last of equal keys counts."""
    nested: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            nearest = key_suggestion(override.lstrip("-"), known_keys(schema))
            raise ConfigError(
                f"{override!r} ({COMMAND_LINE}): expected key=value without spaces, such as train.lr=1e-3.{nearest}"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{override!r} ({COMMAND_LINE}): {text!r} is not a YAML value ({_one_line(error)}). Quote it."
            ) from error
        *sections, last = key.split(".")
        level = nested
        for section in sections:
            inner = level.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{override!r} ({COMMAND_LINE}): {section} has been given a value. Give one of the two."
                )
            level = inner
        level[last] = value
    return nested


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not isfinite(value)
