"""Confusion matrices as heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from bayesnet.plots.style import INK, INSIDE, MUTED, drawable, new_figure, plain, png_bytes, title

MAX_CLASSES = 30
_MAX_BESIDE = 12  # classes up to which two matrices stand beside each other
_NAME_LENGTH = 14
_COLOURS = LinearSegmentedColormap.from_list("counts", ["#ffffff", "#cfe0ea", INSIDE, "#123a52"])


def confusion_matrices(models: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> bytes:
    """Return the confusion matrix of each model as a PNG: a row is a true class, a column the class it was given.

    A cell shows its number of images; the shade is its share of the row.

    Args:
        models: Name to "confusion": a list of [true class, given class, number of images].
        classes: K names, at most `MAX_CLASSES`.

    Raises:
        ValueError: There are more classes than a heat map can show.
    """
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"a heat map shows at most {MAX_CLASSES} classes; got {len(classes)}")
    names = [drawable(name, _NAME_LENGTH) for name in classes]
    columns = min(2, len(models)) if len(classes) <= _MAX_BESIDE else 1
    rows = -(-len(models) // columns)
    side = 3.3 if len(classes) <= _MAX_BESIDE else 7.2
    margin = 0.35 + 0.075 * max(len(name) for name in names)
    width, height = columns * (side + margin + 0.25), rows * (side + margin + 0.75)
    figure = new_figure(width, height)
    for index, (name, model) in enumerate(models.items()):
        row, column = divmod(index, columns)
        left, top = column * width / columns + margin, height - row * height / rows - 0.4
        axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
        _draw(axes, _matrix(model["confusion"], len(names)), names)
        title(axes, name)
    return png_bytes(figure)


def _matrix(cells: Sequence[Sequence[int]], num_classes: int) -> NDArray[np.int64]:
    """Return the matrix (K, K) of the cells that are not 0."""
    counts_KK = np.zeros((num_classes, num_classes), np.int64)
    for true, given, count in cells:
        counts_KK[true, given] = count
    return counts_KK


def _draw(axes: Axes, counts_KK: NDArray[np.int64], names: list[str]) -> None:
    """Draw one matrix, with the number in each cell that is not empty."""
    share_KK = counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    axes.imshow(share_KK, cmap=_COLOURS, vmin=0, vmax=1, interpolation="nearest")
    places = np.arange(len(names))
    size = min(9.0, 70 / len(names)) if len(names) <= _MAX_BESIDE else max(4.5, 130 / len(names))
    for true, given in np.argwhere(counts_KK > 0):
        colour = "white" if share_KK[true, given] > 0.5 else INK
        axes.text(given, true, f"{counts_KK[true, given]}", ha="center", va="center", color=colour, fontsize=size)
    axes.set_xticks(places, names, rotation=90)
    axes.set_yticks(places, names)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        plain(text, min(8.5, size + 1))
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[:].set_color(MUTED)
    axes.set_xlabel("answer of the model", color=INK, fontsize=9)
    axes.set_ylabel("true class", color=INK, fontsize=9)
