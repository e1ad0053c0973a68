"""The fifteen kinds of common corruptions: images (N, C, H, W) in 0..1, a severity and random numbers to images.

The strengths of noise, zoom, brightness, contrast and JPEG, the radius of defocus and the amount of fog are those of
CIFAR-10-C for 32 pixels and of ImageNet-C for 224 (`corruption_tools.strength` says what holds between and beyond), but
for fog of severity 4 at 224 pixels: 2.75 instead of 2.5, since one roughness of the clouds stands for the published
five. The edge of the defocused disk is one for all severities too. The constants of glass, motion, snow, frost, elastic
and pixelate are chosen near the published ones, which mix several effects and do not all rise with the severity.
Results beyond 0..1 are cut off by the caller.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray

from bayesnet.data.corruption_tools import (
    SMALL_SIDE,
    Draws,
    Floats,
    convolve,
    disk_kernel,
    fractal_noise,
    gaussian_blur,
    interpolation,
    motion,
    sample,
    short_side,
    strength,
)
from bayesnet.data.images import jpeg_pixels

Five = tuple[float, float, float, float, float]

_ZOOMS = 11
_LEVELS = 255
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_ICE = np.array([0.85, 0.95, 1.0], dtype=np.float32)
# How smooth the textures are: that of the published plasma for fog, a rougher one for crystals.
_FOG_DECAY, _CRYSTAL_DECAY = 1.75, 1.4


def _at(x_NCHW: Floats, severity: int, at_small: Five, at_large: Five, *, length: bool = False) -> float:
    """Return the constant of a severity for the size of these images."""
    return strength(at_small[severity - 1], at_large[severity - 1], short_side(x_NCHW), length=length)


def gaussian_noise(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Add normal noise to every channel."""
    scale = _at(x_NCHW, severity, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))
    noisy: Floats = x_NCHW + np.float32(scale) * draws.normal(*x_NCHW.shape[1:])
    return noisy


def shot_noise(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Replace brightness by a count of photons, which is Poisson."""
    photons = _at(x_NCHW, severity, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
    table = _poisson_table(photons)
    level = np.rint(x_NCHW * _LEVELS)
    rank = np.searchsorted(table.ravel(), level + draws.uniform(*x_NCHW.shape[1:]))
    count = rank - level.astype(np.int64) * table.shape[1]
    bright: Floats = (count / photons).astype(np.float32)
    return bright


@functools.lru_cache(maxsize=16)
def _poisson_table(photons: float) -> NDArray[np.float64]:
    """Return level + P(count <= m) for each of the 256 levels and each count m: one search inverts them all."""
    from scipy.special import pdtr

    counts = np.arange(int(photons + 8 * photons**0.5) + 12)
    levels = np.arange(_LEVELS + 1)[:, None]
    cumulative: NDArray[np.float64] = pdtr(counts, levels * photons / _LEVELS)
    cumulative[:, -1] = 1
    return levels + cumulative


def impulse_noise(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Set a share of the values to black or white, each channel by itself."""
    share = _at(x_NCHW, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
    uniform = draws.uniform(*x_NCHW.shape[1:])
    salted = np.where(uniform > 1 - share / 2, np.float32(1), x_NCHW)
    return np.where(uniform < share / 2, np.float32(0), salted)


def defocus_blur(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Blur by a disk, as a lens out of focus does."""
    radius = _at(x_NCHW, severity, (0.3, 0.4, 0.5, 1.0, 1.5), (3, 4, 6, 8, 10), length=True)
    edge = max(0.4, strength(0.4, 0.5, short_side(x_NCHW), length=True))
    return convolve(x_NCHW, disk_kernel(radius, edge))


def glass_blur(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Take each pixel from a random place nearby, between two slight blurs."""
    sigma = _at(x_NCHW, severity, (0.2, 0.25, 0.3, 0.35, 0.4), (0.7, 0.9, 1.0, 1.1, 1.5), length=True)
    reach = _at(x_NCHW, severity, (0.7, 0.9, 1.2, 1.5, 1.9), (1.2, 2.0, 2.9, 3.8, 5.0), length=True)
    if short_side(x_NCHW) < SMALL_SIDE:  # a move of less than half a pixel is none
        reach = max(reach, 0.5 + 0.05 * severity)
    move_N2HW = ((2 * draws.uniform(2, *x_NCHW.shape[2:]) - 1) * reach).astype(np.float32)
    rows, columns = _grid(x_NCHW)
    moved = sample(gaussian_blur(x_NCHW, sigma), rows + move_N2HW[:, 0], columns + move_N2HW[:, 1], nearest=True)
    return gaussian_blur(moved, sigma)


def motion_blur(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Blur along a line within 45 degrees of the horizontal."""
    sigma = _at(x_NCHW, severity, (1, 1.5, 2, 2.3, 2.7), (3, 5, 8, 12, 15), length=True)
    return motion(x_NCHW, sigma, (draws.uniform(1)[:, 0] - 0.5) * np.pi / 2)


def zoom_blur(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Average the image over a range of magnifications around its centre."""
    largest = _at(x_NCHW, severity, (1.05, 1.10, 1.15, 1.20, 1.25), (1.10, 1.15, 1.20, 1.25, 1.30))
    out = np.zeros_like(x_NCHW)
    for zoom in np.linspace(1, largest, _ZOOMS):
        down, across = (_magnified(size, float(zoom)) for size in x_NCHW.shape[2:])
        out += down @ x_NCHW @ across.T
    mean: Floats = out / np.float32(_ZOOMS)
    return mean


def snow(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Whiten the scene and add streaks of flakes that fall at a slant."""
    height, width = x_NCHW.shape[2:]
    keep = _at(x_NCHW, severity, (0.95, 0.9, 0.85, 0.8, 0.75), (0.8, 0.75, 0.7, 0.65, 0.55))
    flake = max(1.0, _at(x_NCHW, severity, (1.0,) * 5, (3.0,) * 5, length=True))
    sigma = _at(x_NCHW, severity, (1.0, 1.1, 1.2, 1.3, 1.4), (4.0, 4.5, 5.0, 5.5, 6.0), length=True)
    threshold = (2.0, 1.8, 1.6, 1.4, 1.2)[severity - 1]
    angle_N = (0.25 + 0.5 * draws.uniform(1)[:, 0]) * np.pi
    cells = [max(2, round(size / flake)) for size in (height, width)]
    down, across = (
        interpolation(cell, np.linspace(0, cell - 1, size)) for cell, size in zip(cells, (height, width), strict=True)
    )
    fall_NHW = down @ np.clip(draws.normal(*cells) - np.float32(threshold), 0, 1) @ across.T
    fall_N1HW = motion(fall_NHW[:, None], sigma, angle_N)
    white = np.maximum(x_NCHW, 1.5 * _grey(x_NCHW) + np.float32(0.5))
    snowed: Floats = keep * x_NCHW + (1 - keep) * white + 2 * fall_N1HW
    return snowed.astype(np.float32)


def frost(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Cover the image with crystals: ridges of fractal noise, bluish in colour, in place of photographs of frost."""
    keep = _at(x_NCHW, severity, (0.98, 0.96, 0.92, 0.88, 0.84), (0.95, 0.9, 0.85, 0.8, 0.75))
    cover = _at(x_NCHW, severity, (0.2, 0.3, 0.4, 0.45, 0.5), (0.4, 0.55, 0.65, 0.75, 0.85))
    noise_NHW = fractal_noise(draws, x_NCHW.shape[2:], _CRYSTAL_DECAY)
    ridges_N1HW = (1 - np.abs(2 * noise_NHW - 1))[:, None] ** 2
    tint = _ICE[:, None, None] if x_NCHW.shape[1] == 3 else np.float32(1)
    frosted: Floats = (keep * x_NCHW + cover * ridges_N1HW * tint).astype(np.float32)
    return frosted


def fog(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Add clouds of fractal noise, then darken so that the brightest stays as bright."""
    amount = _at(x_NCHW, severity, (0.2, 0.5, 0.75, 1.0, 1.5), (1.5, 2.0, 2.5, 2.75, 3.0))
    clouds_N1HW = fractal_noise(draws, x_NCHW.shape[2:], _FOG_DECAY)[:, None]
    brightest = x_NCHW.max((1, 2, 3), keepdims=True)
    fogged: Floats = (x_NCHW + amount * clouds_N1HW) * (brightest / (brightest + amount))
    return fogged.astype(np.float32)


def brightness(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Raise the value (the largest channel) and keep hue and saturation."""
    raised = np.float32(_at(x_NCHW, severity, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)))
    value_N1HW = x_NCHW.max(1, keepdims=True)
    new_N1HW = np.minimum(value_N1HW + raised, np.float32(1))
    ratio_N1HW = new_N1HW / np.maximum(value_N1HW, np.float32(1e-6))
    brighter: Floats = np.where(value_N1HW > 0, x_NCHW * ratio_N1HW, new_N1HW).astype(np.float32)
    return brighter


def contrast(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Draw each channel towards its mean over the image."""
    share = np.float32(_at(x_NCHW, severity, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)))
    mean_NC11 = x_NCHW.reshape(*x_NCHW.shape[:2], -1).mean(-1)[:, :, None, None]
    drawn: Floats = (x_NCHW - mean_NC11) * share + mean_NC11
    return drawn


def elastic_transform(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Move the pixels by a smooth random field, in place of the published mixture of this and an affine map."""
    amplitude = _at(x_NCHW, severity, (0.3, 0.5, 0.7, 0.9, 1.2), (1.0, 1.6, 2.3, 3.0, 4.0), length=True)
    sigma = _at(x_NCHW, severity, (2.0,) * 5, (8.0,) * 5, length=True)
    field_N2HW = gaussian_blur(draws.normal(2, *x_NCHW.shape[2:]), sigma)
    power = np.square(field_N2HW).reshape(len(field_N2HW), -1).mean(-1)[:, None, None, None]
    move_N2HW = (field_N2HW * (amplitude / np.sqrt(power))).astype(np.float32)
    rows, columns = _grid(x_NCHW)
    return sample(x_NCHW, rows + move_N2HW[:, 0], columns + move_N2HW[:, 1])


def pixelate(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Average over a coarser grid and show its squares."""
    share = _at(x_NCHW, severity, (0.9, 0.75, 0.6, 0.5, 0.4), (0.6, 0.5, 0.4, 0.3, 0.25))
    down, across = (_coarsened(size, size * share) for size in x_NCHW.shape[2:])
    return (down @ x_NCHW @ across.T).astype(np.float32)


def jpeg_compression(x_NCHW: Floats, severity: int, draws: Draws) -> Floats:
    """Store as a JPEG file of low quality."""
    quality = round(_at(x_NCHW, severity, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)))
    pixels_NCHW = torch.from_numpy(np.rint(x_NCHW * _LEVELS).astype(np.uint8))
    stored_NCHW = torch.stack([jpeg_pixels(image_CHW, quality) for image_CHW in pixels_NCHW])
    return stored_NCHW.numpy().astype(np.float32) / np.float32(_LEVELS)


def _grid(x_NCHW: Floats) -> tuple[Floats, Floats]:
    """Return the row (H, 1) and the column (1, W) of each pixel."""
    height, width = x_NCHW.shape[2:]
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]


def _grey(x_NCHW: Floats) -> Floats:
    """Return the luminance (N, 1, H, W)."""
    if x_NCHW.shape[1] == 1:
        return x_NCHW
    red, green, blue = (x_NCHW[:, channel] * _GREY[channel] for channel in range(3))
    grey: Floats = (red + green + blue)[:, None]
    return grey


def _magnified(size: int, zoom: float) -> Floats:
    """Return the matrix (size, size) that magnifies a line of pixels around its centre."""
    centre = (size - 1) / 2
    return interpolation(size, centre + (np.arange(size, dtype=np.float64) - centre) / np.float64(zoom))


@functools.lru_cache(maxsize=64)
def _coarsened(size: int, cells: float) -> Floats:
    """Return the matrix (size, size) that averages a line of pixels over cells, and each pixel over its cells' means.

    Cells need not be whole pixels, nor their number whole: else several strengths would be the same for small images.
    """
    edges = np.minimum(np.arange(math.ceil(cells) + 1) * size / cells, size)[:, None]
    pixels = np.arange(size)
    overlap = np.maximum(np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels), 0)
    coarsened: Floats = (overlap.T @ (overlap / overlap.sum(1, keepdims=True))).astype(np.float32)
    return coarsened
