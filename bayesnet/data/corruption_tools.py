"""What corruptions are made of: each image's own random numbers, strengths by image size, blurs, textures.

Every function treats each image by itself, so that a result never depends on which others are in the batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SMALL_SIDE, LARGE_SIDE = 32, 224


class Draws:
    """Random numbers of each image, a function of the key and of the image's position alone.

    They are the same for all severities, so that an image gets worse from one to the next and not just different.

    Args:
        seed: At least 0.
        name: Of the corruption.
        positions: Of the images in their data set.
    """

    def __init__(self, seed: int, name: str, positions: Sequence[int]) -> None:
        code = zlib.crc32(name.encode())
        # NumPy promises PCG64's raw stream in every version. A key that ended in 0 would be that of a shorter one.
        self._streams = [np.random.PCG64([seed, code, position, 1]) for position in positions]

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Return the next numbers of each image, between 0 and 1, shape (N, *shape)."""
        count = math.prod(shape)
        raw = np.stack([stream.random_raw(count) for stream in self._streams])
        return (((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).reshape(-1, *shape)

    def normal(self, *shape: int) -> Floats:
        """Return the next standard normal numbers of each image, shape (N, *shape)."""
        from scipy.special import ndtri

        normal: Floats = ndtri(self.uniform(*shape)).astype(np.float32)
        return normal


def short_side(x_NCHW: Floats) -> int:
    """Return the shorter side of the images, pixels."""
    return int(min(x_NCHW.shape[2:]))


def strength(at_small: float, at_large: float, side: int, *, length: bool = False) -> float:
    """Return a constant for images of some size, from those for 32 and for 224 pixels: geometric between the two.

    Args:
        at_small: For 32 pixels (CIFAR-10-C), above 0.
        at_large: For 224 pixels (ImageNet-C), above 0.
        side: Shorter side of the images, pixels.
        length: Whether it is in pixels: then it grows with the side above 224, and with its square root below 32,
            where lengths in proportion would be fractions of a pixel that change nothing.

    Example:
        >>> [round(strength(1.0, 7.0, side, length=True), 2) for side in (8, 32, 84, 224, 448)]
        [0.5, 1.0, 2.62, 7.0, 14.0]
    """
    share = math.log(max(side, SMALL_SIDE) / SMALL_SIDE) / math.log(LARGE_SIDE / SMALL_SIDE)
    value = math.pow(at_small, 1 - min(share, 1)) * math.pow(at_large, min(share, 1))
    if not length:
        return value
    return value * max(side / LARGE_SIDE, 1) * math.sqrt(min(side / SMALL_SIDE, 1))


def convolve(x_NCHW: Floats, kernel_RR: NDArray[np.float64]) -> Floats:
    """Return the images convolved with a symmetric kernel of odd sides that adds up to 1, edges mirrored.

    A sum of shifted images: the fastest way for the small and the thin kernels here, and the same for any batch.
    """
    radius_y, radius_x = kernel_RR.shape[0] // 2, kernel_RR.shape[1] // 2
    height, width = x_NCHW.shape[2:]
    padded = np.pad(x_NCHW, ((0, 0), (0, 0), (radius_y, radius_y), (radius_x, radius_x)), mode="symmetric")
    out = np.zeros_like(x_NCHW)
    for row, column in np.argwhere(kernel_RR):
        out += np.float32(kernel_RR[row, column]) * padded[:, :, row : row + height, column : column + width]
    return out


def gaussian_blur(x: Floats, sigma: float) -> Floats:
    """Return arrays (..., H, W) blurred by a Gaussian of standard deviation ``sigma``, pixels."""
    from scipy.ndimage import gaussian_filter

    blurred: Floats = gaussian_filter(x, (*(0,) * (x.ndim - 2), sigma, sigma), mode="reflect")
    return blurred


def disk_kernel(radius: float, edge: float) -> NDArray[np.float64]:
    """Return a disk of some radius with an edge that is soft over ``edge``, both in pixels."""
    from scipy.special import erfc

    reach = max(1, math.ceil(radius + 2.5 * edge))
    offsets = np.arange(-reach, reach + 1)
    distance = np.hypot(offsets[:, None], offsets[None])
    kernel: NDArray[np.float64] = erfc((distance - radius) / (edge * math.sqrt(2)))
    return _cut(kernel)


def line_kernel(sigma: float, angle: float) -> NDArray[np.float64]:
    """Return a line through the centre with Gaussian weights out to two ``sigma`` pixels.

    Args:
        sigma: Standard deviation along the line, pixels.
        angle: Against the horizontal, radians.
    """
    reach = max(1, math.ceil(2 * sigma))
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))
    for step in range(-reach, reach + 1):
        weight = math.exp(-0.5 * (step / sigma) ** 2)
        y, x = reach + 1 + step * math.sin(angle), reach + 1 + step * math.cos(angle)
        row, column = math.floor(y), math.floor(x)
        down, right = y - row, x - column
        kernel[row : row + 2, column : column + 2] += weight * np.outer((1 - down, down), (1 - right, right))
    return _cut(kernel)


def _cut(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the kernel without its faintest weights, each of which costs a pass over the images, adding up to 1."""
    kept = np.where(kernel < 1e-3 * kernel.max(), 0, kernel)
    normalized: NDArray[np.float64] = kept / kept.sum()
    return normalized


def motion(x_NCHW: Floats, sigma: float, angle_N: NDArray[np.float64]) -> Floats:
    """Return the images blurred along a line, each at its own angle (radians, rounded to 1/30 of a half turn)."""
    turn_N = np.rint(angle_N * 30 / np.pi).astype(np.int64)
    out = np.empty_like(x_NCHW)
    for turn in np.unique(turn_N):
        chosen = turn_N == turn
        out[chosen] = convolve(x_NCHW[chosen], line_kernel(sigma, float(turn) * np.pi / 30))
    return out


def interpolation(size: int, positions: NDArray[np.float64]) -> Floats:
    """Return the matrix (len(positions), size) that samples a line of pixels linearly, edges repeated."""
    clipped = np.clip(positions, 0, size - 1)
    first = np.minimum(np.floor(clipped).astype(np.int64), max(size - 2, 0))
    share = clipped - first
    matrix = np.zeros((len(positions), size), dtype=np.float32)
    rows = np.arange(len(positions))
    matrix[rows, first] = 1 - share
    matrix[rows, np.minimum(first + 1, size - 1)] += share
    return matrix


def sample(x_NCHW: Floats, rows_NHW: Floats, columns_NHW: Floats, *, nearest: bool = False) -> Floats:
    """Return the pixels at some positions, bilinear or the nearest, edges repeated.

    Args:
        x_NCHW: Images.
        rows_NHW: Vertical positions, pixels.
        columns_NHW: Horizontal positions.
        nearest: Whether to take the nearest pixel.
    """
    num, channels, height, width = x_NCHW.shape
    flat = x_NCHW.reshape(num, channels, -1)
    rows, columns = np.clip(rows_NHW, 0, height - 1), np.clip(columns_NHW, 0, width - 1)

    def at(row: Floats, column: Floats) -> Floats:
        index = (row * width + column).astype(np.int64).reshape(num, 1, -1)
        return np.take_along_axis(flat, index, 2).reshape(x_NCHW.shape)

    if nearest:
        return at(np.rint(rows), np.rint(columns))
    top, left = np.floor(rows), np.floor(columns)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = (rows - top)[:, None], (columns - left)[:, None]
    upper = at(top, left) * (1 - across) + at(top, right) * across
    lower = at(bottom, left) * (1 - across) + at(bottom, right) * across
    return (upper * (1 - down) + lower * down).astype(np.float32)


def fractal_noise(draws: Draws, size: tuple[int, ...], decay: float) -> Floats:
    """Return a cloudy texture (N, H, W) from 0 to 1: grids of random numbers, each twice as fine as the last.

    Args:
        draws: Of the images.
        size: Height and width, pixels.
        decay: What each grid's weight is divided by for the next; the smaller, the rougher.
    """
    height, width = size
    texture: Floats = np.zeros((1, height, width), dtype=np.float32)
    for octave in range(1, max(1, math.ceil(math.log2(max(height, width)))) + 1):
        cells = 2**octave
        grid = (draws.uniform(cells + 1, cells + 1) - 0.5).astype(np.float32)
        down = interpolation(cells + 1, np.linspace(0, cells, height))
        across = interpolation(cells + 1, np.linspace(0, cells, width))
        texture = texture + (decay**-octave * (down @ grid @ across.T)).astype(np.float32)
    low, high = texture.min((1, 2), keepdims=True), texture.max((1, 2), keepdims=True)
    scaled: Floats = (texture - low) / (high - low)
    return scaled
