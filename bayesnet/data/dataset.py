"""What a data set is: its configuration, and the four labelled splits that loading it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bayesnet.config import require
from bayesnet.data.examples import Examples
from bayesnet.data.preprocessing import MAX_SIDE, Preprocessing

SPLITS = ("train", "validation", "calibration", "test")
MIN_IMAGE_SIDE, MAX_IMAGE_SIDE = 8, 1024
MIN_FRACTION = 1e-3
MAX_WORKERS = 256
# Of torchvision's weights, after a division by 255.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_RESIZE, IMAGENET_SIDE = 256, 224


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section ``data`` of the configuration.

    Args:
        spec: A name of DATASETS, or ``folder:PATH``.
        image_size: Height and width, pixels; 0 chooses them from the data.
        preset: ``imagenet`` scales image files to a short side of 256, crops the central 224 x 224 and normalises as
            ImageNet's models expect; ``none`` takes size and statistics from the data; ``auto`` is ``imagenet`` where
            the backbone has weights of others, else ``none``. What ``mean``, ``std`` and ``resize`` say goes before it.
        mean: Mean of each channel that pixels are normalised with, after the division by 255; empty means the preset's,
            or measured on the training split.
        std: Standard deviation of each channel, likewise; given together with the mean.
        resize: Short side that image files are scaled to before the central ``image_size`` is cropped, pixels; 0 means
            the preset's, or scaling them so that they just cover the image size.
        channels: 1 (grey) or 3 (RGB); 0 means 1 for digits and 3 for folders, or as many as ``mean`` has.
        fractions: Shares of train, validation, calibration and test, for the splits that are not given as folders.
        seed: Seed of the splits, apart from the seed of training, so that runs can be compared on the same test split.
        crop_padding: Largest random shift of a training image, pixels.
        flip: Whether to mirror training images at random.
        rotate: Largest random rotation of a training image, degrees.
        min_crop: Smallest share of a training image's area that a random resized crop keeps; 1 crops nothing.
        colour: Largest random change of brightness, contrast and saturation, as a share: 0.4 is between 0.6 and 1.4.
        erase: Share of the area of the rectangle that is erased from each training image; 0 erases nothing.
        root: Folder of downloaded data sets; empty means the user's cache folder.
        workers: Processes that read images ahead, 0 for none. They pay where images do not fit into the cache.
        cache_megabytes: Memory for decoded pixels, all splits together; a split that does not fit is decoded each time.
        max_pixels: Largest image that is decoded, pixels.

    Raises:
        ConfigError: A value is out of range.
    """

    spec: str = "digits"
    image_size: int = 0
    channels: int = 0
    preset: Literal["auto", "none", "imagenet"] = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int = 0
    fractions: tuple[float, ...] = (0.6, 0.1, 0.1, 0.2)
    seed: int = 0
    crop_padding: int = 0
    flip: bool = False
    rotate: float = 0.0
    min_crop: float = 1.0
    colour: float = 0.0
    erase: float = 0.0
    root: str = ""
    workers: int = 0
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
        for key in ("seed", "crop_padding", "cache_megabytes", "workers"):
            require(getattr(self, key) >= 0, "must not be negative", where=f"data.{key}")
        require(self.workers <= MAX_WORKERS, f"must be at most {MAX_WORKERS}", where=f"data.workers = {self.workers}")
        require(0 <= self.rotate <= 180, "must be from 0 to 180 degrees", where=f"data.rotate = {self.rotate}")
        require(0 < self.min_crop <= 1, "must be above 0 and at most 1", where=f"data.min_crop = {self.min_crop}")
        for key in ("colour", "erase"):
            require(0 <= getattr(self, key) < 1, "must be in [0, 1)", where=f"data.{key}")
        sizes_agree = self.preset != "imagenet" or self.image_size in (0, IMAGENET_SIDE)
        require(sizes_agree, "the preset has 224 pixels", where="data.image_size", hint="leave it at 0")
        require(
            self.preset != "imagenet" or self.channels in (0, 3), "the preset has 3 channels", where="data.channels"
        )
        require(self.max_pixels >= 1, "must be at least 1", where="data.max_pixels")
        self._check_statistics()
        crop = self.image_size or (IMAGENET_SIDE if self.preset == "imagenet" else 0)
        require(self.resize == 0 or crop > 0, "needs an image size", where="data.resize", hint="set data.image_size")
        resize_is_right = self.resize == 0 or crop <= self.resize <= MAX_SIDE
        what = f"must be 0 or at least the image size, {crop}, and at most {MAX_SIDE}"
        require(resize_is_right, what, where=f"data.resize = {self.resize}")

    def check_padding(self, height: int, width: int) -> None:
        """Raise ConfigError unless ``crop_padding`` is below the images' shorter side, pixels."""
        side = min(height, width)
        require(self.crop_padding < side, f"must be below the image side, {side}", where="data.crop_padding")

    def _check_statistics(self) -> None:
        """Raise ConfigError unless mean and std are both absent, or fit each other and the channels."""
        lengths = len(self.mean), len(self.std)
        what = "mean and std must both be absent, or both have 1 or 3 numbers"
        require(lengths in ((0, 0), (1, 1), (3, 3)), what, where=f"data.mean has {lengths[0]}, data.std {lengths[1]}")
        require(all(map(math.isfinite, self.mean)), "must be finite", where="data.mean")
        require(all(0 < value < math.inf for value in self.std), "must be above 0 and finite", where="data.std")
        channels = self.channels or (3 if self.preset == "imagenet" else 0)
        fits = not self.mean or channels in (0, len(self.mean))
        require(fits, f"must have a number for each of {channels} channels", where="data.mean")

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each channel: those given, else the preset's; None where to measure them."""
        if self.mean:
            return self.mean, self.std
        return (IMAGENET_MEAN, IMAGENET_STD) if self.preset == "imagenet" else None


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
        labels: What the classes were in Python, for data that were given from there.
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
    labels: tuple[Hashable, ...] = ()


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
