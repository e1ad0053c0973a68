"""Digits: 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn. Nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch

from bayesnet.config import require
from bayesnet.data.assembly import assemble
from bayesnet.data.dataset import DataConfig, DataSource, ImageData
from bayesnet.data.examples import ArrayExamples
from bayesnet.data.preprocessing import Preprocessing

SIDE = 8


def load_digits(config: DataConfig, argument: str, preprocessing: Preprocessing | None) -> ImageData:
    """Return the digits in four splits.

    Args:
        config: The section ``data``.
        argument: Unused; the data set takes no path.
        preprocessing: That of a run, or None to make it from the training split.

    Raises:
        ConfigError: Another image size is asked for.
        DataError: A fraction leaves a class without an example in a split.
    """
    from sklearn import datasets  # a second of imports that nobody else should wait for

    height, width = (SIDE, SIDE) if preprocessing is None else preprocessing.shape[1:]
    size_is_right = config.image_size in (0, SIDE) and height == width == SIDE
    require(size_is_right, "digits are 8 x 8 pixels", where="data.image_size", hint="leave it at 0")
    bunch = datasets.load_digits()
    images_N1HW = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels_N = torch.from_numpy(bunch.target.astype(np.int64))
    classes = tuple(str(name) for name in bunch.target_names)
    channels = (config.channels or 1) if preprocessing is None else preprocessing.channels
    whole = ArrayExamples(images_N1HW.repeat(1, channels, 1, 1), labels_N, prefix="digit")
    content = images_N1HW.numpy().tobytes() + labels_N.numpy().astype("<i8").tobytes()
    return assemble("digits", {"train": whole}, classes, content, config=config, preprocessing=preprocessing)


DIGITS = DataSource(load_digits, takes_path=False, description="1,797 handwritten digits, 8 x 8, 10 classes (built in)")
