"""The workflow behind `bayesnet check-data`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bayesnet.data import DataConfig
from bayesnet.data.audit import audit_folder
from bayesnet.errors import DataError
from bayesnet.types import JsonObject

_PREFIX = "folder:"


def check_data(
    path: str | Path, *, max_pixels: int | None = None, progress: Callable[[int, int], None] | None = None
) -> JsonObject:
    """Audit a folder of images before training: every file is decoded and hashed.

    Args:
        path: The folder, with or without ``folder:`` before it; ``~`` is expanded.
        max_pixels: Above it an image is refused; that of `train` by default.
        progress: Told how many files are done, and of how many.

    Returns:
        See `audit_folder`.

    Raises:
        DataError: It is no folder.
    """
    try:
        root = Path(str(path).removeprefix(_PREFIX)).expanduser()
    except RuntimeError as error:
        raise DataError("cannot find the home folder", where=path) from error
    return audit_folder(root, max_pixels=max_pixels or DataConfig().max_pixels, listener=progress)
