"""Programs: a model as one function from pixels to probabilities and intervals, which runs without this library."""

from __future__ import annotations

from bayesnet.exporting.card import model_card
from bayesnet.exporting.directory import JSON_NAME, KIND, claim, publish
from bayesnet.exporting.formats import FORMATS, Format, Run, missing_packages
from bayesnet.exporting.program import INPUT, OUTPUTS, Program, trace

__all__ = [
    "FORMATS",
    "INPUT",
    "JSON_NAME",
    "KIND",
    "OUTPUTS",
    "Format",
    "Program",
    "Run",
    "claim",
    "missing_packages",
    "model_card",
    "publish",
    "trace",
]
