"""Forty small images of two classes, and data sets of whatever a function makes, for the tests of Python's data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bayesnet.data.dataset import DataConfig, ImageData
from bayesnet.data.python_data import from_python

N = 40
CONFIG = DataConfig()
RNG = np.random.default_rng(0)
IMAGES_NHWC = RNG.integers(0, 256, (N, 10, 8, 3), dtype=np.uint8)
IMAGES = np.ascontiguousarray(IMAGES_NHWC.transpose(0, 3, 1, 2))
LABELS = np.arange(N) % 2


class Items(Dataset[Any]):
    """A list of items made by a function, without `targets`."""

    def __init__(self, make: Callable[[int], Any], size: int = N) -> None:
        self.make, self.size, self.reads = make, size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> object:
        self.reads += 1
        return self.make(index)


def load(train: object, y: object = None, config: DataConfig = CONFIG) -> ImageData:
    return from_python(train, y, config=config)
