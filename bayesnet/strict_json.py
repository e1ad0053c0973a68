"""Strict JSON: what is written is finite and plain, what is read has no surprises."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from bayesnet.errors import CheckpointError
from bayesnet.types import JsonObject

MAX_JSON_BYTES = 32_000_000
"""Of a file: what is larger is neither written nor read."""

MAX_JSON_DEPTH = 64


def parse_json(data: bytes, *, where: object) -> JsonObject:
    """Return the object that strict JSON spells: no duplicate keys, no NaN or infinity, at most 64 levels.

    Raises:
        CheckpointError: ``data`` is anything else.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}', where="state.json")
        Traceback (most recent call last):
        bayesnet.errors.CheckpointError: not valid JSON (state.json): duplicate key 'a'
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise CheckpointError("JSON is nested too deeply", where=where) from None
    except ValueError as error:
        raise CheckpointError("not valid JSON", where=where, hint=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=where)
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, dict | list)]
    if level:
        raise CheckpointError("JSON is nested too deeply", where=where)
    return value


def json_ready(value: object, *, depth: int = MAX_JSON_DEPTH) -> Any:  # noqa: ANN401 - JSON is any
    """Return ``value`` in JSON's types: NaN and infinity become None, tuples lists, paths and arrays their contents.

    Args:
        value: Nested mappings with string keys, sequences, scalars, paths, and what has ``tolist`` (arrays, tensors).
        depth: Levels that may still follow.

    Raises:
        TypeError: A value or key has no JSON form.
        ValueError: Nested too deeply.

    Example:
        >>> json_ready({"nll": float("nan"), "ci95": (0.1, 0.2)})
        {'nll': None, 'ci95': [0.1, 0.2]}
    """
    if depth < 0:
        raise ValueError(f"JSON is nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a JSON key must be a string, not {key!r}")
        return {key: json_ready(item, depth=depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item, depth=depth - 1) for item in value]
    if hasattr(value, "tolist"):
        return json_ready(value.tolist(), depth=depth)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def json_bytes(record: object) -> bytes:
    """Return JSON text in ASCII, so that any name, even one that is not UTF-8, comes back as it was."""
    return json.dumps(record, allow_nan=False, indent=2).encode("ascii") + b"\n"


def json_line(record: JsonObject) -> bytes:
    """Return one line of JSON text in ASCII."""
    return json.dumps(json_ready(record), allow_nan=False).encode("ascii") + b"\n"


def _unique_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Return the object, refusing a key that occurs twice: readers would disagree about its value."""
    record: JsonObject = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"duplicate key {key[:80]!r}")
        record[key] = value
    return record


def _refuse_constant(text: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    """Return the number, refusing one that overflows to infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number out of range: {text[:80]}")
    return value
