"""Pixel statistics of the training images, which preprocessing then carries with the run."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesnet.data.examples import Examples
from bayesnet.data.preprocessing import MIN_STD

_CHUNK = 64


def channel_statistics(examples: Examples, sample: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, on the scale 0..1.

    The images are evenly spaced in the data set and the sums are integers, so the result is the same on every machine.

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
    counts: list[Tensor] = []
    for chunk_B in indices_N.split(_CHUNK):
        x_CP = examples.read(chunk_B).transpose(0, 1).flatten(1)
        counts.append(torch.stack([torch.bincount(pixels_P, minlength=256) for pixels_P in x_CP]))
    histogram_CV = torch.stack(counts).sum(0)
    value_V = torch.arange(256)
    total_C = histogram_CV.sum(1).double()
    mean_C = (histogram_CV * value_V).sum(1).double() / total_C
    variance_C = (histogram_CV * value_V**2).sum(1).double() / total_C - mean_C**2
    std_C = (variance_C.clamp_min(0).sqrt() / 255).clamp_min(MIN_STD)
    return tuple((mean_C / 255).tolist()), tuple(std_C.tolist())
