"""A grid of test images with captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bayesnet.plots.style import INK, drawable, new_figure, plain, png_bytes

_CELL, _LINE, _GAP = 1.3, 0.16, 0.12  # inches
_CAPTION_LENGTH = 21
_DPI = 96  # photographs compress badly, and a report holds three grids


def image_grid(images: NDArray[np.uint8], captions: Sequence[Sequence[str]], *, columns: int = 6) -> bytes:
    """Return images in a grid, each over its caption, as the bytes of a PNG file. Equal input gives equal bytes.

    Args:
        images: (N, C, H, W), uint8; C is 1 (grey) or 3 (red, green, blue).
        captions: N lists of lines of text, in which names may be anything.
        columns: Number of images in a row.

    Raises:
        ValueError: There is no image, another number of captions, or the images have another type or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 of shape (N, 1 or 3, H, W); got {images.dtype} {images.shape}")
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images need as many captions; got {len(captions)}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    row_height = _CELL + _LINE * max(len(lines) for lines in captions) + 2 * _GAP
    width, height = columns * (_CELL + _GAP) + _GAP, rows * row_height
    figure = new_figure(width, height, _DPI)
    for index, (image_CHW, lines) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = _GAP + column * (_CELL + _GAP), height - row * row_height - _GAP
        box = (left / width, (top - _CELL) / height, _CELL / width, _CELL / height)
        draw_image(figure, image_CHW, box)
        for number, line in enumerate(lines):
            y = (top - _CELL - 0.04 - number * _LINE) / height
            text = figure.text(left / width, y, drawable(line, _CAPTION_LENGTH), va="top", color=INK)
            plain(text, 7.5)
    return png_bytes(figure)


def draw_image(figure: Figure, image_CHW: NDArray[np.uint8], box: tuple[float, float, float, float]) -> None:
    """Draw one image, its pixels sharp where they are few.

    Args:
        figure: Where.
        image_CHW: uint8, 1 or 3 channels.
        box: Left, bottom, width and height, as shares of the figure.
    """
    axes = figure.add_axes(box)
    image_HWC = np.repeat(image_CHW, 3, 0).transpose(1, 2, 0) if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0)
    axes.imshow(image_HWC, interpolation="nearest" if max(image_HWC.shape) <= 64 else "antialiased")
    axes.set_axis_off()
