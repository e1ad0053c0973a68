"""Strict configuration: a mapping (from TOML) becomes frozen dataclasses, and nothing in it is ignored.

An unknown key is an error with a suggestion, a value of the wrong type is an error that names the key, and each
dataclass checks its own ranges in ``__post_init__``. There is no interpolation, no evaluation and no import.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

from bayesnet.errors import ConfigError
from bayesnet.registry import unknown_name

MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_DEPTH = 8

Section = TypeVar("Section")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the contents of a TOML file of at most 1 MB.

    Raises:
        ConfigError: The file is missing, too large, not UTF-8 or not TOML.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError("configuration file is larger than 1 MB", where=path)
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError("cannot read the configuration", where=path, hint=reason) from error


def parse_override(text: str) -> dict[str, Any]:
    """Return the nested mapping for one ``section.key=value``; the value is TOML, or else a plain string.

    Raises:
        ConfigError: There is no ``=`` or no dotted key before it.

    Example:
        >>> parse_override("optimizer.learning_rate=1e-3")
        {'optimizer': {'learning_rate': 0.001}}
        >>> parse_override("data.spec=folder:photos")
        {'data': {'spec': 'folder:photos'}}
    """
    key, separator, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts) or len(parts) < 2:
        raise ConfigError("cannot read the override", where=text, hint="write section.key=value")
    if len(parts) > MAX_CONFIG_DEPTH:
        raise ConfigError("override is nested too deeply", where=key)
    try:
        document = tomllib.loads(f"value = {value}")
        parsed: Any = document["value"] if len(document) == 1 else value  # a line break would begin another key
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = value
    for part in reversed(parts):
        parsed = {part: parsed}
    return typing.cast("dict[str, Any]", parsed)


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``override`` laid over it, table by table; neither is changed.

    Example:
        >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def build_section(cls: type[Section], mapping: object, *, section: str) -> Section:
    """Return the frozen dataclass ``cls`` built from a mapping, checked key by key.

    Args:
        cls: A dataclass whose fields are bool, int, float, str, Literal, tuples of these, or a union with None.
        mapping: The table; keys that are absent take the field's default.
        section: The table's name, for messages.

    Raises:
        ConfigError: An unknown key (with a suggestion), a wrong type, or a value that the dataclass refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError("expected a table", where=section, hint=f"got {mapping!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in mapping:
        if key not in known:
            raise unknown_name("configuration key", f"{section}.{key}", [f"{section}.{name}" for name in known])
    values = {key: _checked(value, hints[key], f"{section}.{key}") for key, value in mapping.items()}
    return cls(**values)


def to_mapping(section: object) -> dict[str, Any]:
    """Return a dataclass as a mapping that TOML can hold (fields that are None are left out).

    Raises:
        TypeError: ``section`` is not a dataclass instance.
    """
    pairs = dataclasses.asdict(section).items()  # type: ignore[call-overload]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs if value is not None}


def require(condition: bool, what: str, *, where: str, hint: str | None = None) -> None:
    """Raise ConfigError unless ``condition`` holds: the one-line range check of configuration dataclasses.

    Raises:
        ConfigError: ``condition`` is false.
    """
    if not condition:
        raise ConfigError(what, where=where, hint=hint)


def _checked(value: object, hint: Any, where: str) -> object:  # noqa: ANN401 - a type expression has no better type
    """Return ``value`` as the type that ``hint`` asks for, or raise ConfigError naming the key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise unknown_name(f"value of {where}", str(value), arguments)
        return value
    if origin in (UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return _checked(value, inner, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError("expected a list", where=where, hint=f"got {value!r}")
        return tuple(_checked(item, arguments[0], where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"expected {hint.__name__}", where=where, hint=f"got {value!r}")
    return value
