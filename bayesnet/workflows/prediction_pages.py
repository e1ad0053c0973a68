"""Predictions to look at: a grid of images with bars and intervals, and a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayesnet import storage
from bayesnet.config import require
from bayesnet.data.images import png_file, read_image
from bayesnet.errors import DataError
from bayesnet.types import JsonObject
from bayesnet.workflows.predicting import ImageClassifier


def check_new(out: Path, suffix: str) -> None:
    """Raise ConfigError unless a file to write ends as it should, does not exist, and has a folder to be in.

    Args:
        out: The file.
        suffix: ".png" or ".html".
    """
    require(out.suffix.lower() == suffix, f"must end in {suffix}", where=str(out))
    require(not os.path.lexists(out), "the file exists", where=str(out), hint="choose another name")
    require(out.absolute().parent.is_dir(), "its folder does not exist", where=str(out), hint="make it first")


def write_grid(record: JsonObject, classifier: ImageClassifier, out: Path) -> int:
    """Write a PNG of the first images of a record of `predict_images`, with bars and intervals.

    Args:
        record: With every class of each image, or the most probable five.
        classifier: The model, whose preprocessing the images are read with: they are shown as it saw them.
        out: The file.

    Returns:
        How many images it shows, at most `plots.predictions.MAX_IMAGES`.

    Raises:
        DataError: No image can be read any more.
        StorageError: The file system refused.
    """
    from bayesnet.plots.predictions import MAX_IMAGES, prediction_grid  # matplotlib takes half a second to import

    pixels = _pixels(record["predictions"][:MAX_IMAGES], classifier)
    if not pixels:
        raise DataError("no image to draw can be read any more", where=out)
    rows = [record["predictions"][index] for index in pixels]
    storage.write_bytes(
        out, prediction_grid(torch.stack([*pixels.values()]).numpy(), rows, record["interval"]["level"])
    )
    return len(pixels)


def write_page(record: JsonObject, classifier: ImageClassifier, out: Path) -> int:
    """Write an HTML page of the first images of a record of `predict_images`, complete in itself.

    Args:
        record: As for `write_grid`.
        classifier: As for `write_grid`.
        out: The file.

    Returns:
        How many images it has a row of, at most `report.predictions.MAX_IMAGES`.

    Raises:
        StorageError: The file system refused.
    """
    from bayesnet.report.predictions import MAX_IMAGES, predictions_page

    rows = record["predictions"][:MAX_IMAGES]
    pictures = {index: png_file(image_CHW) for index, image_CHW in _pixels(rows, classifier).items()}
    storage.write_bytes(out, predictions_page(record, pictures).encode("utf-8"))
    return len(rows)


def _pixels(rows: Sequence[JsonObject], classifier: ImageClassifier) -> dict[int, Tensor]:
    """Return the images of the rows as the model saw them, by place; a file that is gone again has none."""
    found: dict[int, Tensor] = {}
    for index, row in enumerate(rows):
        try:
            found[index] = read_image(Path(row["path"]), classifier.preprocessing)
        except DataError:
            continue
    return found
