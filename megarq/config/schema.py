"""Configuration dataclasses as trees of dotted keys: which keys there are, and what type each holds."""

import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from megarq.config.names import key_suggestion
from megarq.errors import ConfigError

_WORDS = {int: "whole number", float: "number", str: "word", bool: "true or false"}


def known_keys(schema: type[Any]) -> list[str]:
    """All dotted keys that hold a value, in order: `train.lr`, `model.body.layers`, .."""
    keys: list[str] = []
    for name, kind in _types(schema).items():
        keys.extend([f"{name}.{key}" for key in known_keys(kind)] if _is_section(kind) else [name])
    return keys


def leaves(schema: type[Any], values: Mapping[Any, Any], source: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested values, each key checked against the schema.

    Args:
        schema: a configuration dataclass.
        values: nested by section.
        source: where they came from, for messages.

    Raises:
        ConfigError: a key that the schema does not have, a section that is given a value or a key that is given
            sections, or a value that only OmegaConf would understand.
    """
    return _walk(schema, schema, values, "", source)


def _walk(
    root: type[Any], schema: type[Any], values: Mapping[Any, Any], prefix: str, source: str
) -> Iterator[tuple[str, Any]]:
    known = _types(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            while isinstance(value, Mapping) and value:
                inner, value = next(iter(value.items()))
                key = f"{key}.{inner}"
            advice = key_suggestion(key, known_keys(root)) or _listed(prefix, known)
            raise ConfigError(f"unknown key {key} ({source}).{advice}")
        if _is_section(kind := known[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{key}={value!r} ({source}): {key} is a section of keys. Give one of them."
                    f"{_listed(f'{key}.', _types(kind))}"
                )
            yield from _walk(root, kind, value, f"{key}.", source)
        elif isinstance(value, Mapping):
            raise ConfigError(
                f"unknown key {key}.{next(iter(value), '')} ({source}): {key} is one {describe_type(kind)}. "
                "Give it a value."
            )
        else:
            _refuse_references(key, value, source)
            yield key, value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key: {"train": {"lr": 1}} as {"train.lr": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def expected(schema: type[Any], key: str) -> str:
    """What a known dotted key holds, in words."""
    section, _, rest = key.partition(".")
    kind = _types(schema)[section]
    return expected(kind, rest) if rest else describe_type(kind)


def describe_type(kind: Any) -> str:
    """A field's type in words: `int | None` is "whole number or null"."""
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " or ".join("null" if part is type(None) else describe_type(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"list such as [a, b], each a {describe_type(get_args(kind)[0])}"
    return _WORDS[kind]


def _is_section(kind: Any) -> bool:
    return is_dataclass(kind)


def _types(schema: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}


def _listed(prefix: str, known: Mapping[str, Any]) -> str:
    return f" Known: {', '.join(f'{prefix}{name}' for name in known)}."


def _refuse_references(key: str, value: Any, source: str) -> None:
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str) and ("${" in part or part == "???"):
            raise ConfigError(f"{key}={part} ({source}): references are not resolved here. Write the value itself.")
