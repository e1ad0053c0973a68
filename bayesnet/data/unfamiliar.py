"""Unfamiliar images: of no class that the model knows, read as its own are, to see whether it notices.

They get the size and channels of the training images, and are normalised like those: statistics of their own would make
them look familiar, and no model has them when it meets an image.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet.config import require
from bayesnet.data import DATASETS
from bayesnet.data.dataset import DataConfig, ImageData
from bayesnet.data.examples import ArrayExamples, Examples, FileExamples
from bayesnet.data.finding import image_paths, stat_file
from bayesnet.data.images import scaled_pixels
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.splits import random_choice
from bayesnet.errors import DataError, printable
from bayesnet.registry import unknown_name

PHOTOGRAPHS = "photographs"
CORRUPTED = "corrupted"
NO_CLASS = -1
"""The label of unfamiliar images, which no metric of known classes accepts."""

_CACHE_BYTES = 512 * 10**6
_FOLDER = "folder:"


class UnfamiliarSet(NamedTuple):
    """Images of no known class.

    Attributes:
        name: Short name for tables: that of the data set, or of the folder.
        description: What they are, one clause.
        examples: uint8 pixels of the training images' channels and size; every label is NO_CLASS.
        dependent: Why they say less than as many images of their own would, in a clause: then no interval can be given.
            None where they are images of their own.
    """

    name: str
    description: str
    examples: Examples
    dependent: str | None = None


def load_unfamiliar(
    spec: str, data: ImageData, preprocessing: Preprocessing, *, max_images: int = 1000, seed: int = 0
) -> UnfamiliarSet:
    """Return unfamiliar images, read with the preprocessing of the training data.

    Args:
        spec: "photographs" (crops of the two photographs that come with scikit-learn), a name of DATASETS (its test
            split), ``folder:PATH`` or a path: all images below a folder, with class folders or without.
        data: What the model was trained on.
        preprocessing: Of the model.
        max_images: How many to take at most, at random.
        seed: Of that choice, at least 0.

    Raises:
        ConfigError: The spec is neither a name nor a path, or a number is out of range.
        DataError: There are no images, they cannot be read, they are the training data, or the model was trained on
            floating-point pixels, whose scale no file has.
    """
    if why := why_not_comparable(data.train.read([0])):
        raise DataError(f"no images can be set beside the training data: {why}", where=spec, hint="give none")
    require(max_images >= 1, "must be at least 1", where=f"max_images = {max_images}")
    require(seed >= 0, "must not be negative", where=f"seed = {seed}")
    if spec == PHOTOGRAPHS:
        return _photographs(preprocessing, max_images, seed)
    if spec in DATASETS and not DATASETS[spec].takes_path:
        return _registered(spec, data, preprocessing, max_images, seed)
    folder = spec.removeprefix(_FOLDER)
    if not spec.startswith(_FOLDER) and not Path(folder).expanduser().exists():
        raise unknown_name("unfamiliar set", spec, [PHOTOGRAPHS, *DATASETS, "an existing folder"])
    return _folder(folder, data, preprocessing, max_images, seed)


def why_not_comparable(x_NCHW: Tensor) -> str | None:
    """Return why no images from elsewhere can be read as these are, in a clause, or None where they can."""
    if x_NCHW.dtype == torch.uint8:
        return None
    return f"their pixels are {str(x_NCHW.dtype).removeprefix('torch.')}, of no known scale"


def _registered(name: str, data: ImageData, preprocessing: Preprocessing, max_images: int, seed: int) -> UnfamiliarSet:
    """Return images of another data set's test split, scaled to the training images' size."""
    if name == data.name:  # before anything is downloaded
        raise _is_training_data(name)
    # Its own statistics, which loading measures, are not looked at: the examples are pixels.
    other = DATASETS[name].load(DataConfig(spec=name), "", None)
    if other.fingerprint == data.fingerprint:
        raise _is_training_data(name)
    chosen_M = random_choice(len(other.test), max_images, seed)
    images = [scaled_pixels(image_CHW, preprocessing) for image_CHW in other.test.read(chosen_M)]
    description = f"{len(images)} test images of {DATASETS[name].description}"
    return UnfamiliarSet(name, description, unfamiliar_examples(torch.stack(images), f"{name} image"))


def _folder(path: str, data: ImageData, preprocessing: Preprocessing, max_images: int, seed: int) -> UnfamiliarSet:
    """Return images from below a folder."""
    try:
        root = Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise DataError("cannot find the home folder", where=path) from error
    paths = image_paths([root])
    _check_is_no_training_folder(root, paths, data)
    chosen = [paths[index] for index in random_choice(len(paths), max_images, seed).tolist()]
    labels_M = torch.full((len(chosen),), NO_CLASS, dtype=torch.int64)
    examples = FileExamples(chosen, labels_M, preprocessing, _CACHE_BYTES)
    description = f"{len(chosen)} of {len(paths)} images below {root}"
    # Every set has a name of its own, also where a folder is called like another set.
    name = printable(root.name)
    taken = name in (PHOTOGRAPHS, CORRUPTED, *DATASETS) or not name
    return UnfamiliarSet(f"{_FOLDER}{name}" if taken else name, printable(description), examples)


def _check_is_no_training_folder(root: Path, paths: list[Path], data: ImageData) -> None:
    """Raise DataError where a folder shares files with the training data, or is a copy of it."""
    if not data.spec.startswith(_FOLDER):
        return
    own_root = Path(data.spec.removeprefix(_FOLDER))
    own = image_paths([own_root])
    shared = {path.resolve() for path in paths} & {path.resolve() for path in own}
    if shared or _listing(root, paths) == _listing(own_root, own):
        raise _is_training_data(root)


def _listing(root: Path, paths: list[Path]) -> list[tuple[Path, int]]:
    """Return what a copy has in common: where each file lies below the root, and its size."""
    return [(path.relative_to(root) if path != root else Path(path.name), stat_file(path).st_size) for path in paths]


def _photographs(preprocessing: Preprocessing, max_images: int, seed: int) -> UnfamiliarSet:
    """Return crops of a temple and of a flower: from the size of the input to the whole height, at random places."""
    images = _two_photographs()
    _, height, width = preprocessing.shape
    uniform_M3 = _uniform(max_images, 3, seed)
    crops: list[Tensor] = []
    for index, (scale, down, across) in enumerate(uniform_M3.tolist()):
        image_CHW = images[index % len(images)]
        rows, columns = image_CHW.shape[1:]
        # The largest crop of the input's shape is the photograph's height or width; the smallest is the input's size.
        largest = min(rows / height, columns / width)
        factor = math.exp(scale * math.log(max(largest, 1))) if largest > 1 else largest
        crop_rows, crop_columns = max(1, round(factor * height)), max(1, round(factor * width))
        top, left = int(down * (rows - crop_rows + 1)), int(across * (columns - crop_columns + 1))
        crop_CHW = image_CHW[:, top : top + crop_rows, left : left + crop_columns]
        crops.append(scaled_pixels(crop_CHW, preprocessing))
    description = f"{len(crops)} crops of scikit-learn's photographs of a temple and of a flower, at several scales"
    dependent = "crops of two photographs are not images of their own"
    return UnfamiliarSet(PHOTOGRAPHS, description, unfamiliar_examples(torch.stack(crops), "crop"), dependent)


def _two_photographs() -> list[Tensor]:
    """Return the photographs that come with scikit-learn, uint8 (3, 427, 640)."""
    from sklearn import datasets  # a second of imports that nobody else should wait for

    images = datasets.load_sample_images().images
    return [torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1) for image_HWC in images]


def unfamiliar_examples(images_NCHW: Tensor, prefix: str) -> ArrayExamples:
    """Return images of no class.

    Args:
        images_NCHW: uint8 pixels.
        prefix: What stands before their place in their names.
    """
    labels_N = torch.full((len(images_NCHW),), NO_CLASS, dtype=torch.int64)
    return ArrayExamples(images_NCHW, labels_N, prefix=prefix)


def _uniform(num: int, columns: int, seed: int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), shape (num, columns)."""
    raw = np.asarray(np.random.PCG64(seed).random_raw(num * columns)).reshape(num, columns)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _is_training_data(where: object) -> DataError:
    """Return (not raise) the error for a set that the model knows."""
    hint = "give images of other things, such as photographs"
    return DataError("the unfamiliar set is the training data", where=where, hint=hint)
