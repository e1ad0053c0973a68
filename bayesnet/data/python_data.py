"""Data from Python: arrays, tensors, torch data sets and loaders, as the same four splits that files give.

Layouts and labels are never guessed: what is not one of the forms below is refused by a line that says what to give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from bayesnet.config import require
from bayesnet.data.assembly import assemble
from bayesnet.data.dataset import DataConfig, ImageData
from bayesnet.data.examples import ArrayExamples, Examples
from bayesnet.data.labels import class_labels, encode_labels, index_labels, label_list
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.torch_dataset import (
    LONG_AXIS,
    PIXEL_VALUES,
    DatasetExamples,
    as_pixels,
    first_not_finite,
    own_random,
    read_item,
)
from bayesnet.errors import DataError

__all__ = ["class_labels", "encode_labels", "from_python", "loader_batch_size", "read_labels", "unlabelled"]

HASHED_ITEMS = 64
_CHUNK = 256


def from_python(
    train: object,
    y: object = None,
    *,
    validation: object = None,
    calibration: object = None,
    test: object = None,
    config: DataConfig,
    preprocessing: Preprocessing | None = None,
) -> ImageData:
    """Return data from Python in four splits; those that are not given are carved from ``train`` by class and seed.

    A split is a tuple (images, labels) of arrays or tensors; or a map-style Dataset of (image, label); or a tuple
    (Dataset, labels); or a DataLoader, whose data set is taken. Arrays are uint8 or floating point, (N, H, W) or
    (N, C, H, W), and are not copied unless their type changes. An item's image is a PIL image, an array (H, W) or
    (H, W, C), or a tensor (H, W) or (C, H, W). Labels are any hashables; those of a Dataset are its ``targets`` (where
    it has no ``target_transform``), or the second tensor of a TensorDataset, or else all items are read once.

    The fingerprint covers all of an array, and of a Dataset the labels and up to 64 evenly spaced items.

    Args:
        train: The training split, or its images alone where ``y`` is given.
        y: Labels (N,) of ``train``.
        validation: Another split, likewise.
        calibration: Another split.
        test: Another split.
        config: The section ``data``: fractions and seed of the splits; ``image_size`` and ``channels`` fit PIL images.
        preprocessing: That of a run, or None to measure the statistics on the training split.

    Raises:
        DataError: The data cannot be used; the message names the split and the first bad item.
        ConfigError: The section asks for another size or number of channels than arrays have.

    Example:
        >>> images = np.zeros((40, 8, 8), np.uint8)
        >>> data = from_python(images, ["cat", "dog"] * 20, config=DataConfig())
        >>> data.classes, len(data.train), data.preprocessing.shape
        (('cat', 'dog'), 24, (1, 8, 8))
    """
    given = {"train": train, "validation": validation, "calibration": calibration, "test": test}
    sources = {
        split: _open(source, y if split == "train" else None, split)
        for split, source in given.items()
        if source is not None
    }
    if "train" not in sources:
        raise DataError("there are no training data")
    classes = class_labels(sources["train"].labels)
    if len(classes) < 2:
        raise DataError(
            f"found {len(classes)} class{'es' * (len(classes) != 1)}, need at least 2", where="train labels"
        )
    examples: dict[str, Examples] = {}
    for split, source in sources.items():
        labels_N = index_labels(source.labels, classes, split)
        examples[split] = _examples(source, labels_N, split, config, preprocessing)
    _check_alike(examples, config, preprocessing)
    _check_kinds(classes)
    names = [str(label) for label in classes]
    missing = [split for split in given if split not in sources]
    note = f"There are no {', '.join(missing)} data: carved from the training data by class and seed {config.seed}."
    data = assemble(
        "python",
        examples,
        names,
        _digest(examples, names),
        config=config,
        preprocessing=preprocessing,
        notes=[note] if missing else [],
    )
    return data._replace(labels=classes)


def _check_kinds(classes: Sequence[Hashable]) -> None:
    """Raise DataError unless a run can keep the labels: they have to come back from it as they were."""
    odd = [label for label in classes if not isinstance(label, str | bool | int | float) or "\0" in str(label)]
    if odd:
        hint = "give texts, whole or real numbers, or booleans"
        raise DataError("the labels are of a kind that a run cannot keep", where=repr(odd[0]), hint=hint)


def loader_batch_size(source: object) -> int | None:
    """Return the batch size of a DataLoader; None for anything else."""
    return source.batch_size if isinstance(source, DataLoader) else None


def read_labels(source: object, y: object = None, *, split: str = "train") -> list[Hashable]:
    """Return the labels of a split, as `from_python` finds them: Python objects, in order.

    Args:
        source: A split.
        y: Its labels, where they are given apart.
        split: What to call it in messages.

    Raises:
        DataError: The labels cannot be used.
    """
    return _open(source, y, split).labels


def unlabelled(source: object, preprocessing: Preprocessing, *, name: str = "X") -> Examples:
    """Return images without labels, for prediction; their ``labels_N`` are all 0.

    Args:
        source: Images as for `from_python`, or a Dataset or DataLoader, whose labels, if it has any, are not looked at.
        preprocessing: That of the model.
        name: What to call them in messages.

    Raises:
        DataError: The images cannot be used, or do not fit the model.
    """
    array = _array(source)
    images = _map_style(source, name) if array is None else array
    _check_length(len(images), len(images), name)
    if array is not None:
        images = _image_array(array, name)
    labels_N = torch.zeros(len(images), dtype=torch.int64)
    examples = _examples(_Source(images, [], apart=True), labels_N, name, DataConfig(), preprocessing)
    _check_fits(examples, preprocessing)
    return examples


class _Source(NamedTuple):
    """A split as it was given: pixels (N, C, H, W) or a data set, its labels, and whether they came apart."""

    images: Any
    labels: list[Hashable]
    apart: bool


def _open(source: object, y: object, split: str) -> _Source:
    """Return a split with its labels."""
    if isinstance(source, tuple) and len(source) == 2:
        if y is not None:
            raise DataError("labels are given twice", where=split, hint="give (images, labels) or y")
        source, y = source
    images = _array(source)
    if images is not None:
        if y is None:
            raise DataError("images without labels", where=split, hint="give (images, labels)")
        labels = label_list(y, f"{split} labels")
        _check_length(len(labels), images.shape[0] if images.ndim else 0, split)
        return _Source(_image_array(images, split), labels, apart=True)
    dataset = _map_style(source, split)
    size = len(dataset)
    if y is not None:
        labels = label_list(y, f"{split} labels")
        _check_length(len(labels), size, split)
        return _Source(dataset, labels, apart=True)
    listed = _listed_labels(dataset, split)
    if listed is None or len(listed) != size:  # `targets` is a custom, no contract: a filtering wrapper keeps too many
        with own_random():  # a transform may draw from the generators meanwhile
            found = (read_item(dataset, index, f"{split} item {index}", labelled=True)[1] for index in range(size))
            listed = label_list(found, f"{split} labels")
    _check_length(len(listed), size, split)
    return _Source(dataset, listed, apart=False)


def _array(source: object) -> np.ndarray | Tensor | None:
    """Return the array or tensor that a source is, or None."""
    if isinstance(source, np.ndarray | Tensor):
        return source
    return np.asarray(source) if hasattr(source, "__array__") and not hasattr(source, "getexif") else None


def _map_style(source: object, split: str) -> Any:  # noqa: ANN401 - whatever has a length and items
    """Return the map-style data set of a source."""
    hint = "give (images, labels) arrays, a map-style Dataset of (image, label), or a DataLoader over one"
    if isinstance(source, DataLoader):
        _check_loader(source, split)
        source = source.dataset
    if isinstance(source, IterableDataset):
        raise DataError("an IterableDataset cannot be split or shuffled", where=split, hint=hint)
    no_items = not (hasattr(source, "__getitem__") and hasattr(source, "__len__"))
    if no_items or isinstance(source, str | bytes | tuple | Mapping):
        raise DataError(f"cannot take images from {type(source).__name__}", where=split, hint=hint)
    try:
        len(source)  # type: ignore[arg-type]
    except Exception as error:
        raise DataError("the data set has no length", where=split, hint=f"{type(error).__name__}: {error}") from error
    return source


def _check_loader(loader: DataLoader[Any], split: str) -> None:
    """Refuse a loader that does more than shuffle and batch: its order and its collation would be lost."""
    if isinstance(loader.dataset, IterableDataset):
        return
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(sampler)
        and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]
    )  # fmt: skip
    if not plain or type(loader.batch_sampler) not in (BatchSampler, type(None)):
        raise DataError(
            "the DataLoader has a sampler of its own",
            where=split,
            hint="training shuffles by itself; give the data set, or a Subset of what the sampler picks",
        )
    if loader.collate_fn not in (default_collate, default_convert):
        raise DataError(
            "the DataLoader has a collate_fn of its own",
            where=split,
            hint="give a data set whose items are (image, label) without it",
        )


def _listed_labels(dataset: Any, split: str) -> list[Hashable] | None:  # noqa: ANN401
    """Return the labels that a data set lists, or None."""
    if isinstance(dataset, Subset):
        inner = _listed_labels(dataset.dataset, split)
        if inner is None or len(inner) != len(dataset.dataset):  # type: ignore[arg-type]
            return None
        return [inner[index] for index in dataset.indices]
    if isinstance(dataset, TensorDataset):
        return label_list(dataset.tensors[1], f"{split} labels") if len(dataset.tensors) == 2 else None
    targets = getattr(dataset, "targets", None) if getattr(dataset, "target_transform", None) is None else None
    return None if targets is None else label_list(targets, f"{split} labels")


def _check_length(num_labels: int, num_images: int, split: str) -> None:
    """Raise DataError unless there is one label for each of at least one image."""
    if num_images == 0:
        raise DataError("there are no images", where=split)
    if num_labels != num_images:
        raise DataError("expected one label per image", where=f"{split}: {num_images} images, {num_labels} labels")


def _image_array(images: np.ndarray | Tensor, split: str) -> Tensor:
    """Return uint8 or float32 pixels (N, C, H, W)."""
    shape = tuple(images.shape)
    where = f"{split} images, {images.dtype}, shape {shape}"
    if len(shape) not in (3, 4):
        raise DataError("expected images (N, H, W) or (N, C, H, W)", where=where, hint="reshape them")
    if len(shape) == 4 and shape[3] in PIXEL_VALUES and shape[1] >= LONG_AXIS:
        raise DataError("the channels seem to come last", where=where, hint="give (N, C, H, W)")
    if 0 in shape:
        raise DataError("there are no pixels", where=where)
    try:
        x_NCHW = as_pixels(images)
    except DataError as error:
        raise DataError(error.what, where=where, hint=error.hint) from error
    if len(shape) == 3:
        x_NCHW = x_NCHW[:, None]
    for start in range(0, len(x_NCHW), _CHUNK):
        if (bad := first_not_finite(x_NCHW[start : start + _CHUNK])) is not None:
            raise DataError("the image has pixels that are NaN or infinite", where=f"{split} image {start + bad}")
    return x_NCHW


def _examples(
    source: _Source, labels_N: Tensor, split: str, config: DataConfig, preprocessing: Preprocessing | None
) -> Examples:
    """Return the examples of a split."""
    if isinstance(source.images, Tensor):
        return ArrayExamples(source.images, labels_N, prefix=f"{split} image")
    fit, channels = preprocessing, config.channels if preprocessing is None else preprocessing.channels
    if fit is None and config.image_size:
        blank = (0.0,) * 3, (1.0,) * 3
        fit = Preprocessing(3, config.image_size, config.image_size, *blank, config.max_pixels)
    return DatasetExamples(
        source.images,
        labels_N,
        prefix=f"{split} item",
        expected=None if source.apart else source.labels,
        fit=fit,
        channels=channels,
    )


def _check_alike(examples: Mapping[str, Examples], config: DataConfig, preprocessing: Preprocessing | None) -> None:
    """Raise unless the images of all splits have one shape and type: that of the model, or of the configuration."""
    forms = {split: (x.dtype, tuple(x.shape[1:])) for split, e in examples.items() for x in [e.read([0])]}
    dtype, shape = forms["train"]
    for split, form in forms.items():
        if form != forms["train"]:
            hint = f"{form[0]} {form[1]} and {dtype} {shape}"
            raise DataError(f"images of {split} differ from those of train in shape or type", hint=hint)
    if preprocessing is not None:
        _check_fits(examples["train"], preprocessing)
        return
    channels, height, width = shape
    require(
        config.image_size in (0, height) and (config.image_size == 0 or height == width),
        f"the images are {height} x {width} pixels",
        where="data.image_size",
        hint="leave it at 0; only PIL images are scaled",
    )
    wanted = 3 if config.preset == "imagenet" else config.channels
    where = "data.preset" if config.preset == "imagenet" else "data.channels"
    require(wanted in (0, channels), f"the images have {channels} channel{'s' * (channels != 1)}", where=where)
    config.check_padding(height, width)


def _check_fits(examples: Examples, preprocessing: Preprocessing) -> None:
    """Raise DataError unless the images have the shape and type that a model takes."""
    x_BCHW = examples.read([0])
    shape, scale = tuple(x_BCHW.shape[1:]), 1.0 if x_BCHW.is_floating_point() else 255.0
    if shape != preprocessing.shape or scale != preprocessing.pixel_scale:
        kind = "floating-point" if preprocessing.pixel_scale == 1 else "uint8"
        hint = f"it takes {kind} images of shape {preprocessing.shape}"
        raise DataError("the images do not fit the model", where=f"{x_BCHW.dtype} {shape}", hint=hint)


def _digest(examples: Mapping[str, Examples], classes: Sequence[str]) -> bytes:
    """Return the SHA-256 of all labels and pixels; of a data set that is read item by item, of some pixels."""
    digest = hashlib.sha256(repr(classes).encode())
    for split, part in examples.items():
        num = len(part) if part.in_memory else min(HASHED_ITEMS, len(part))
        indices_N = torch.arange(num) * len(part) // num
        digest.update(f"{split} {len(part)}".encode() + part.labels_N.numpy().astype("<i8").tobytes())
        for indices_B in indices_N.split(_CHUNK):
            x_BCHW = part.read(indices_B)
            digest.update(f"{x_BCHW.dtype} {tuple(x_BCHW.shape)}".encode())
            digest.update(x_BCHW.numpy().data)
    return digest.digest()
