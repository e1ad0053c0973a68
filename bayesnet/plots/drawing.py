"""From a calibration record to its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayesnet.plots.confusion import MAX_CLASSES, confusion_matrices
from bayesnet.plots.curves import risk_coverage_curves, severity_curves, training_curves
from bayesnet.plots.images import image_grid
from bayesnet.plots.reliability import reliability_diagram
from bayesnet.plots.uncertainty import uncertainty_histograms
from bayesnet.types import JsonObject
from bayesnet.wording import percent

GRIDS = ("most_uncertain", "most_epistemic", "confidently_wrong")
FIGURES = frozenset({"reliability", "risk_coverage", "uncertainty", "severity", "training", "confusion", *GRIDS})
"""Names of all figures that a calibration can have."""

_UNITS = {"most_uncertain": " nats", "most_epistemic": " nats", "confidently_wrong": ""}


class Grid(NamedTuple):
    """Test images to show together.

    Attributes:
        indices: Places in the test split.
        captions: Lines of text of each.
    """

    indices: list[int]
    captions: list[list[str]]


def draw_figures(record: JsonObject) -> dict[str, bytes]:
    """Return the figures of a calibration record, name to the bytes of a PNG file, in the order of the report.

    Args:
        record: The whole calibration record. Figures of parts that it lacks are left out.

    Returns:
        Some of "reliability", "risk_coverage", "uncertainty", "severity", "training", "confusion".
    """
    models: Mapping[str, Mapping[str, Any]] = record["models"]
    figures = {
        "reliability": reliability_diagram(models),
        "risk_coverage": risk_coverage_curves(models),
        "uncertainty": uncertainty_histograms(models),
    }
    if any(model["robustness"] for model in models.values()):
        figures["severity"] = severity_curves(models)
    if any(model["training"] for model in models.values()):
        figures["training"] = training_curves(models)
    if len(record["data"]["classes"]) <= MAX_CLASSES:
        figures["confusion"] = confusion_matrices(models, record["data"]["classes"])
    return figures


def default_model(models: Mapping[str, object]) -> str:
    """Return the model that the report looks into: the Bayesian one, or the one that there is.

    Example:
        >>> default_model({"bayesian": 0, "deterministic": 0}), default_model({"deterministic": 0})
        ('bayesian', 'deterministic')
    """
    return "bayesian" if "bayesian" in models else list(models)[-1]


def grids(record: JsonObject) -> dict[str, Grid]:
    """Return which test images of the default model to show and what to write under them; empty grids are left out.

    Args:
        record: The whole calibration record.
    """
    uncertainty = record["models"][default_model(record["models"])]["uncertainty"]
    found: dict[str, Grid] = {}
    for key in GRIDS:
        items = uncertainty[key]
        if key == "most_epistemic" and not any(item["value"] for item in items):
            continue  # one set of weights: nothing to rank by
        if items:
            captions = [_caption(item, _UNITS[key]) for item in items]
            found[key] = Grid([item["index"] for item in items], captions)
    return found


def draw_grids(record: JsonObject, pixels: Callable[[Sequence[int]], NDArray[np.uint8]]) -> dict[str, bytes]:
    """Return the grids of a calibration record as PNG bytes, to be laid beside `draw_figures`.

    Args:
        record: The whole calibration record.
        pixels: From places in the test split to images (N, C, H, W), uint8.
    """
    return {key: image_grid(pixels(grid.indices), grid.captions) for key, grid in grids(record).items()}


def _caption(item: JsonObject, unit: str) -> list[str]:
    """Return the lines under an image: what it is, what the model said, and how sure it was."""
    value = f", {item['value']:.3f}{unit}" if unit else ""
    return [f"is {item['label']}", f"said {item['predicted']}", f"{percent(item['probability'])}{value}"]
