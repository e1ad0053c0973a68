"""Scanning a folder of class folders: which files belong to which split and class, without opening any of them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bayesnet.data.dataset import SPLITS
from bayesnet.data.finding import is_image_name, list_folder, stat_file
from bayesnet.errors import DataError

# Folder names, in lower case, that mean a split.
SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "calibration": "calibration",
    "test": "test",
}


class SourceFile(NamedTuple):
    """A file of the data set.

    Attributes:
        path: Where it is.
        size: Bytes.
    """

    path: Path
    size: int


class Scan(NamedTuple):
    """What a folder holds.

    Attributes:
        classes: Names of the training classes in natural order.
        files: Split, then class name, to files in order of path; ``train`` is always there.
        notes: What was passed over, plain sentences.
    """

    classes: tuple[str, ...]
    files: dict[str, dict[str, list[SourceFile]]]
    notes: tuple[str, ...]


def scan_folder(root: Path) -> Scan:
    """Return the splits, classes and files of a folder.

    Its sub-folders are splits if one of them is ``train`` and has sub-folders; otherwise they are classes.

    Raises:
        DataError: It is no folder or has no images, fewer than two classes, an empty class, a class that the training
            split has not, a link out of the folder, or one file in two classes or splits.
    """
    if not stat.S_ISDIR(stat_file(root).st_mode):
        raise DataError("not a folder", where=root, hint="give a folder with one sub-folder of images per class")
    walker = _Walker(root)
    files: dict[str, dict[str, list[SourceFile]]] = {}
    for split, folder in _split_folders(root, walker).items():
        files[split] = {path.name: walker.images(path, (split, path.name)) for path in walker.folders(folder)}
    classes = tuple(sorted(files["train"], key=natural_key))
    if len(classes) < 2:
        hint = "make one sub-folder of images per class"
        raise DataError(
            f"found {len(classes)} class folder{'s' * (len(classes) != 1)}, need at least 2", where=root, hint=hint
        )
    for split in files:
        _check_class_names(root, split, tuple(files[split]), classes)
    return Scan(classes, files, walker.notes())


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that puts '2' before '10'.

    Example:
        >>> sorted(["10", "2", "b1", "a"], key=natural_key)
        ['2', '10', 'a', 'b1']
    """
    # The split alternates text and digits, so text is never compared with a number.
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


class _Walker:
    """Lists folders and images below one root, and remembers each file so that none is taken twice."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self._seen: dict[tuple[int, int], tuple[tuple[str, str], Path]] = {}
        self._passed_over: dict[str, dict[Path, None]] = {}  # ordered sets: a folder can be listed twice

    def folders(self, parent: Path) -> list[Path]:
        """Return the sub-folders in natural order; what else lies there is noted."""
        found: list[Path] = []
        for entry in sorted(list_folder(parent), key=lambda entry: natural_key(entry.name)):
            path = parent / entry.name
            if self._is_folder(entry):
                found.append(path)
            else:
                self.pass_over("files beside the folders", path)
        return found

    def images(self, folder: Path, group: tuple[str, str]) -> list[SourceFile]:
        """Return the images below the folder of one (split, class), by path.

        Folders that are links are not entered: their images are found where they are, and no loop can arise.
        """
        found: list[SourceFile] = []
        pending = [folder]
        while pending:
            current = pending.pop()
            deeper: list[Path] = []
            for entry in list_folder(current):
                path = current / entry.name
                if self._is_folder(entry):
                    if entry.is_symlink():
                        self.pass_over("links to folders", path)
                    else:
                        deeper.append(path)
                elif not is_image_name(entry.name):
                    self.pass_over("files that are not images", path)
                else:
                    status = stat_file(path)
                    if self._is_new(path, status, group):
                        found.append(SourceFile(path, status.st_size))
            pending += reversed(deeper)
        if not found:
            raise DataError("class folder has no image", where=folder, hint="remove it or put images into it")
        return found

    def pass_over(self, kind: str, path: Path) -> None:
        """Remember what is not used, for the notes."""
        self._passed_over.setdefault(kind, {})[path] = None

    def notes(self) -> tuple[str, ...]:
        """Return one sentence per kind of thing that was passed over."""
        return tuple(
            f"Passed over {kind}: {len(paths)}, the first is {next(iter(paths)).relative_to(self.root)}."
            for kind, paths in self._passed_over.items()
        )

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        """Return whether an entry is a folder; refuse a link that leaves the root."""
        if entry.is_symlink():
            path = Path(entry.path)
            real = os.path.realpath(path)
            if os.path.commonpath([real, self._real_root]) != self._real_root:
                raise DataError("link leads out of the data folder", where=path, hint="copy the files into it instead")
            stat_file(path)  # says so where a link leads nowhere
        return entry.is_dir()

    def _is_new(self, path: Path, status: os.stat_result, group: tuple[str, str]) -> bool:
        """Return whether a file is seen for the first time; refuse one that is in two classes or splits by links."""
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file", where=path, hint="remove it from the data folder")
        key = (status.st_dev, status.st_ino)
        first_group, first_path = self._seen.setdefault(key, (group, path))
        if first_group != group:
            raise DataError(f"the same file as {first_path}", where=path, hint="keep it in one class and one split")
        if first_path != path:
            self.pass_over("links to a file of the same class", path)
        return first_path == path


def _split_folders(root: Path, walker: _Walker) -> dict[str, Path]:
    """Return the folder of each split; ``train`` is the root itself where there are only class folders."""
    folders = walker.folders(root)
    named = [path for path in folders if path.name.lower() in SPLIT_NAMES]
    train = next((path for path in named if path.name.lower() == "train"), None)
    if train is None or not walker.folders(train):
        nested = [path.name for path in named if walker.folders(path)]
        if nested:
            raise DataError("there are splits but no train folder", where=root, hint=f"found {', '.join(nested)}")
        return {"train": root}
    found: dict[str, Path] = {}
    for path in folders:
        split = SPLIT_NAMES.get(path.name.lower())
        if split is None:
            walker.pass_over("folders beside the splits", path)
        elif split in found:
            raise DataError(f"two folders for the {split} split", where=path, hint=f"the other is {found[split].name}")
        else:
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def _check_class_names(root: Path, split: str, names: Sequence[str], classes: Sequence[str]) -> None:
    """Raise DataError if a split has a class that train has not: labels go by name, never by position."""
    extra = sorted(set(names) - set(classes), key=natural_key)
    missing = sorted(set(classes) - set(names), key=natural_key)
    if not names:
        raise DataError(f"the {split} folder has no class folder", where=root, hint="fill it or remove it")
    if extra:
        difference = ", ".join([*(f"+{name}" for name in extra), *(f"-{name}" for name in missing)])
        raise DataError(f"{split} has other classes than train", where=root, hint=difference)
