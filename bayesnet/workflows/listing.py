"""The workflow behind `bayesnet list`: what there is to choose from, read from the tables that are used."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from bayesnet.backbones import BACKBONES, ZOOS, describe, resolve
from bayesnet.data import DATASETS
from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES
from bayesnet.registry import unknown_name
from bayesnet.types import JsonObject

MAX_COUNTED = 100
"""Of how many backbones the parameters are counted: each has to be built for it, though without its memory."""

_WILDCARDS = frozenset("*?[")


def list_backbones(pattern: str | None = None) -> JsonObject:
    """Return the built-in backbones, or those that a pattern names.

    Args:
        pattern: A name, or a pattern of ``*``, ``?`` and ``[...]``. One that begins with ``torchvision:`` or ``timm:``
            is looked up in that collection, any other one among the built-in ones.

    Returns:
        ``rows`` (name, description, num_features, parameters without the head, input_size in pixels or null, accuracy
        as published, top-1 on ImageNet-1k, or null) and, without a pattern, ``collections`` (name, description,
        num_names, which is null where the package is not installed). Where more than 100 match, num_features and
        parameters are null.

    Raises:
        ConfigError: Nothing matches, or the collection is not installed.
    """
    prefix, colon, model = (pattern or "").partition(":")
    if pattern is not None and colon and not _WILDCARDS & set(pattern):
        resolve(pattern)  # raises with a suggestion
        names = [pattern]
    elif pattern is not None and colon and prefix in ZOOS:
        names = [f"{prefix}:{name}" for name in _matching("backbone", ZOOS[prefix].names(), model)]
    else:
        names = _matching("backbone", BACKBONES, pattern)
    rows = [_counted(name) if len(names) <= MAX_COUNTED else _uncounted(name) for name in names]
    return {"rows": rows, "collections": [_collection(name) for name in ZOOS if pattern is None]}


def list_families(pattern: str | None = None) -> JsonObject:
    """Return ``rows`` (name, description, bayesian) of the posterior families.

    Args:
        pattern: A name, or a pattern of ``*``, ``?`` and ``[...]``.

    Raises:
        ConfigError: Nothing matches.

    Example:
        >>> [row["name"] for row in list_families("mean*")["rows"]]
        ['mean_field', 'mean_field_all']
    """
    families = [FAMILIES[name] for name in _matching("family", FAMILIES, pattern)]
    return {"rows": [{"name": f.name, "description": f.description, "bayesian": f.bayesian} for f in families]}


def list_datasets(pattern: str | None = None) -> JsonObject:
    """Return ``rows`` (name, description, spec: how ``--data`` is given it) of the data sets.

    Args:
        pattern: A name, or a pattern of ``*``, ``?`` and ``[...]``.

    Raises:
        ConfigError: Nothing matches.
    """
    names = _matching("data set", DATASETS, pattern)
    rows = [
        {
            "name": name,
            "description": DATASETS[name].description,
            "spec": f"{name}:PATH" if DATASETS[name].takes_path else name,
        }
        for name in names
    ]
    return {"rows": rows}


def _matching(kind: str, names: Iterable[str], pattern: str | None) -> list[str]:
    """Return the names that match, in their order; there is at least one."""
    known = list(names)
    found = [name for name in known if pattern is None or fnmatchcase(name, pattern)]
    if not found and pattern is not None and not _WILDCARDS & set(pattern):
        raise unknown_name(kind, pattern, known)
    if not found:
        raise ConfigError(f"no {kind} matches", where=pattern, hint="quote the pattern, and see the list without it")
    return found


def _counted(name: str) -> JsonObject:
    return describe(name)._asdict()


def _uncounted(name: str) -> JsonObject:
    """Return the row of a backbone that is not built."""
    entry = resolve(name)
    published = entry.published()
    return {
        "name": name,
        "description": entry.description,
        "num_features": None,
        "parameters": None,
        "input_size": None if published is None else published.input_size,
        "accuracy": None if published is None else published.accuracy,
    }


def _collection(prefix: str) -> JsonObject:
    """Return the row of a collection; a package that is not installed has no names to count."""
    zoo = ZOOS[prefix]
    try:
        num_names = len(zoo.names())
    except ConfigError:
        num_names = None
    return {"name": f"{prefix}:NAME", "description": zoo.description, "num_names": num_names}
