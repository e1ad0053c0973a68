"""From labelled sources to the four splits: what no source gives is carved from train, by class and by seed."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence

from torch import Tensor

from bayesnet.config import require
from bayesnet.data.dataset import SPLITS, DataConfig, ImageData
from bayesnet.data.examples import Examples, SubsetExamples
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.splits import check_every_class, stratified_split
from bayesnet.data.statistics import channel_statistics


def assemble(
    name: str,
    sources: Mapping[str, Examples],
    classes: Sequence[str],
    content: bytes,
    *,
    config: DataConfig,
    preprocessing: Preprocessing | None,
    spec: str | None = None,
    notes: Sequence[str] = (),
) -> ImageData:
    """Return a data set in four splits.

    Args:
        name: Registered name.
        sources: Split to examples; ``train`` is needed, what else is missing is carved from it.
        classes: Names in index order.
        content: Digest of the images and labels of all sources; the fingerprint adds who is in which split.
        config: The section ``data``: fractions and seed of the splits, and statistics, where it gives them.
        preprocessing: That of a run, or None to take those statistics, or else to measure them on the training split.
        spec: What loads it again; the name by default.
        notes: What was decided for the user, plain sentences.

    Raises:
        ConfigError: The section scales images, which these are too late for, or has statistics of other channels.
        DataError: A class has too few examples, or an image cannot be read.
    """
    require(config.resize == 0, "only image files are scaled and cropped", where="data.resize", hint="leave it at 0")
    digest = hashlib.sha256(content)
    splits, whole = dict(sources), sources["train"]
    for split, part_N in carve(whole.labels_N, sources, classes, config).items():
        digest.update(split.encode() + part_N.numpy().astype("<i8").tobytes())
        splits[split] = SubsetExamples(whole, part_N)
    if preprocessing is None:
        pixels_1CHW = splits["train"].read([0])
        _, channels, height, width = pixels_1CHW.shape
        scale = 1.0 if pixels_1CHW.is_floating_point() else 255.0
        mean, std = config.statistics or channel_statistics(splits["train"])
        what = f"{name} has {channels} channel{'s' * (channels != 1)}"
        require(
            len(mean) == channels, what, where=f"data.mean has {len(mean)}", hint="set data.channels or leave it out"
        )
        preprocessing = Preprocessing(channels, height, width, mean, std, config.max_pixels, pixel_scale=scale)
    return ImageData(
        name=name,
        spec=spec or name,
        classes=tuple(classes),
        preprocessing=preprocessing,
        train=splits["train"],
        validation=splits["validation"],
        calibration=splits["calibration"],
        test=splits["test"],
        notes=tuple(notes),
        fingerprint=digest.hexdigest(),
    )


def carve(labels_N: Tensor, given: Container[str], classes: Sequence[str], config: DataConfig) -> dict[str, Tensor]:
    """Return which training examples every missing split gets, and which are left to train, by class and by seed.

    Args:
        labels_N: int64 class indices of the training examples.
        given: The splits that are there already.
        classes: Names in index order.
        config: The section ``data``: fractions and seed.

    Returns:
        Split to sorted indices, ``train`` first; nothing where no split is missing.

    Raises:
        DataError: A class has too few examples.
    """
    shares = {
        split: share
        for split, share in zip(SPLITS, config.fractions, strict=True)
        if split == "train" or split not in given
    }
    if len(shares) == 1:
        return {}
    parts = stratified_split(labels_N, list(shares.values()), seed=config.seed)
    check_every_class(parts, labels_N, classes, "data.fractions")
    return dict(zip(shares, parts, strict=True))


def fixed_channels(
    name: str, config: DataConfig, preprocessing: Preprocessing | None, *, channels: int, side: int
) -> int:
    """Return the channels of a data set that is of one size, having refused what its images cannot be.

    Args:
        name: Registered name.
        config: The section ``data``.
        preprocessing: That of a run, or None.
        channels: What the images have; grey ones can be asked for as colour.
        side: Their height and width, pixels.

    Raises:
        ConfigError: Another image size, other channels or a preset is asked for.
    """
    require(config.preset != "imagenet", "the preset needs image files", where="data.preset", hint="leave it at auto")
    height, width = (side, side) if preprocessing is None else preprocessing.shape[1:]
    size_is_right = config.image_size in (0, side) and height == width == side
    require(size_is_right, f"{name} is {side} x {side} pixels", where="data.image_size", hint="leave it at 0")
    wanted = (config.channels or channels) if preprocessing is None else preprocessing.channels
    channels_are_right = wanted == channels or (channels, wanted) == (1, 3)
    require(channels_are_right, f"{name} has {channels} channels", where="data.channels", hint="leave it at 0")
    return wanted
