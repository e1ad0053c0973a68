"""Figures, as PNG bytes: matplotlib by its object interface, without pyplot, so that threads share nothing.

Every number that is drawn stands in the calibration record that the figure is made from.
"""

from bayesnet.plots.drawing import FIGURES, GRIDS, Grid, default_model, draw_figures, draw_grids, grids
from bayesnet.plots.images import image_grid
from bayesnet.plots.reliability import reliability_diagram
from bayesnet.plots.style import MAX_NAME_LENGTH, drawable

__all__ = [
    "FIGURES",
    "GRIDS",
    "MAX_NAME_LENGTH",
    "Grid",
    "default_model",
    "draw_figures",
    "draw_grids",
    "drawable",
    "grids",
    "image_grid",
    "reliability_diagram",
]
