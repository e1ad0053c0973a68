"""Common corruptions: what weather, cameras and storage do to images, fifteen kinds in five severities.

They measure how a classifier and its uncertainty fare when test images are worse than those it was trained on. The
kinds are those of CIFAR-10-C and ImageNet-C, at any size from 8 x 8 up: strengths between the two benchmarks' sizes are
interpolated, lengths in pixels go with the size, and frost is generated. Error rates can be compared between models,
not with published ones of the benchmarks.

Reference: Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and
perturbations", arXiv:1903.12261.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesnet.config import require
from bayesnet.data import corruption_kinds as kinds
from bayesnet.data.corruption_tools import Draws, Floats
from bayesnet.data.examples import Examples
from bayesnet.errors import DataError
from bayesnet.registry import Registry

SEVERITIES = (1, 2, 3, 4, 5)
MIN_SIDE = 8
# Numbers in the arrays that are worked on at once: as many as a processor's cache holds.
_CHUNK_NUMBERS = 2**19


class Corruption(NamedTuple):
    """A row of the table of corruptions.

    Attributes:
        apply: From images (N, C, H, W) in 0..1, the severity and each image's random numbers to images.
        description: One line for listings.
    """

    apply: Callable[[Floats, int, Draws], Floats]
    description: str


CORRUPTIONS: Registry[Corruption] = Registry(
    "corruption",
    {
        "gaussian_noise": Corruption(kinds.gaussian_noise, "normal noise, as of a sensor in low light"),
        "shot_noise": Corruption(kinds.shot_noise, "Poisson noise of few photons"),
        "impulse_noise": Corruption(kinds.impulse_noise, "black and white values in random places"),
        "defocus_blur": Corruption(kinds.defocus_blur, "a lens out of focus"),
        "glass_blur": Corruption(kinds.glass_blur, "frosted glass: pixels from random places nearby"),
        "motion_blur": Corruption(kinds.motion_blur, "a camera that moves"),
        "zoom_blur": Corruption(kinds.zoom_blur, "a camera that moves towards the scene"),
        "snow": Corruption(kinds.snow, "streaks of snow, and a whitened scene"),
        "frost": Corruption(kinds.frost, "ice crystals on the lens (generated)"),
        "fog": Corruption(kinds.fog, "clouds of fog"),
        "brightness": Corruption(kinds.brightness, "more light"),
        "contrast": Corruption(kinds.contrast, "less contrast"),
        "elastic_transform": Corruption(kinds.elastic_transform, "a smooth distortion"),
        "pixelate": Corruption(kinds.pixelate, "a coarser resolution"),
        "jpeg_compression": Corruption(kinds.jpeg_compression, "JPEG of low quality"),
    },
)


def corrupt(
    x_NCHW: Tensor, name: str, severity: int, seed: int, positions: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Return corrupted images, uint8 (N, C, H, W), as new memory.

    What is random about an image is a function of (seed, name, its position), so that a part of a data set has the same
    images as the whole; and it is the same at every severity, so that an image gets worse and not just different.

    Args:
        x_NCHW: uint8 pixels, 1 or 3 channels, at least 8 x 8.
        name: A name of CORRUPTIONS.
        severity: 1 to 5.
        seed: At least 0.
        positions: Of the images in their data set; 0 to N - 1 by default.

    Raises:
        ConfigError: The name is unknown, or the severity or seed out of range.
        DataError: The pixels are of another type, of other channels or too few.

    Example:
        >>> grey = torch.full((2, 1, 8, 8), 128, dtype=torch.uint8)
        >>> corrupt(grey, "brightness", severity=4, seed=0).unique()
        tensor([179], dtype=torch.uint8)
        >>> both = corrupt(grey, "gaussian_noise", severity=1, seed=0)
        >>> bool((corrupt(grey[1:], "gaussian_noise", severity=1, seed=0, positions=[1]) == both[1:]).all())
        True
    """
    corruption = CORRUPTIONS[name]
    require(severity in SEVERITIES, "must be from 1 to 5", where=f"severity = {severity}")
    require(seed >= 0, "must not be negative", where=f"seed = {seed}")
    if unmet := _unmet(x_NCHW):
        raise DataError(f"corruptions need {unmet.needed}", where=f"{x_NCHW.dtype}, {tuple(x_NCHW.shape)}")
    places = list(range(len(x_NCHW))) if positions is None else torch.as_tensor(positions).tolist()
    assert len(places) == len(x_NCHW), (len(places), len(x_NCHW))
    out_NCHW = torch.empty(x_NCHW.shape, dtype=torch.uint8)
    chunk = max(1, _CHUNK_NUMBERS // max(1, x_NCHW[:1].numel()))
    for start in range(0, len(x_NCHW), chunk):
        part_BCHW = x_NCHW[start : start + chunk].cpu().contiguous().numpy().astype(np.float32) / np.float32(255)
        draws = Draws(seed, name, places[start : start + chunk])
        result_BCHW = corruption.apply(part_BCHW, severity, draws)
        pixels_BCHW = np.rint(np.clip(result_BCHW, 0, 1) * np.float32(255)).astype(np.uint8)
        out_NCHW[start : start + chunk] = torch.from_numpy(pixels_BCHW)
    return out_NCHW


class CorruptedExamples(Examples):
    """Examples as they look under a corruption; labels and names stay.

    Args:
        examples: Clean images, uint8.
        name: A name of CORRUPTIONS.
        severity: 1 to 5.
        seed: At least 0.
        positions_N: Places of the images in the data set that they were taken from, which fix what is random about
            them; their places here by default.

    Raises:
        ConfigError: The name is unknown, or the severity or seed out of range.

    Example:
        >>> from bayesnet.data.examples import ArrayExamples
        >>> clean = ArrayExamples(torch.full((3, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
        >>> CorruptedExamples(clean, "contrast", severity=1, seed=0).name(2)
        'image 2, contrast 1'
    """

    def __init__(
        self, examples: Examples, name: str, severity: int, seed: int, positions_N: Tensor | None = None
    ) -> None:
        _ = CORRUPTIONS[name]  # so that a wrong name is known at once, and not at the first read
        require(severity in SEVERITIES, "must be from 1 to 5", where=f"severity = {severity}")
        require(seed >= 0, "must not be negative", where=f"seed = {seed}")
        self.labels_N = examples.labels_N
        self._examples = examples
        self._key = (name, severity, seed)
        self._positions_N = torch.arange(len(examples)) if positions_N is None else positions_N
        assert len(self._positions_N) == len(examples), (len(self._positions_N), len(examples))

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return corrupted pixels (B, C, H, W), uint8: the same for an image whatever is read with it."""
        name, severity, seed = self._key
        positions_B = self._positions_N[torch.as_tensor(indices, dtype=torch.int64)]
        return corrupt(self._examples.read(indices), name, severity, seed, positions_B)

    @property
    def in_memory(self) -> bool:
        """As the clean images."""
        return self._examples.in_memory

    def name(self, index: int) -> str:
        """Return the clean image's name, the corruption and the severity."""
        name, severity, _ = self._key
        return f"{self._examples.name(index)}, {name} {severity}"

    def verify(self) -> None:
        """Look at every clean image once.

        Raises:
            DataError: Some cannot be read.
        """
        self._examples.verify()


def why_not_corruptible(x_NCHW: Tensor) -> str | None:
    """Return why the corruptions are not defined for these images, in a clause, or None where they are."""
    unmet = _unmet(x_NCHW)
    return None if unmet is None else unmet.found


class _Unmet(NamedTuple):
    """What the corruptions need, and what there is instead."""

    needed: str
    found: str


def _unmet(x_NCHW: Tensor) -> _Unmet | None:
    """Return what these images lack, or None."""
    form = "uint8 pixels of shape (N, 1 or 3, H, W)"
    if x_NCHW.dtype != torch.uint8:
        return _Unmet(form, f"pixels are {str(x_NCHW.dtype).removeprefix('torch.')}, not uint8")
    if x_NCHW.dim() != 4 or x_NCHW.shape[1] not in (1, 3):
        return _Unmet(form, f"images have {x_NCHW.shape[1]} channels, not 1 or 3")
    height, width = x_NCHW.shape[2:]
    if min(height, width) < MIN_SIDE:
        least = f"{MIN_SIDE} x {MIN_SIDE}"
        return _Unmet(
            f"images of at least {least} pixels", f"images have {height} x {width} pixels, fewer than {least}"
        )
    return None
