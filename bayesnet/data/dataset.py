"""What a data set is: its configuration, and the four labelled splits that loading it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bayesnet.config import require
from bayesnet.data.examples import Examples
from bayesnet.data.preprocessing import Preprocessing

SPLITS = ("train", "validation", "calibration", "test")
MIN_IMAGE_SIDE, MAX_IMAGE_SIDE = 8, 1024
MIN_FRACTION = 1e-3


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section ``data`` of the configuration.

    Args:
        spec: ``digits`` or ``folder:PATH``.
        image_size: Height and width, pixels; 0 chooses them from the data.
        channels: 1 (grey) or 3 (RGB); 0 means 1 for digits and 3 for folders.
        fractions: Shares of train, validation, calibration and test, for the splits that are not given as folders.
        seed: Seed of the splits, apart from the seed of training, so that runs can be compared on the same test split.
        crop_padding: Largest random shift of a training image, pixels.
        flip: Whether to mirror training images at random.
        cache_megabytes: Memory for decoded pixels, all splits together; a split that does not fit is decoded each time.
        max_pixels: Largest image that is decoded, pixels.

    Raises:
        ConfigError: A value is out of range.
    """

    spec: str = "digits"
    image_size: int = 0
    channels: int = 0
    fractions: tuple[float, ...] = (0.6, 0.1, 0.1, 0.2)
    seed: int = 0
    crop_padding: int = 0
    flip: bool = False
    cache_megabytes: int = 2048
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        sizes = f"{MIN_IMAGE_SIDE} to {MAX_IMAGE_SIDE}"
        size_is_right = self.image_size == 0 or MIN_IMAGE_SIDE <= self.image_size <= MAX_IMAGE_SIDE
        require(size_is_right, f"must be 0 (automatic) or {sizes}", where="data.image_size")
        require(self.channels in (0, 1, 3), "must be 0 (automatic), 1 or 3", where="data.channels")
        shares_are_right = (
            len(self.fractions) == len(SPLITS)
            and all(MIN_FRACTION <= share < 1 for share in self.fractions)
            and math.isclose(sum(self.fractions), 1, abs_tol=1e-6)
        )
        what = f"must be four numbers of at least {MIN_FRACTION} that add up to 1"
        require(shares_are_right, what, where="data.fractions", hint=f"shares of {', '.join(SPLITS)}")
        for key in ("seed", "crop_padding", "cache_megabytes"):
            require(getattr(self, key) >= 0, "must not be negative", where=f"data.{key}")
        require(self.max_pixels >= 1, "must be at least 1", where="data.max_pixels")


class ImageData(NamedTuple):
    """A loaded data set. The splits are disjoint; pixels are read when they are asked for.

    Attributes:
        name: Registered name, such as ``folder``.
        spec: What loads it again, with an absolute path.
        classes: Class names; a label is an index into them.
        preprocessing: Input size and pixel statistics of the training split.
        train: Fits the model.
        validation: Selects: early stopping, best checkpoint, search.
        calibration: Fits calibrators and conformal thresholds.
        test: Read once, at the end.
        notes: What was decided for the user, plain sentences.
        fingerprint: SHA-256 of what is in which split, wherever the data lie.
    """

    name: str
    spec: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Examples
    validation: Examples
    calibration: Examples
    test: Examples
    notes: tuple[str, ...]
    fingerprint: str


Load = Callable[[DataConfig, str, Preprocessing | None], ImageData]


class DataSource(NamedTuple):
    """An entry of the table of data sets.

    Attributes:
        load: Takes the configuration, what follows the colon of the spec, and the preprocessing of a run or None.
        takes_path: Whether the spec is ``NAME:PATH``.
        description: One line for listings.
    """

    load: Load
    takes_path: bool
    description: str
