"""What is in a folder of images before anything is trained on it: each file decoded once, each file hashed."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bayesnet.data.ahead import map_ahead
from bayesnet.data.assembly import carve
from bayesnet.data.dataset import DataConfig
from bayesnet.data.finding import reason_of
from bayesnet.data.images import ImageFacts, inspect_image
from bayesnet.data.scan import Scan, scan_folder
from bayesnet.errors import DataError
from bayesnet.types import JsonObject

# Upper ends of the histogram of short sides, pixels; the last bin has none.
SIDES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_AHEAD = 256

Listener = Callable[[int, int], None]
"""Called with the number of files done and the number of all."""


class _Found(NamedTuple):
    """A file of the data set, what it is or why it cannot be read, and the SHA-256 of its bytes."""

    split: str
    class_name: str
    path: Path
    facts: ImageFacts | None
    reason: str
    digest: str


def audit_folder(root: Path, *, max_pixels: int, listener: Listener | None = None) -> JsonObject:
    """Return what a folder of class folders, with or without split folders, holds and what is wrong with it.

    Args:
        root: The folder.
        max_pixels: Above it an image is not decoded.
        listener: Told how many files are done.

    Returns:
        ``path``; ``ok``, whether training would take it and no image is in two splits or two classes; ``problems``, one
        sentence each; ``notes``, what was passed over; ``num_images``; ``splits`` with the count of each class;
        ``unreadable`` with ``path`` and ``reason``; ``duplicates`` of equal bytes, each a list of paths, under
        ``within_class``, ``across_classes`` and ``across_splits`` (in both it is under ``across_classes``);
        ``formats``, ``modes``, ``num_animated``, ``num_rotated`` (by EXIF); ``sizes`` with ``height`` and ``width``
        (``min``, ``median``, ``max``; None without an image) and ``short_side``, bins of ``low``, ``high``, ``count``.

    Raises:
        DataError: It is no folder.
    """
    problems: list[DataError] = []
    scan = scan_folder(root, problems)
    files = [
        (split, name, file.path)
        for split, by_class in scan.files.items()
        for name, members in by_class.items()
        for file in members
    ]
    found = list(_inspected(files, max_pixels, listener))
    readable = [each for each in found if each.facts is not None]
    facts = [each.facts for each in found if each.facts is not None]
    duplicates = _duplicates(readable)
    unreadable = [{"path": str(each.path), "reason": each.reason} for each in found if each.facts is None]
    texts = [str(problem) for problem in problems or _too_few(scan)]
    if unreadable:
        texts.append(f"{len(unreadable)} of {len(found)} images cannot be read")
    for kind, words in (("across_splits", "splits"), ("across_classes", "classes")):
        if duplicates[kind]:
            texts.append(f"{len(duplicates[kind])} images are in two {words}, byte for byte")
    return {
        "path": str(root),
        "ok": not texts,
        "problems": texts,
        "notes": list(scan.notes),
        "num_images": len(found),
        "splits": {split: {name: len(by_class[name]) for name in by_class} for split, by_class in scan.files.items()},
        "unreadable": unreadable,
        "duplicates": duplicates,
        "formats": dict(Counter(each.format for each in facts).most_common()),
        "modes": dict(Counter(each.mode for each in facts).most_common()),
        "num_animated": sum(each.num_frames > 1 for each in facts),
        "num_rotated": sum(each.orientation != 1 for each in facts),
        "sizes": _sizes(facts),
    }


def _too_few(scan: Scan) -> list[DataError]:
    """Return what stops `train` from carving the splits that have no folder, by its default shares."""
    label_of = {name: label for label, name in enumerate(scan.classes)}
    labels = [label_of[name] for name, members in scan.files["train"].items() for _ in members]
    try:
        carve(torch.tensor(labels, dtype=torch.int64), scan.files, scan.classes, DataConfig())
    except DataError as error:
        return [error]
    return []


def _inspected(files: Sequence[tuple[str, str, Path]], max_pixels: int, listener: Listener | None) -> Iterator[_Found]:
    """Yield what each file is, in order, read by a few threads."""

    def inspect(file: tuple[str, str, Path]) -> _Found:
        split, name, path = file
        try:
            facts = inspect_image(path, max_pixels=max_pixels)
            return _Found(split, name, path, facts, "", _digest(path))
        except DataError as error:
            return _Found(split, name, path, None, str(error), "")

    for number, found in enumerate(map_ahead(inspect, files, ahead=_AHEAD), start=1):
        if listener is not None and number % 100 == 0:
            listener(number, len(files))
        yield found


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("cannot read the image", where=path, hint=reason_of(error)) from error


def _duplicates(found: Iterable[_Found]) -> dict[str, list[list[str]]]:
    """Return groups of files with equal bytes by what they are a danger to."""
    groups: dict[str, list[_Found]] = {}
    for each in found:
        groups.setdefault(each.digest, []).append(each)
    kinds: dict[str, list[list[str]]] = {"within_class": [], "across_classes": [], "across_splits": []}
    for group in groups.values():
        if len(group) == 1:
            continue
        if len({each.class_name for each in group}) > 1:
            kind = "across_classes"
        elif len({each.split for each in group}) > 1:
            kind = "across_splits"
        else:
            kind = "within_class"
        kinds[kind].append([str(each.path) for each in group])
    return kinds


def _sizes(facts: Sequence[ImageFacts]) -> JsonObject:
    """Return the extremes and the median of both sides, and a histogram of the shorter one."""
    heights, widths = [each.height for each in facts], [each.width for each in facts]
    shorts = map(min, heights, widths)
    counts = Counter(next((side for side in SIDES if short <= side), 0) for short in shorts)
    edges = zip((0, *SIDES), (*SIDES, 0), strict=True)
    histogram = [{"low": low + 1, "high": high or None, "count": counts[high]} for low, high in edges if counts[high]]
    return {"height": _spread(heights), "width": _spread(widths), "short_side": histogram}


def _spread(values: Sequence[int]) -> JsonObject | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
