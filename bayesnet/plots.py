"""Figures, as PNG bytes: matplotlib by its object interface, without pyplot, so that threads share nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

from bayesnet.errors import printable
from bayesnet.metrics import ReliabilityBins, ece, ece_null_band, reliability_bins
from bayesnet.resampling import NUM_BINS

INK, MUTED, GRID = "#22303c", "#6b7a88", "#e3e8ec"
INSIDE, OUTSIDE, BAND = "#2a6f97", "#d1495b", "#b9c6d0"
MAX_NAME_LENGTH = 40
_COLUMNS = 2
# Inches: fixed places, so that names of any length move nothing.
_SIDE, _COUNTS_HEIGHT, _GAP, _LEFT, _MARGIN = 3.5, 0.75, 0.12, 0.75, 0.2
_TITLE_HEIGHT, _LEGEND_HEIGHT, _CELL_WIDTH, _CELL_HEIGHT = 0.72, 0.4, 4.45, 5.7
_FONT_FILE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def reliability_diagram(models: Mapping[str, tuple[ArrayLike, ArrayLike]], *, seed: int = 0) -> bytes:
    """Return a reliability diagram, one panel for each model, as the bytes of a PNG file.

    A point is a bin: its mean confidence and the share of its images that is right. The grey box behind it holds 95 %
    of the points that a perfectly calibrated model would show there; a point outside is red. Below are the numbers of
    images on a logarithmic axis. Equal input gives equal bytes.

    Args:
        models: Panel title to (probabilities_NK, labels_N).
        seed: Seed of the bands.

    Raises:
        ValueError: There is no model, or one has no proper probabilities and labels.
    """
    if not models:
        raise ValueError("a reliability diagram needs at least one model")
    columns = min(_COLUMNS, len(models))
    rows = -(-len(models) // columns)
    width, height = columns * _CELL_WIDTH + _MARGIN, rows * _CELL_HEIGHT + _LEGEND_HEIGHT
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    for index, (name, (probabilities, labels)) in enumerate(models.items()):
        row, column = divmod(index, columns)
        left, top = _LEFT + column * _CELL_WIDTH, height - _TITLE_HEIGHT - row * _CELL_HEIGHT
        upper = figure.add_axes((left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height))
        base = top - _SIDE - _GAP - _COUNTS_HEIGHT
        lower = figure.add_axes((left / width, base / height, _SIDE / width, _COUNTS_HEIGHT / height))
        bins = reliability_bins(probabilities, labels, seed=seed)
        _draw_reliability(upper, bins)
        _draw_counts(lower, bins)
        _title(upper, name, ece(probabilities, labels), ece_null_band(probabilities, seed=seed))
    _draw_legend(figure, columns)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def drawable(name: str) -> str:
    r"""Return a name of any origin as one short line that the figure's own font can draw.

    Example:
        >>> drawable("tick" + chr(10) + chr(0x732b))
        'tick\\n□'
    """
    characters = get_font(_FONT_FILE).get_charmap()
    text = "".join(char if ord(char) in characters else "□" for char in printable(name))
    return text if len(text) <= MAX_NAME_LENGTH else text[: MAX_NAME_LENGTH - 1] + "…"


def _draw_reliability(axes: Axes, bins: ReliabilityBins) -> None:
    """Draw diagonal, bands, points, and a hollow point for each empty bin."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    centres, filled = (edges[:-1] + edges[1:]) / 2, bins.count_B > 0
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=2.5)
    heights = np.maximum(bins.high_B - bins.low_B, 0.004)  # a band of no width still shows as a line
    axes.bar(centres[filled], heights[filled], 0.9 / NUM_BINS, bins.low_B[filled], color=BAND, alpha=0.75, zorder=2)
    inside = (bins.accuracy_B >= bins.low_B - 1e-12) & (bins.accuracy_B <= bins.high_B + 1e-12)
    for chosen, colour in ((filled & inside, INSIDE), (filled & ~inside, OUTSIDE)):
        x, y = bins.confidence_B[chosen], bins.accuracy_B[chosen]
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
    _clean(axes)


def _draw_counts(axes: Axes, bins: ReliabilityBins) -> None:
    """Draw the number of images of each bin."""
    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    axes.bar(centres, bins.count_B, 0.9 / NUM_BINS, color=MUTED, zorder=2)
    axes.set_xlim(0, 1)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 2 * bins.count_B.max())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.set_xlabel("confidence")
    axes.set_ylabel("images")
    _clean(axes)


def _title(axes: Axes, name: str, value: float, null: tuple[float, float, float]) -> None:
    """Write the model's name, its ECE and what a calibrated model would show."""
    low, high, _ = null
    font = FontProperties(fname=str(_FONT_FILE))
    text = axes.set_title(drawable(name), loc="left", color=INK, fontproperties=font, fontsize=11.5, pad=24)
    text.set_parse_math(False)  # a dollar sign in a name is no formula
    axes.text(
        0,
        1.025,
        f"ECE {value:.4f}   (if calibrated: {low:.4f} to {high:.4f})",
        transform=axes.transAxes,
        fontsize=8.5,
        color=OUTSIDE if value > high else MUTED,
        va="bottom",
    )


def _draw_legend(figure: Figure, columns: int) -> None:
    """Say what the marks mean, once for the figure."""
    handles = [
        Line2D([], [], color=INSIDE, label="bin within the band", linestyle="", marker="o"),
        Line2D([], [], color=OUTSIDE, label="bin outside it", linestyle="", marker="o"),
        Line2D([], [], color=MUTED, label="no images", markerfacecolor="white", linestyle="", marker="o"),
        Patch(color=BAND, alpha=0.75, label="95 % band of a calibrated model"),
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=4 if columns > 1 else 2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderaxespad=0.3,
    )


def _clean(axes: Axes) -> None:
    """Leave only what carries information: a light grid, no frame."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
