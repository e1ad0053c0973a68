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


def scan_folder(root: Path, problems: list[DataError] | None = None) -> Scan:
    """Return the splits, classes and files of a folder.

    Its sub-folders are splits if one of them is ``train`` and has sub-folders; otherwise they are classes.

    Args:
        root: The folder.
        problems: Where it is given, what would be raised is added to it, and the scan goes on without what is wrong;
            but for a root that is no folder.

    Raises:
        DataError: It is no folder or has no images, fewer than two classes, an empty class, a class that the training
            split has not, a link out of the folder, or one file in two classes or splits.
    """
    if not stat.S_ISDIR(stat_file(root).st_mode):
        raise DataError("not a folder", where=root, hint="give a folder with one sub-folder of images per class")
    walker = _Walker(root, problems)
    files: dict[str, dict[str, list[SourceFile]]] = {}
    for split, folder in _split_folders(root, walker).items():
        files[split] = {path.name: walker.images(path, (split, path.name)) for path in walker.folders(folder)}
    classes = tuple(sorted(files["train"], key=natural_key))
    if len(classes) < 2:
        hint = "make one sub-folder of images per class"
        what = f"found {len(classes)} class folder{'s' * (len(classes) != 1)}, need at least 2"
        walker.refuse(DataError(what, where=root, hint=hint))
    for split in files:
        error = _other_classes(root, split, tuple(files[split]), classes)
        if error is not None:
            walker.refuse(error)
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

    def __init__(self, root: Path, problems: list[DataError] | None = None) -> None:
        self.root = root
        self._problems = problems
        self._real_root = os.path.realpath(root)
        self._seen: dict[tuple[int, int], tuple[tuple[str, str], Path]] = {}
        self._passed_over: dict[str, dict[Path, None]] = {}  # ordered sets: a folder can be listed twice

    def refuse(self, error: DataError) -> None:
        """Raise the error, or add it to the problems where they are collected."""
        if self._problems is None:
            raise error
        if all(str(error) != str(known) for known in self._problems):  # a folder can be listed twice
            self._problems.append(error)

    def folders(self, parent: Path) -> list[Path]:
        """Return the sub-folders in natural order; what else lies there is noted."""
        found: list[Path] = []
        for entry in sorted(self._entries(parent), key=lambda entry: natural_key(entry.name)):
            path = parent / entry.name
            is_folder = self._is_folder(entry)
            if is_folder:
                found.append(path)
            elif is_folder is not None:
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
            for entry in self._entries(current):
                path = current / entry.name
                is_folder = self._is_folder(entry)
                if is_folder is None:
                    continue
                if is_folder:
                    if entry.is_symlink():
                        self.pass_over("links to folders", path)
                    else:
                        deeper.append(path)
                elif not is_image_name(entry.name):
                    self.pass_over("files that are not images", path)
                else:
                    size = self._size_of_new(path, group)
                    if size is not None:
                        found.append(SourceFile(path, size))
            pending += reversed(deeper)
        if not found:
            self.refuse(DataError("class folder has no image", where=folder, hint="remove it or put images into it"))
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

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder, none where it cannot be read and that is collected."""
        try:
            return list_folder(folder)
        except DataError as error:
            self.refuse(error)
            return []

    def _is_folder(self, entry: os.DirEntry[str]) -> bool | None:
        """Return whether an entry is a folder; refuse a link that leaves the root or leads nowhere, which is None."""
        if entry.is_symlink():
            path = Path(entry.path)
            real = os.path.realpath(path)
            if os.path.commonpath([real, self._real_root]) != self._real_root:
                hint = "copy the files into it instead"
                self.refuse(DataError("link leads out of the data folder", where=path, hint=hint))
                return None
            try:
                stat_file(path)
            except DataError as error:
                self.refuse(error)
                return None
        return entry.is_dir()

    def _size_of_new(self, path: Path, group: tuple[str, str]) -> int | None:
        """Return the bytes of a file that is seen for the first time, else None.

        Refuse one that is no regular file, or is in two classes or splits by links.
        """
        try:
            status = stat_file(path)
        except DataError as error:
            self.refuse(error)
            return None
        if not stat.S_ISREG(status.st_mode):
            self.refuse(DataError("not a regular file", where=path, hint="remove it from the data folder"))
            return None
        first_group, first_path = self._seen.setdefault((status.st_dev, status.st_ino), (group, path))
        if first_path == path:
            return status.st_size
        if first_group != group:
            hint = "keep it in one class and one split"
            self.refuse(DataError(f"the same file as {first_path}", where=path, hint=hint))
        else:
            self.pass_over("links to a file of the same class", path)
        return None


def _split_folders(root: Path, walker: _Walker) -> dict[str, Path]:
    """Return the folder of each split; ``train`` is the root itself where there are only class folders."""
    folders = walker.folders(root)
    named = [path for path in folders if path.name.lower() in SPLIT_NAMES]
    train = next((path for path in named if path.name.lower() == "train"), None)
    if train is None or not walker.folders(train):
        nested = [path.name for path in named if walker.folders(path)]
        if nested:
            hint = f"found {', '.join(nested)}"
            walker.refuse(DataError("there are splits but no train folder", where=root, hint=hint))
        return {"train": root}
    found: dict[str, Path] = {}
    for path in folders:
        split = SPLIT_NAMES.get(path.name.lower())
        if split is None:
            walker.pass_over("folders beside the splits", path)
        elif split in found:
            hint = f"the other is {found[split].name}"
            walker.refuse(DataError(f"two folders for the {split} split", where=path, hint=hint))
        else:
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def _other_classes(root: Path, split: str, names: Sequence[str], classes: Sequence[str]) -> DataError | None:
    """Return what is wrong where a split has a class that train has not: labels go by name, never by position."""
    extra = sorted(set(names) - set(classes), key=natural_key)
    missing = sorted(set(classes) - set(names), key=natural_key)
    if not names:
        return DataError(f"the {split} folder has no class folder", where=root, hint="fill it or remove it")
    if extra:
        difference = ", ".join([*(f"+{name}" for name in extra), *(f"-{name}" for name in missing)])
        return DataError(f"{split} has other classes than train", where=root, hint=difference)
    return None
