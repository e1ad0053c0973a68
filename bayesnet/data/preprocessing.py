"""Preprocessing: the input size and pixel statistics of a model, stored with every run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnet.config import build_section, require, to_mapping
from bayesnet.errors import ConfigError
from bayesnet.types import JsonObject

MAX_SIDE = 4096
MAX_CHANNELS = 1024
MIN_STD = 1e-3


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the input of a model.

    Args:
        channels: 1 (grey), 3 (RGB), or any other number for data from Python.
        height: Rows, pixels.
        width: Columns, pixels.
        mean: Mean of each channel over the training images, after the division by ``pixel_scale``.
        std: Standard deviation of each channel, likewise.
        max_pixels: Largest image that is decoded, pixels; larger ones are refused from their header.
        resize: Short side that an image file is scaled to before the centre is cropped, pixels; 0 scales it so that it
            just covers height x width.
        pixel_scale: What pixel values are divided by: 255 for uint8 pixels, 1 for floating-point data from Python.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> grey = Preprocessing(1, 2, 2, mean=(0.5,), std=(0.5,))
        >>> grey.normalize(torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)).tolist()
        [[[[-1.0, 1.0], [1.0, -1.0]]]]
        >>> Preprocessing.from_json(grey.to_json()) == grey
        True
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int = 50_000_000
    resize: int = 0
    pixel_scale: float = 255.0

    def __post_init__(self) -> None:
        require(1 <= self.channels <= MAX_CHANNELS, f"must be 1 to {MAX_CHANNELS}", where="preprocessing.channels")
        for key, side in (("height", self.height), ("width", self.width)):
            require(1 <= side <= MAX_SIDE, f"must be between 1 and {MAX_SIDE}", where=f"preprocessing.{key}")
        for key, values in (("mean", self.mean), ("std", self.std)):
            right = len(values) == self.channels and all(math.isfinite(value) for value in values)
            require(right, f"expected {self.channels} finite numbers", where=f"preprocessing.{key}")
        require(min(self.std) > 0, "must be above 0", where="preprocessing.std")
        require(self.max_pixels >= 1, "must be at least 1", where="preprocessing.max_pixels")
        covers = self.resize == 0 or max(self.height, self.width) <= self.resize <= MAX_SIDE
        require(covers, "must be 0 or at least the height and width", where="preprocessing.resize")
        require(self.pixel_scale in (1.0, 255.0), "must be 1 or 255", where="preprocessing.pixel_scale")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (channels, height, width)."""
        return self.channels, self.height, self.width

    def normalize(self, x_BCHW: Tensor) -> Tensor:
        """Return ``(x / pixel_scale - mean) / std`` as float32, without waiting for the device.

        Args:
            x_BCHW: Pixels, uint8 or float32, on any device.
        """
        mean_C11, std_C11 = _constant(self.mean, x_BCHW.device), _constant(self.std, x_BCHW.device)
        return (x_BCHW.to(torch.float32) / self.pixel_scale - mean_C11) / std_C11

    def to_json(self) -> JsonObject:
        """Return the values as plain JSON."""
        return to_mapping(self)

    @classmethod
    def from_json(cls, mapping: object) -> Preprocessing:
        """Return the preprocessing that `to_json` wrote, checked key by key.

        Raises:
            ConfigError: A key is unknown or missing, or a value has the wrong type or range.
        """
        if isinstance(mapping, dict):
            for field in dataclasses.fields(cls):
                require(
                    field.name in mapping or field.default is not dataclasses.MISSING,
                    "key is missing",
                    where=f"preprocessing.{field.name}",
                )
        try:
            return build_section(cls, mapping, section="preprocessing")
        except OverflowError as error:  # an integer of JSON can be beyond every float
            raise ConfigError("number is too large", where="preprocessing") from error


def _constant(values: Sequence[float], device: torch.device) -> Tensor:
    """Return float32 values of shape (C, 1, 1), filled on the device: a copy from the host would make the host wait."""
    filled = [torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values]
    return torch.stack(filled)
