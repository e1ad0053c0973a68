"""The reliability diagram: stated confidence against the share that is right, with what chance alone would show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from bayesnet.plots.style import BAND, INK, INSIDE, MUTED, OUTSIDE, clean, new_figure, numbers, png_bytes, title
from bayesnet.types import JsonObject

_STAGES = ("before", "after")
# Inches: fixed places, so that names of any length move nothing.
_SIDE, _COUNTS_HEIGHT, _GAP, _LEFT, _MARGIN = 3.5, 0.75, 0.12, 0.75, 0.2
_TITLE_HEIGHT, _LEGEND_HEIGHT, _CELL_WIDTH, _CELL_HEIGHT = 0.72, 0.4, 4.45, 5.7


def reliability_diagram(models: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a reliability diagram, a row for each model, before and after calibration, as the bytes of a PNG file.

    A point is a bin: its mean confidence and the share of its images that is right. The grey box behind it holds 95 %
    of the points that a perfectly calibrated model would show there; a point outside is red. Below are the numbers of
    images on a logarithmic axis. Equal input gives equal bytes.

    Args:
        models: Name to "reliability" (``count``, ``confidence``, ``accuracy``, ``low`` and ``high`` of each bin, None
            in empty ones) and metrics (``ece`` and ``ece_null95``), both "before" and "after".

    Raises:
        ValueError: There is no model.
    """
    if not models:
        raise ValueError("a reliability diagram needs at least one model")
    width, height = len(_STAGES) * _CELL_WIDTH + _MARGIN, len(models) * _CELL_HEIGHT + _LEGEND_HEIGHT
    figure = new_figure(width, height)
    for row, (name, model) in enumerate(models.items()):
        for column, stage in enumerate(_STAGES):
            left, top = _LEFT + column * _CELL_WIDTH, height - _TITLE_HEIGHT - row * _CELL_HEIGHT
            upper = figure.add_axes((left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height))
            base = top - _SIDE - _GAP - _COUNTS_HEIGHT
            lower = figure.add_axes((left / width, base / height, _SIDE / width, _COUNTS_HEIGHT / height))
            bins = model["reliability"][stage]
            _draw_reliability(upper, bins)
            _draw_counts(lower, bins["count"])
            _caption(upper, f"{name}, {stage}", model[stage])
    _draw_legend(figure)
    return png_bytes(figure)


def _draw_reliability(axes: Axes, bins: JsonObject) -> None:
    """Draw diagonal, bands, points, and a hollow point for each empty bin."""
    confidence, accuracy, low, high = (numbers(bins[key]) for key in ("confidence", "accuracy", "low", "high"))
    filled, num_bins = numbers(bins["count"]) > 0, len(bins["count"])
    centres = (np.arange(num_bins) + 0.5) / num_bins
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=2.5)
    heights = np.maximum(high - low, 0.004)  # a band of no width still shows as a line
    axes.bar(centres[filled], heights[filled], 0.9 / num_bins, low[filled], color=BAND, alpha=0.75, zorder=2)
    inside = (accuracy >= low - 1e-12) & (accuracy <= high + 1e-12)
    for chosen, colour in ((filled & inside, INSIDE), (filled & ~inside, OUTSIDE)):
        x, y = confidence[chosen], accuracy[chosen]
        axes.vlines(x, x, y, color=colour, linewidth=1.6, zorder=3)
        axes.plot(
            x, y, "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.8, zorder=4, clip_on=False
        )
    empty = centres[~filled]
    axes.plot(empty, empty, "o", markerfacecolor="white", markeredgecolor=MUTED, markersize=4.5, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("share that is right")
    clean(axes)


def _draw_counts(axes: Axes, counts: list[int]) -> None:
    """Draw the number of images of each bin."""
    axes.bar((np.arange(len(counts)) + 0.5) / len(counts), counts, 0.9 / len(counts), color=MUTED, zorder=2)
    axes.set_xlim(0, 1)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 2 * max(counts))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.set_xlabel("confidence")
    axes.set_ylabel("images")
    clean(axes)


def _caption(axes: Axes, name: str, metrics: JsonObject) -> None:
    """Write the model's name, its ECE and what a calibrated model would show."""
    low, high = metrics["ece_null95"]
    title(axes, name, pad=24)
    axes.text(
        0,
        1.025,
        f"ECE {metrics['ece']:.4f}   (if calibrated: {low:.4f} to {high:.4f})",
        transform=axes.transAxes,
        fontsize=8.5,
        color=OUTSIDE if metrics["ece"] > high else MUTED,
        va="bottom",
    )


def _draw_legend(figure: Figure) -> None:
    """Say what the marks mean, once for the figure."""
    handles = [
        Line2D([], [], color=INSIDE, label="bin within the band", linestyle="", marker="o"),
        Line2D([], [], color=OUTSIDE, label="bin outside it", linestyle="", marker="o"),
        Line2D([], [], color=MUTED, label="no images", markerfacecolor="white", linestyle="", marker="o"),
        Patch(color=BAND, alpha=0.75, label="95 % band of a calibrated model"),
    ]
    figure.legend(
        handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK, borderaxespad=0.3
    )
