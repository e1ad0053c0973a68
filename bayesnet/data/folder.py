"""Folder: one sub-folder of images per class, with or without folders for the splits.

``PATH/CLASS/...`` or ``PATH/{train,val,calibration,test}/CLASS/...``; what is missing is carved from train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bayesnet.data.assembly import carve
from bayesnet.data.dataset import IMAGENET_RESIZE, IMAGENET_SIDE, SPLITS, DataConfig, DataSource, ImageData
from bayesnet.data.examples import FileExamples
from bayesnet.data.images import image_size
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.scan import Scan, SourceFile, scan_folder
from bayesnet.data.statistics import channel_statistics
from bayesnet.errors import ConfigError, DataError, printable

SIZE_SAMPLE = 200
MIN_SIDE, MAX_SIDE, SIDE_STEP = 8, 224, 8

Labelled = tuple[SourceFile, int]
"""A file and its label."""


def load_folder(config: DataConfig, argument: str, preprocessing: Preprocessing | None) -> ImageData:
    """Return the images of a folder in four splits.

    Args:
        config: The section ``data``.
        argument: The folder; ``~`` is expanded.
        preprocessing: That of a run, or None to take what the section gives, or the preset, or else to choose the size
            and measure the statistics on the training split.

    Raises:
        ConfigError: The home folder of a user is unknown.
        DataError: The folder cannot be used; see `scan_folder`. Or an image of the training split cannot be read.
    """
    try:
        root = Path(argument).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError("cannot find the home folder", where=argument) from error
    try:
        str(root).encode()
    except UnicodeEncodeError as error:  # the path goes into the run's config.toml, which is UTF-8
        raise DataError("the folder's path is not UTF-8", where=root, hint="rename it") from error
    scan = scan_folder(root)
    files, carve_notes = _four_splits(scan, config, root)
    notes = [*scan.notes, *carve_notes]
    if preprocessing is None:
        blank, size_note = _blank(config, files["train"])
        notes.append(size_note)
        # Reading needs no statistics, so the examples that measure them go on with the pixels they decoded.
        examples = _examples(files, blank, config.cache_megabytes * 10**6)
        preprocessing = blank
        if config.statistics is None:
            mean, std = channel_statistics(examples["train"])
            preprocessing = dataclasses.replace(blank, mean=mean, std=std)
    else:
        examples = _examples(files, preprocessing, config.cache_megabytes * 10**6)
    return ImageData(
        name="folder",
        spec=f"folder:{root}",
        classes=scan.classes,
        preprocessing=preprocessing,
        train=examples["train"],
        validation=examples["validation"],
        calibration=examples["calibration"],
        test=examples["test"],
        notes=tuple(map(printable, notes)),
        fingerprint=_fingerprint(files, scan.classes, root),
    )


def _four_splits(scan: Scan, config: DataConfig, root: Path) -> tuple[dict[str, list[Labelled]], list[str]]:
    """Return the labelled files of all four splits, those without a folder carved from train; and what was done."""
    label_of = {name: label for label, name in enumerate(scan.classes)}
    found: dict[str, list[Labelled]] = {
        split: [
            (file, label_of[name]) for name in sorted(by_class, key=label_of.__getitem__) for file in by_class[name]
        ]
        for split, by_class in scan.files.items()
    }
    notes = [_absent(split, by_class, scan.classes) for split, by_class in scan.files.items()]
    whole = found["train"]
    labels_N = torch.tensor([label for _, label in whole], dtype=torch.int64)
    parts = carve(labels_N, found, scan.classes, config)
    if parts:
        found |= {split: [whole[index] for index in part_N.tolist()] for split, part_N in parts.items()}
        counts = ", ".join(f"{len(found[split])} {split}" for split in parts)
        _, *others, last = parts
        missing = " and ".join(filter(None, [", ".join(others), last]))
        notes.append(
            f"There is no folder for {missing}: carved from the training images by class "
            f"and seed {config.seed} ({counts})."
        )
    return found, [note for note in notes if note]


def _examples(
    files: Mapping[str, Sequence[Labelled]], preprocessing: Preprocessing, cache_bytes: int
) -> dict[str, FileExamples]:
    """Return the examples of each split; the cache goes to the first splits that fit, train before all."""
    examples: dict[str, FileExamples] = {}
    for split in SPLITS:
        paths = [file.path for file, _ in files[split]]
        labels_N = torch.tensor([label for _, label in files[split]], dtype=torch.int64)
        examples[split] = FileExamples(paths, labels_N, preprocessing, cache_bytes)
        cache_bytes -= examples[split].pixel_bytes if examples[split].cached else 0
    return examples


def _absent(split: str, by_class: Mapping[str, Sequence[SourceFile]], classes: Sequence[str]) -> str:
    """Return a sentence on the classes that a split folder lacks, or nothing."""
    absent = [name for name in classes if name not in by_class]
    return f"The {split} folder has no image of {', '.join(absent)}." if absent else ""


def _blank(config: DataConfig, train: Sequence[Labelled]) -> tuple[Preprocessing, str]:
    """Return the preprocessing, without statistics unless they are given, and a sentence on its size."""
    channels = config.channels or 3
    mean, std = config.statistics or ((0.0,) * channels, (1.0,) * channels)
    imagenet = config.preset == "imagenet"
    resize = config.resize or (IMAGENET_RESIZE if imagenet else 0)
    height = width = config.image_size or (IMAGENET_SIDE if imagenet else 0)
    if resize:
        source = "data.preset" if imagenet and not config.resize else "data.resize"
        note = f"Images are scaled to a short side of {resize} and cropped to {height} x {width} pixels"
    elif height:
        source, note = "data.image_size", f"Images are scaled to {height} x {width} pixels"
    else:
        height, width, note = _automatic_size(train, config.max_pixels)
        return Preprocessing(len(mean), height, width, mean, std, config.max_pixels), note
    if config.mean:
        note += ", with statistics that were given"
    elif imagenet:
        note += ", with the statistics of ImageNet"
    return Preprocessing(len(mean), height, width, mean, std, config.max_pixels, resize=resize), f"{note} ({source})."


def _automatic_size(train: Sequence[Labelled], max_pixels: int) -> tuple[int, int, str]:
    """Return height, width and a sentence: the common size, else the median short side, rounded down."""
    num = min(SIZE_SAMPLE, len(train))
    sample = [train[index * len(train) // num][0].path for index in range(num)]
    sizes = [image_size(path, max_pixels=max_pixels) for path in sample]
    height, width = sizes[0]
    if len(set(sizes)) == 1 and min(sizes[0]) >= MIN_SIDE and max(sizes[0]) <= MAX_SIDE:
        return height, width, f"Images are {height} x {width} pixels and are used as they are."
    median = int(statistics.median(min(size) for size in sizes))
    side = max(MIN_SIDE, min(MAX_SIDE, median)) // SIDE_STEP * SIDE_STEP
    reason = f"the median short side of {num} training images is {median}"
    return side, side, f"Images are scaled to {side} x {side} pixels: {reason}; data.image_size sets another size."


def _fingerprint(files: Mapping[str, Sequence[Labelled]], classes: Sequence[str], root: Path) -> str:
    """Return the SHA-256 over split, class, relative path and size of every file."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for file, label in files[split]:
            relative = os.fsencode(file.path.relative_to(root).as_posix())
            fields = [split.encode(), os.fsencode(classes[label]), relative, str(file.size).encode()]
            digest.update(b"\0".join(fields) + b"\n\0")
    return digest.hexdigest()


FOLDER = DataSource(load_folder, takes_path=True, description="folder:PATH, one sub-folder of images per class")
