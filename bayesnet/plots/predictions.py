"""Images with what a model says of them: bars of the most probable classes, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bayesnet.plots.images import draw_image
from bayesnet.plots.style import BAND, INK, INSIDE, MUTED, OUTSIDE, drawable, new_figure, plain, png_bytes
from bayesnet.wording import percent

MAX_IMAGES = 48
TOP = 5
_COLUMNS = 3
_IMAGE, _NAMES, _BARS, _GAP = 1.35, 1.05, 1.55, 0.22  # inches
_TITLE, _FOOT = 0.24, 0.26
_NAME_LENGTH, _PATH_LENGTH, _SET_LENGTH = 16, 52, 60
_DPI = 110


def prediction_grid(images: NDArray[np.uint8], rows: Sequence[Mapping[str, Any]], level: float) -> bytes:
    """Return images beside the probabilities of their most probable classes, with intervals, as a PNG.

    Args:
        images: (N, C, H, W), uint8, at most `MAX_IMAGES`; C is 1 or 3.
        rows: What `predict` returns of each; names may be anything.
        level: Level of the intervals.

    Raises:
        ValueError: No image, too many, another number of rows, or another type or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 of shape (N, 1 or 3, H, W); got {images.dtype} {images.shape}")
    if len(images) != len(rows) or len(images) > MAX_IMAGES:
        raise ValueError(f"expected a row for each of at most {MAX_IMAGES} images; got {len(rows)} for {len(images)}")
    columns = min(_COLUMNS, len(images))
    cell_width, cell_height = _IMAGE + _NAMES + _BARS + 2 * _GAP, _TITLE + _IMAGE + _FOOT + _GAP
    width, height = columns * cell_width + _GAP, -(-len(images) // columns) * cell_height + _GAP + 0.3
    figure = new_figure(width, height, _DPI)
    what = f"Bars: probability of the class. Lines: its {100 * level:.6g} % interval, no promise about the label."
    plain(figure.text(_GAP / width, 1 - 0.08 / height, what, va="top", color=MUTED), 7.5)
    for index, (image_CHW, row) in enumerate(zip(images, rows, strict=True)):
        line, column = divmod(index, columns)
        left, top = _GAP + column * cell_width, height - 0.3 - _GAP / 2 - line * cell_height
        _draw_cell(figure, image_CHW, row, left, top)
    return png_bytes(figure)


def _draw_cell(figure: Figure, image_CHW: NDArray[np.uint8], row: Mapping[str, Any], left: float, top: float) -> None:
    """Draw one image with its name above, its bars to the right, and below them its label set."""
    width, height = figure.get_size_inches()

    def write(x: float, y: float, text: str, length: int, colour: str, size: float) -> None:
        plain(figure.text(x / width, y / height, drawable(text, length), va="top", color=colour), size)

    name = row["path"].rpartition("/")[2] or row["path"]
    write(left, top, name, _PATH_LENGTH, INK, 8)
    picture_top = top - _TITLE
    draw_image(figure, image_CHW, (left / width, (picture_top - _IMAGE) / height, _IMAGE / width, _IMAGE / height))
    shown = sorted(row["classes"], key=lambda entry: -entry["probability"])[:TOP]
    box = (
        (left + _IMAGE + _NAMES) / width,
        (picture_top - _IMAGE * len(shown) / TOP) / height,
        _BARS / width,
        _IMAGE * len(shown) / TOP / height,
    )
    _draw_bars(figure.add_axes(box), shown, abstains=bool(row["abstain"]))
    if row["abstain"]:
        write(left, picture_top - _IMAGE - 0.05, "gives no answer", _SET_LENGTH, OUTSIDE, 7.5)
    elif row["set"] is not None:
        members = ", ".join(row["set"]) or "empty"
        write(left, picture_top - _IMAGE - 0.05, f"label set: {members}", _SET_LENGTH, MUTED, 7.5)


def _draw_bars(axes: Axes, shown: Sequence[Mapping[str, Any]], *, abstains: bool) -> None:
    """Draw a bar for each class, the most probable on top, its interval as a line and the probability beside it."""
    places = np.arange(len(shown))
    probability_T = np.array([entry["probability"] for entry in shown])
    ends = np.array([[entry["lower"], entry["upper"]] for entry in shown])
    colours = [MUTED if abstains else INSIDE, *[BAND] * (len(shown) - 1)]
    axes.barh(places, probability_T, height=0.62, color=colours)
    axes.hlines(places, ends[:, 0], ends[:, 1], color=INK, linewidth=1.1)
    axes.vlines(ends.ravel(), places.repeat(2) - 0.16, places.repeat(2) + 0.16, color=INK, linewidth=1.1)
    for place, entry in enumerate(shown):
        plain(
            axes.text(-0.05, place, drawable(entry["name"], _NAME_LENGTH), ha="right", va="center", color=INK),
            7.5,
        )
        plain(axes.text(1.04, place, percent(entry["probability"]), va="center", color=MUTED), 6.5)
    axes.set_xlim(0, 1.3)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_axis_off()
