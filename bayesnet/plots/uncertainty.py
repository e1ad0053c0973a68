"""Histograms of uncertainty, of right and of wrong answers: where they part, uncertainty tells errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from bayesnet.plots.style import MUTED, RIGHT, WRONG, clean, legend, new_figure, numbers, png_bytes, title
from bayesnet.types import JsonObject

_PARTS = {"total": "total (predictive entropy)", "epistemic": "epistemic (mutual information)"}
_NEGLIGIBLE = 1e-9  # nats: what is left of an exact 0 after rounding


def uncertainty_histograms(models: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return histograms of total and epistemic uncertainty as a PNG, a row for each model.

    Numbers of images are on a logarithmic axis; a vertical line is a mean. A model without draws has no epistemic part,
    and its place is left empty.

    Args:
        models: Name to "uncertainty" with ``total`` and ``epistemic``.
    """
    row_height, top, bottom = 2.75, 0.4, 0.5
    height = row_height * len(models)
    figure = new_figure(9.1, height)
    for row, (name, model) in enumerate(models.items()):
        for column, (part, label) in enumerate(_PARTS.items()):
            base = height - (row + 1) * row_height + bottom
            box = (0.075 + column * 0.495, base / height, 0.42, (row_height - top - bottom) / height)
            axes = figure.add_axes(box)
            title(axes, f"{name}: {part}", size=10)
            uncertainty = model["uncertainty"][part]
            if part == "epistemic" and (uncertainty["mean"] or 0) < _NEGLIGIBLE:
                axes.text(0.5, 0.5, "none: a single set of weights", ha="center", color=MUTED, fontsize=9)
                axes.set_axis_off()
                axes.title.set_visible(True)
                continue
            bars = _draw(axes, uncertainty)
            axes.set_xlabel(f"{label}, nats")
            axes.set_ylabel("images")
            clean(axes)
            legend(axes, bars)
    return png_bytes(figure)


def _draw(axes: Axes, uncertainty: JsonObject) -> dict[str, Artist]:
    """Draw the two histograms side by side in each bin, so that neither hides the other; return what to name."""
    bars: dict[str, Artist] = {}
    edges = numbers(uncertainty["histogram"]["edges"])
    half = np.diff(edges) * 0.45
    highest = 1
    for offset, answer, colour in ((0.05, "right", RIGHT), (0.5, "wrong", WRONG)):
        counts = uncertainty["histogram"][answer]
        axes.bar(edges[:-1] + offset * np.diff(edges), counts, half, color=colour, align="edge")
        bars[answer] = Patch(color=colour)
        highest = max(highest, *counts)
        mean = uncertainty[f"mean_{answer}"]
        if mean is not None:
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_yscale("log")
    axes.set_ylim(0.7, 2 * highest)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    return bars
