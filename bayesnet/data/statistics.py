"""Pixel statistics of the training images, which preprocessing then carries with the run."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesnet.data.examples import Examples
from bayesnet.data.preprocessing import MIN_STD

_CHUNK = 64


def channel_statistics(examples: Examples, sample: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel: of uint8 pixels on the scale 0..1, else as they are.

    The images are evenly spaced in the data set; sums over uint8 pixels are integers, the same on every machine.

    Args:
        examples: The training images.
        sample: How many images to read at most.

    Returns:
        Means and standard deviations, one per channel; a deviation is at least 0.001, so that a constant channel
        cannot divide by zero.

    Raises:
        DataError: An image cannot be read.
    """
    num = min(sample, len(examples))
    indices_N = torch.arange(num) * len(examples) // max(num, 1)
    sums: list[Tensor] = []
    scale = 1.0
    for chunk_B in indices_N.split(_CHUNK):
        x_CP = examples.read(chunk_B).transpose(0, 1).flatten(1)
        if x_CP.dtype == torch.uint8:
            scale, x_CP = 255.0, x_CP.long()
        else:
            x_CP = x_CP.double()
        sums.append(torch.stack([x_CP.sum(1), (x_CP**2).sum(1), torch.full_like(x_CP[:, 0], x_CP.shape[1])]))
    sum_C, square_C, count_C = torch.stack(sums).sum(0).double()
    mean_C = sum_C / count_C
    std_C = ((square_C / count_C - mean_C**2).clamp_min(0).sqrt() / scale).clamp_min(MIN_STD)
    return tuple((mean_C / scale).tolist()), tuple(std_C.tolist())
