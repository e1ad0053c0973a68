"""From labelled sources to the four splits: what no source gives is carved from train, by class and by seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from bayesnet.data.dataset import IMAGENET_MEAN, IMAGENET_STD, SPLITS, DataConfig, ImageData
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
        config: The section ``data``: fractions and seed of the splits.
        preprocessing: That of a run, or None to measure the statistics on the training split.
        spec: What loads it again; the name by default.
        notes: What was decided for the user, plain sentences.

    Raises:
        DataError: A class has too few examples, or an image cannot be read.
    """
    digest = hashlib.sha256(content)
    splits = dict(sources)
    carved = [split for split in SPLITS if split == "train" or split not in sources]
    if len(carved) > 1:
        shares = dict(zip(SPLITS, config.fractions, strict=True))
        whole = sources["train"]
        parts = stratified_split(whole.labels_N, [shares[split] for split in carved], seed=config.seed)
        check_every_class(parts, whole.labels_N, classes, "data.fractions")
        for split, part_N in zip(carved, parts, strict=True):
            digest.update(split.encode() + part_N.numpy().astype("<i8").tobytes())
            splits[split] = SubsetExamples(whole, part_N)
    if preprocessing is None:
        pixels_1CHW = splits["train"].read([0])
        _, channels, height, width = pixels_1CHW.shape
        scale = 1.0 if pixels_1CHW.is_floating_point() else 255.0
        statistics: tuple[tuple[float, ...], tuple[float, ...]]
        if config.preset == "imagenet":
            statistics = IMAGENET_MEAN, IMAGENET_STD
        else:
            statistics = channel_statistics(splits["train"])
        mean, std = statistics
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
