"""Finding image files: those that are named, below a folder, matched by a pattern or listed on a stream.

Nothing is opened here. Folders are walked in the order of their names, so that a listing is the same every time.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from bayesnet.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_MAX_NAME_BYTES = 2**20
_READ_BYTES = 2**16


def is_image_name(name: str) -> bool:
    """Return whether a file name ends like an image and is not hidden.

    Example:
        >>> is_image_name("a.JPG"), is_image_name(".a.jpg"), is_image_name("notes.txt")
        (True, False, False)
    """
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - a name


def find_images(sources: Iterable[Path | str]) -> Iterator[Path]:
    """Return an iterator of the images named, below folders and matched by patterns, in the order given.

    Folders are walked by name, without hidden files, other suffixes and folders seen before (so a loop of links ends).
    A file that is named is taken whatever its suffix. A text with ``*``, ``?`` or ``[`` that names nothing is a
    pattern, in which ``**`` stands for any folders; of what it matches, images and folders are taken.

    Args:
        sources: Files, folders and patterns. They are looked at before the first image is given.

    Raises:
        DataError: One does not exist or cannot be read; while iterating: a folder has no image, a pattern no match.
    """
    given = list(map(Path, sources))
    for path in given:
        if not _is_pattern(path):
            stat_file(path)
    return (image for path in given for image in _from_source(path))


def image_paths(sources: Iterable[Path | str]) -> list[Path]:
    """Return all that `find_images` finds.

    Raises:
        DataError: See `find_images`.
    """
    return list(find_images(sources))


def listed_images(stream: BinaryIO, *, separator: bytes = b"\n") -> Iterator[Path]:
    r"""Yield the files that a stream lists, as they come.

    Args:
        stream: One file name per line, as the file system has it; empty lines are passed over.
        separator: What ends a name; a null character is the one that no name holds.

    Raises:
        DataError: A name is longer than 1 MiB: it is no list of files.

    Example:
        >>> import io
        >>> [path.name for path in listed_images(io.BytesIO(b"a.png\r\n\nb.png"))]
        ['a.png', 'b.png']
    """
    read = getattr(stream, "read1", stream.read)
    rest = b""
    while data := read(_READ_BYTES):
        *names, rest = (rest + data).split(separator)
        if len(rest) > _MAX_NAME_BYTES:
            raise DataError("not a list of image files", hint="expected one name per line")
        yield from _named(names, separator)
    yield from _named([rest], separator)


def stat_file(path: Path) -> os.stat_result:
    """Return the status of a path, following links.

    Raises:
        DataError: It does not exist or cannot be reached.
    """
    try:
        return path.stat()
    except FileNotFoundError as error:
        what = "link leads nowhere" if path.is_symlink() else "file or folder does not exist"
        raise DataError(what, where=path) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise DataError("cannot read", where=path, hint=reason_of(error)) from error


def list_folder(path: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name, without hidden ones.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError("cannot read the folder", where=path, hint=reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return why, on one line, without the path that the message names anyway."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _is_pattern(path: Path) -> bool:
    """Return whether a text stands for what it matches: a file of that very name comes first."""
    return glob.has_magic(str(path)) and not os.path.lexists(path)


def _from_source(path: Path) -> Iterator[Path]:
    """Yield the images that one file, folder or pattern stands for, at least one.

    Raises:
        DataError: There is none.
    """
    if _is_pattern(path):
        what, images = "no image matches", _matches(path)
    elif stat.S_ISDIR(stat_file(path).st_mode):
        what, images = "folder has no image", _below(path, set())
    else:
        yield path
        return
    found = False
    for image in images:
        found = True
        yield image
    if not found:
        raise DataError(what, where=path, hint=f"images are files that end in {' '.join(sorted(IMAGE_SUFFIXES))}")


def _matches(pattern: Path) -> Iterator[Path]:
    """Yield the images that a pattern matches, and those below the folders that it matches, each once."""
    walked: set[Path] = set()
    for name in sorted(glob.iglob(str(pattern), recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute pattern
        match = Path(name)
        if not walked.isdisjoint(match.parents):  # `**` matches a folder and what is below it
            continue
        if match.is_dir():
            walked.add(match)
            yield from _below(match, set())
        elif is_image_name(match.name):
            yield match


def _named(names: Iterable[bytes], separator: bytes) -> Iterator[Path]:
    """Yield the paths of names that are not empty; a line may end in a carriage return too."""
    for name in names:
        bare = name.removesuffix(b"\r") if separator == b"\n" else name
        if bare:
            yield Path(os.fsdecode(bare))


def _below(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the images below a folder, depth first by name, each folder once."""
    status = stat_file(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for name, is_folder in [(entry.name, entry.is_dir()) for entry in list_folder(folder)]:
        if is_folder:
            yield from _below(folder / name, visited)
        elif is_image_name(name):
            yield folder / name
