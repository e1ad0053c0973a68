"""Augmentation: geometry, colour and an erased rectangle, drawn per epoch and image, applied to whole batches.

What is done to an image depends on (seed, epoch, index of the image) alone, not on its batch, worker or device, so a
resumed run and a run on another number of devices see the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet.config import require
from bayesnet.data.dataset import DataConfig
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.streams import Stream, raw_numbers, uniform_numbers

CROP_ASPECT = 3 / 4, 4 / 3
ERASE_ASPECT = 0.3, 3.3
GREY_WEIGHTS = 0.2989, 0.587, 0.114


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for each image, in the order in which it is applied.

    Args:
        crop_padding: Largest shift in each direction, pixels; the border is filled by reflection.
        flip: Whether to mirror left and right with probability 1/2.
        rotate: Largest rotation about the centre, degrees, either way; corners are filled by reflection.
        min_crop: Smallest share of the area that a random resized crop keeps, of aspect 3/4 to 4/3; 1 crops nothing.
        colour: Largest change of brightness, contrast and saturation, as a share: 0.4 is between 0.6 and 1.4.
        erase: Share of the area of the rectangle, of aspect 0.3 to 3.3, that is filled with the mean of the image.

    Raises:
        ConfigError: A value is out of range.
    """

    crop_padding: int = 0
    flip: bool = False
    rotate: float = 0.0
    min_crop: float = 1.0
    colour: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        require(self.crop_padding >= 0, "must not be negative", where="crop_padding")
        require(0 <= self.rotate <= 180, "must be from 0 to 180 degrees", where=f"rotate = {self.rotate}")
        require(0 < self.min_crop <= 1, "must be above 0 and at most 1", where=f"min_crop = {self.min_crop}")
        require(0 <= self.colour < 1, "must be in [0, 1)", where=f"colour = {self.colour}")
        require(0 <= self.erase < 1, "must be in [0, 1)", where=f"erase = {self.erase}")

    @classmethod
    def from_config(cls, config: DataConfig) -> Augmentation:
        """Return what the section ``data`` asks for.

        Example:
            >>> Augmentation.from_config(DataConfig(flip=True, erase=0.1)).erase
            0.1
        """
        return cls(
            crop_padding=config.crop_padding,
            flip=config.flip,
            rotate=config.rotate,
            min_crop=config.min_crop,
            colour=config.colour,
            erase=config.erase,
        )

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every image as it is."""
        return self == Augmentation()

    def check(self, preprocessing: Preprocessing) -> None:
        """Check that it suits the data: geometry and erasing suit any, colour needs uint8 pixels in grey or RGB.

        Args:
            preprocessing: That of the data set.

        Raises:
            ConfigError: It changes the colour of floating-point pixels, or of images with other channels than 1 or 3.
        """
        changes = self.colour > 0
        what = "floating-point pixels have no defined range, so their colour cannot be changed"
        require(not changes or preprocessing.pixel_scale != 1, what, where="data.colour", hint="set it to 0")
        what = f"images with {preprocessing.channels} channels have no colour to change"
        require(not changes or preprocessing.channels in (1, 3), what, where="data.colour", hint="set it to 0")


class AugmentDraws(NamedTuple):
    """The draws of one epoch; those of a feature that is off are None. Numbers are float32 but for the first two.

    Attributes:
        offset_N2: int64, the shift of each image in rows and columns, between -padding and +padding: pixel (r, c) of
            the result is pixel (r + row shift, c + column shift) of the image, reflected at its border.
        flip_N: Whether the result is mirrored.
        rotation_N2: Cosine and sine of the angle, counter-clockwise.
        crop_N4: Share of the area, aspect (width / height), and place in rows and columns, from 0 (first) to 1 (last).
        colour_N3: Factors of brightness, contrast and saturation.
        erase_N4: Like ``crop_N4``, of the rectangle that is erased.
    """

    offset_N2: Tensor
    flip_N: Tensor
    rotation_N2: Tensor | None = None
    crop_N4: Tensor | None = None
    colour_N3: Tensor | None = None
    erase_N4: Tensor | None = None

    def select(self, indices_B: Tensor) -> AugmentDraws:
        """Return the draws of these images."""
        return self._each(lambda draws: draws[indices_B])

    def to(self, device: torch.device | str) -> AugmentDraws:
        """Return the draws on a device."""
        return self._each(lambda draws: draws.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> AugmentDraws:
        return AugmentDraws(
            offset_N2=change(self.offset_N2),
            flip_N=change(self.flip_N),
            rotation_N2=None if self.rotation_N2 is None else change(self.rotation_N2),
            crop_N4=None if self.crop_N4 is None else change(self.crop_N4),
            colour_N3=None if self.colour_N3 is None else change(self.colour_N3),
            erase_N4=None if self.erase_N4 is None else change(self.erase_N4),
        )


def epoch_draws(num_examples: int, augmentation: Augmentation, *, seed: int, epoch: int) -> AugmentDraws:
    """Return the draws of all images for one epoch, on the host.

    Args:
        num_examples: N.
        augmentation: What to draw.
        seed: Seed of the run, at least 0.
        epoch: Number of the epoch, at least 0.

    Example:
        >>> draws = epoch_draws(4, Augmentation(crop_padding=2, flip=True), seed=0, epoch=0)
        >>> draws.offset_N2.shape, draws.flip_N.dtype
        (torch.Size([4, 2]), torch.bool)
    """
    raw_N3 = raw_numbers(3 * num_examples, seed=seed, epoch=epoch).reshape(num_examples, 3)
    padding = augmentation.crop_padding
    offset_N2 = (raw_N3[:, :2] % np.uint64(2 * padding + 1)).astype(np.int64) - padding
    flip_N = (raw_N3[:, 2] % np.uint64(2) == 1) & augmentation.flip
    draws = AugmentDraws(torch.from_numpy(offset_N2), torch.from_numpy(flip_N))

    def uniform(columns: int, stream: Stream) -> NDArray[np.float64]:
        return uniform_numbers(num_examples, columns, seed=seed, epoch=epoch, stream=stream)

    if augmentation.rotate:
        angle_N = np.radians(augmentation.rotate) * (2 * uniform(1, Stream.ROTATION)[:, 0] - 1)
        # Taken here, not on the device: two devices' sines differ in the last bit.
        draws = draws._replace(rotation_N2=_float32(np.cos(angle_N), np.sin(angle_N)))
    if augmentation.min_crop < 1:
        draws = draws._replace(crop_N4=_boxes(uniform(4, Stream.CROP), augmentation.min_crop, 1, CROP_ASPECT))
    if augmentation.colour:
        factor_N3 = 1 + augmentation.colour * (2 * uniform(3, Stream.COLOUR) - 1)
        draws = draws._replace(colour_N3=_float32(*factor_N3.T))
    if augmentation.erase:
        box_N4 = _boxes(uniform(4, Stream.ERASE), augmentation.erase, augmentation.erase, ERASE_ASPECT)
        draws = draws._replace(erase_N4=box_N4)
    return draws


def augment(x_BCHW: Tensor, draws: AugmentDraws) -> Tensor:
    """Return the augmented images: rotated, cropped and shifted, mirrored; then recoloured; then erased.

    Rotation and resized crop are one bilinear interpolation together with shift and flip. Where neither is drawn,
    pixels move as they are. What is outside the image is its reflection, which a rotation or resized crop begins with
    the border pixel itself, and a mere shift with the one next to it.

    Brightness, contrast and saturation, in this order, follow torchvision's ColorJitter: blends with black, with the
    mean grey of the image and with the grey image, each clamped to 0..255. A grey image has no saturation to change.

    The erased rectangle gets the mean of each channel over the image; its sides are rounded to whole pixels.

    Args:
        x_BCHW: Pixels, uint8 or floating point; with colour draws, uint8 with 1 or 3 channels.
        draws: The draws of these B images, on the same device.

    Returns:
        New pixels of the same shape and type. uint8 pixels are rounded once, at the end.
    """
    assert draws.flip_N.shape == x_BCHW.shape[:1], draws.flip_N.shape
    is_warped = draws.rotation_N2 is not None or draws.crop_N4 is not None
    result_BCHW = _warped(x_BCHW.float(), draws) if is_warped else _moved(x_BCHW, draws)
    if draws.colour_N3 is not None:
        assert x_BCHW.dtype == torch.uint8, x_BCHW.dtype
        result_BCHW = _recoloured(result_BCHW.float(), draws.colour_N3)
    if draws.erase_N4 is not None:
        result_BCHW = _erased(result_BCHW.float(), draws.erase_N4)
    if result_BCHW.dtype == x_BCHW.dtype:
        return result_BCHW
    return (result_BCHW if x_BCHW.is_floating_point() else result_BCHW.round()).to(x_BCHW.dtype)


def _moved(x_BCHW: Tensor, draws: AugmentDraws) -> Tensor:
    """Return the shifted and mirrored images, pixels of any type as they are."""
    _, _, height, width = x_BCHW.shape
    row_H = torch.arange(height, device=x_BCHW.device)
    column_W = torch.arange(width, device=x_BCHW.device)
    column_BW = torch.where(draws.flip_N[:, None], width - 1 - column_W, column_W) + draws.offset_N2[:, 1:]
    row_BH = row_H + draws.offset_N2[:, :1]
    pixel_BHW = _reflected(row_BH, height)[:, :, None] * width + _reflected(column_BW, width)[:, None, :]
    index_BCP = pixel_BHW.flatten(1)[:, None].expand(-1, x_BCHW.shape[1], -1)
    return x_BCHW.flatten(2).gather(2, index_BCP).view(x_BCHW.shape)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Return indices folded into 0..size-1 by reflection without repeating the border, however far they are outside."""
    last = size - 1
    return last - (last - index.remainder(max(2 * last, 1))).abs()


def _warped(x_BCHW: Tensor, draws: AugmentDraws) -> Tensor:
    """Return float32 images under one affine warp: each pixel of the result is followed back to where it comes from.

    The coordinates are multiplied out element by element: `affine_grid` takes a matrix product, which may run in TF32
    (errors of a tenth of a pixel) and need not give an image the same bits in every batch.
    """
    num, _, height, width = x_BCHW.shape
    # Coordinates in pixels from the centre of the image.
    y_BH = torch.arange(height, device=x_BCHW.device) - (height - 1) / 2 + draws.offset_N2[:, :1]
    x_W = torch.arange(width, device=x_BCHW.device) - (width - 1) / 2
    x_BW = torch.where(draws.flip_N[:, None], -x_W, x_W) + draws.offset_N2[:, 1:]
    if draws.crop_N4 is not None:
        tall_B1, wide_B1 = _box_shares(draws.crop_N4, height, width)
        y_BH = y_BH * tall_B1 + (draws.crop_N4[:, 2:3] - 0.5) * (1 - tall_B1) * height
        x_BW = x_BW * wide_B1 + (draws.crop_N4[:, 3:4] - 0.5) * (1 - wide_B1) * width
    y_BHW, x_BHW = y_BH[:, :, None].expand(num, height, width), x_BW[:, None, :].expand(num, height, width)
    if draws.rotation_N2 is not None:
        cos_B11, sin_B11 = draws.rotation_N2[:, :1, None], draws.rotation_N2[:, 1:, None]
        y_BHW, x_BHW = sin_B11 * x_BHW + cos_B11 * y_BHW, cos_B11 * x_BHW - sin_B11 * y_BHW
    grid_BHW2 = torch.stack([x_BHW * (2 / width), y_BHW * (2 / height)], 3)
    return torch.nn.functional.grid_sample(x_BCHW, grid_BHW2, "bilinear", "reflection", align_corners=False)


def _recoloured(x_BCHW: Tensor, factor_B3: Tensor) -> Tensor:
    """Return float32 images on the scale 0..255 with their brightness, contrast and saturation changed."""
    brightness_B111, contrast_B111, saturation_B111 = factor_B3[:, :, None, None, None].unbind(1)
    x_BCHW = (x_BCHW * brightness_B111).clamp_(0, 255)
    mean_B111 = _mean(_grey(x_BCHW))
    x_BCHW = x_BCHW.mul_(contrast_B111).add_(mean_B111 * (1 - contrast_B111)).clamp_(0, 255)
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    grey_B1HW = _grey(x_BCHW)
    return x_BCHW.mul_(saturation_B111).add_(grey_B1HW.mul_(1 - saturation_B111)).clamp_(0, 255)


def _erased(x_BCHW: Tensor, erase_B4: Tensor) -> Tensor:
    """Return float32 images with one rectangle each filled with the mean of each channel."""
    _, _, height, width = x_BCHW.shape
    area = erase_B4[:, :1] * (height * width)
    tall_B1, _ = _box_shares(erase_B4, height, width)
    tall_B1 = (tall_B1 * height).round().clamp(1, height)
    # Rounding the height may have made it too low for a width that fits.
    tall_B1 = torch.maximum(tall_B1, (area / width).ceil())
    wide_B1 = (area / tall_B1).round().clamp(1, width)
    # The place is an even choice of the first pixel; a float32 just below 1 may round up to one too many.
    top_B1 = (erase_B4[:, 2:3] * (height - tall_B1 + 1)).floor().minimum(height - tall_B1)
    left_B1 = (erase_B4[:, 3:4] * (width - wide_B1 + 1)).floor().minimum(width - wide_B1)
    row_H = torch.arange(height, device=x_BCHW.device)
    column_W = torch.arange(width, device=x_BCHW.device)
    rows_BH = (row_H >= top_B1) & (row_H < top_B1 + tall_B1)
    columns_BW = (column_W >= left_B1) & (column_W < left_B1 + wide_B1)
    inside_B1HW = (rows_BH[:, :, None] & columns_BW[:, None, :])[:, None]
    return torch.where(inside_B1HW, _mean(x_BCHW), x_BCHW)


def _box_shares(box_B4: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return which share of the height and of the width a box has, shape (B, 1): of its area, its aspect if it fits."""
    share_B1 = box_B4[:, :1]
    aspect_B1 = (box_B4[:, 1:2] * (height / width)).clamp(share_B1, 1 / share_B1)
    return (share_B1 / aspect_B1).sqrt(), (share_B1 * aspect_B1).sqrt()


def _grey(x_BCHW: Tensor) -> Tensor:
    """Return the grey images, shape (B, 1, H, W)."""
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    red, green, blue = (x_BCHW[:, channel : channel + 1] * weight for channel, weight in enumerate(GREY_WEIGHTS))
    return red + green + blue


def _mean(x_BCHW: Tensor) -> Tensor:
    """Return the mean over the pixels, shape (B, C, 1, 1), with the same bits in every batch and on every device.

    It halves and adds: the order in which `mean` adds up depends on the device, and on the number of images.
    """
    sum_BCP = x_BCHW.flatten(2)
    while (size := sum_BCP.shape[2]) > 1:
        half = size // 2
        pairs_BCP = sum_BCP[:, :, :half] + sum_BCP[:, :, half : 2 * half]
        sum_BCP = torch.cat([pairs_BCP, sum_BCP[:, :, 2 * half :]], 2) if size % 2 else pairs_BCP
    return sum_BCP[..., None] / (x_BCHW.shape[2] * x_BCHW.shape[3])


def _boxes(uniform_N4: NDArray[np.float64], low: float, high: float, aspect: tuple[float, float]) -> Tensor:
    """Return boxes: share of the area in [low, high], aspect even in its logarithm, place in rows and in columns."""
    share_N = low + (high - low) * uniform_N4[:, 0]
    log_low, log_high = map(math.log, aspect)
    aspect_N = np.exp(log_low + (log_high - log_low) * uniform_N4[:, 1])
    return _float32(share_N, aspect_N, uniform_N4[:, 2], uniform_N4[:, 3])


def _float32(*columns_N: NDArray[np.float64]) -> Tensor:
    """Return the columns side by side as a contiguous tensor."""
    return torch.from_numpy(np.stack(columns_N, 1).astype(np.float32))
