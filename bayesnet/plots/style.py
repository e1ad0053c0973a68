"""What the figures share: colours, fonts, safe names, clean axes, and one way to become the bytes of a PNG file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.text import Text
from numpy.typing import NDArray

from bayesnet.errors import printable

INK, MUTED, GRID = "#22303c", "#6b7a88", "#e3e8ec"
INSIDE, OUTSIDE, BAND = "#2a6f97", "#d1495b", "#b9c6d0"
RIGHT, WRONG = INSIDE, OUTSIDE
MAX_NAME_LENGTH = 40
DPI = 150
# A model is known by colour and by line style, so that the curves can be told apart in grey too.
_LINES: tuple[tuple[str, str], ...] = (("#c77b30", "--"), ("#2a6f97", "-"), ("#5b8c5a", ":"), ("#7b5ea7", "-."))
_KNOWN = ("deterministic", "bayesian")
_FONT_FILE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def drawable(name: str, length: int = MAX_NAME_LENGTH) -> str:
    r"""Return a name of any origin as one short line that the figure's own font can draw.

    Args:
        name: Any text.
        length: Number of characters that there is room for.

    Example:
        >>> drawable("tick" + chr(10) + chr(0x732b))
        'tick\\n□'
    """
    characters = get_font(_FONT_FILE).get_charmap()
    text = "".join(char if ord(char) in characters else "□" for char in printable(name))
    return text if len(text) <= length else text[: length - 1] + "…"


def plain(text: Text, size: float) -> None:
    """Make a text that holds a name literal: in the font of `drawable`, a dollar sign no formula."""
    text.set_fontproperties(FontProperties(fname=str(_FONT_FILE), size=size))
    text.set_parse_math(False)


def title(axes: Axes, name: str, *, size: float = 11.5, pad: float = 8) -> None:
    """Write a name of any origin over the axes, at the left."""
    plain(axes.set_title(drawable(name), loc="left", color=INK, pad=pad), size)


def line_styles(models: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Return the colour and line style of each model; the two usual ones keep theirs when alone.

    Example:
        >>> line_styles({"bayesian": None})["bayesian"] == line_styles({"deterministic": 0, "bayesian": 0})["bayesian"]
        True
    """
    order = [*_KNOWN, *(name for name in models if name not in _KNOWN)]
    return {name: _LINES[order.index(name) % len(_LINES)] for name in models}


def numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Return numbers of a record as an array, NaN (which is not drawn) where the record has None.

    Example:
        >>> numbers([1, None])
        array([ 1., nan])
    """
    return np.array([np.nan if value is None else value for value in values], np.float64)


def clean(axes: Axes) -> None:
    """Leave only what carries information: a light grid, no frame."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)


def legend(axes: Axes, marks: Mapping[str, Artist]) -> None:
    """Name curves or bars of the axes, as literal text.

    Args:
        axes: Where to write.
        marks: Name of any origin to what it names.
    """
    # Labels are set afterwards: matplotlib refuses an empty one and one that begins with an underscore.
    shown = axes.legend([*marks.values()], ["label"] * len(marks), frameon=False, labelcolor=INK)
    for text, name in zip(shown.get_texts(), marks, strict=True):
        text.set_text(drawable(name))
        plain(text, 8.5)


def new_figure(width: float, height: float, dpi: int | None = None) -> Figure:
    """Return an empty white figure of a size in inches."""
    return Figure(figsize=(width, height), dpi=dpi or DPI, facecolor="white")


def png_bytes(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
