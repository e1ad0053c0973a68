"""The directory of an export: built beside its place, then renamed, so that it is whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bayesnet import storage
from bayesnet.errors import CheckpointError, ConfigError

JSON_NAME = "model.json"
KIND = "bayesnet export"
"""Under "kind" in the file, which makes a directory one that a later export may replace."""

_FILES = frozenset({JSON_NAME, "README.md", "model.pt2", "model.onnx", "model.onnx.data"})


def claim(out: Path) -> Path:
    """Return where the export will lie, links resolved, once it is sure that nothing of anybody's is there.

    Raises:
        ConfigError: Something is there that no export made, or its parent is no directory.
    """
    with storage.storage_errors("cannot look at the output directory", out):
        path = out.resolve()
        for each in (path, path.parent):
            if each.exists() and not each.is_dir():
                raise ConfigError("not a directory", where=each, hint="choose another --out")
        if path.exists() and not (_is_empty(path) or _is_export(path)):
            hint = "choose another --out: only an earlier export is replaced"
            raise ConfigError("output directory is not empty", where=out, hint=hint)
    return path


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Give a directory to fill, and make it ``path`` when the block ends; after an error nothing has changed.

    An earlier export is moved aside first and then removed. A kill between the two moves leaves none under its name,
    which the next export mends.

    Args:
        path: As `claim` returned it.

    Raises:
        StorageError: The file system refused.
    """
    with storage.storage_errors("cannot write the export", path):
        created = storage.make_directories(path.parent)
        storage.remove_stale(path.parent)
        building, aside = (path.parent / storage.temporary_name() for _ in range(2))
        try:
            building.mkdir()
            yield building
            _sync(building)
            if path.exists():
                path.rename(aside)
            try:
                building.rename(path)
            except BaseException:
                if aside.exists():
                    aside.rename(path)
                raise
            storage.sync_directory(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            storage.remove_empty(created)
            raise


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir())


def _is_export(path: Path) -> bool:
    """Return whether a directory holds what an export wrote and nothing else."""
    if not {entry.name for entry in path.iterdir()} <= _FILES:
        return False
    with contextlib.suppress(CheckpointError):
        return storage.read_json(path / JSON_NAME).get("kind") == KIND
    return False


def _sync(directory: Path) -> None:
    """Make the files of a directory durable."""
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    storage.sync_directory(directory)
