"""Numbers in words, the same on the page, in figures and on a terminal."""

from __future__ import annotations


def percent(value: float, decimals: int = 1) -> str:
    """Return a share as per cent; what is not all or nothing is not rounded to it.

    Args:
        value: 0 to 1.
        decimals: Digits after the point.

    Example:
        >>> percent(0.1234), percent(0.99996), percent(0.0001), percent(1.0)
        ('12.3%', '>99.9%', '<0.1%', '100.0%')
    """
    shown = f"{value:.{decimals}%}"
    if value < 1 and shown == f"{1:.{decimals}%}":
        return f">{1 - 10.0 ** -(decimals + 2):.{decimals}%}"
    if value > 0 and shown == f"{0:.{decimals}%}":
        return f"<{10.0 ** -(decimals + 2):.{decimals}%}"
    return shown
