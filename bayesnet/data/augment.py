"""Augmentation: a shifted crop and a horizontal flip, drawn per epoch and image, applied to whole batches.

What is done to an image depends on (seed, epoch, index of the image) alone, not on its batch, worker or device, so a
resumed run and a run on another number of devices see the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesnet.config import require


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for each image.

    Args:
        crop_padding: Largest shift in each direction, pixels; the border is filled by reflection.
        flip: Whether to mirror left and right with probability 1/2.

    Raises:
        ConfigError: The padding is negative.
    """

    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        require(self.crop_padding >= 0, "must not be negative", where="crop_padding")

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every image as it is."""
        return self.crop_padding == 0 and not self.flip


class AugmentDraws(NamedTuple):
    """The draws of one epoch.

    Attributes:
        offset_N2: int64, the shift of each image in rows and columns, between -padding and +padding: pixel (r, c) of
            the result is pixel (r + row shift, c + column shift) of the image, reflected at its border.
        flip_N: Whether the result is mirrored.
    """

    offset_N2: Tensor
    flip_N: Tensor

    def select(self, indices_B: Tensor) -> AugmentDraws:
        """Return the draws of these images."""
        return AugmentDraws(self.offset_N2[indices_B], self.flip_N[indices_B])

    def to(self, device: torch.device | str) -> AugmentDraws:
        """Return the draws on a device."""
        return AugmentDraws(self.offset_N2.to(device, non_blocking=True), self.flip_N.to(device, non_blocking=True))


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
    # NumPy promises the same raw stream in every version; it makes no such promise of shuffles, nor torch of randint.
    raw_N3 = np.random.PCG64([seed, epoch]).random_raw(3 * num_examples).reshape(num_examples, 3)
    padding = augmentation.crop_padding
    offset_N2 = (raw_N3[:, :2] % np.uint64(2 * padding + 1)).astype(np.int64) - padding
    flip_N = (raw_N3[:, 2] % np.uint64(2) == 1) & augmentation.flip
    return AugmentDraws(torch.from_numpy(offset_N2), torch.from_numpy(flip_N))


def augment(x_BCHW: Tensor, draws: AugmentDraws) -> Tensor:
    """Return the shifted and mirrored images.

    Args:
        x_BCHW: Pixels of any type.
        draws: The draws of these B images, on the same device.

    Returns:
        New pixels of the same shape and type.
    """
    num, _, height, width = x_BCHW.shape
    assert draws.flip_N.shape == (num,), draws.flip_N.shape
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
