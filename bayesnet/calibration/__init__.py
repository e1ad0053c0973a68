"""Calibration: maps on probabilities fitted to held-out labels, conformal sets, and what they say of two models."""

from __future__ import annotations

from bayesnet.calibration.abstention import (
    AbstentionThreshold,
    abstains,
    abstention_from_json,
    evaluate_abstention,
    fit_abstention,
    parse_risk,
)
from bayesnet.calibration.base import Calibrator, CalibratorFamily, nll_of_mean
from bayesnet.calibration.conformal import (
    CONFORMAL,
    ConformalMethod,
    ConformalThreshold,
    coverage_band,
    evaluate_sets,
    fit_lac,
    image_uniforms,
    prediction_sets,
    threshold_from_json,
)
from bayesnet.calibration.fitting import CALIBRATORS, FittedCalibrator, fit_calibrator
from bayesnet.calibration.verdict import verdict
from bayesnet.errors import CheckpointError

__all__ = [
    "CALIBRATORS",
    "CONFORMAL",
    "AbstentionThreshold",
    "Calibrator",
    "CalibratorFamily",
    "ConformalMethod",
    "ConformalThreshold",
    "FittedCalibrator",
    "abstains",
    "abstention_from_json",
    "calibrator_from_json",
    "coverage_band",
    "evaluate_abstention",
    "evaluate_sets",
    "fit_abstention",
    "fit_calibrator",
    "fit_lac",
    "image_uniforms",
    "nll_of_mean",
    "parse_risk",
    "prediction_sets",
    "threshold_from_json",
    "verdict",
]


def calibrator_from_json(entry: object) -> Calibrator:
    """Return the calibrator that `Calibrator.to_json` wrote.

    Raises:
        ConfigError: No calibrator has that name.
        CheckpointError: The entry is not an object with a name, or holds numbers that cannot be used.

    Example:
        >>> calibrator_from_json({"name": "temperature", "temperature": 1.5}).to_json()
        {'name': 'temperature', 'temperature': 1.5}
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise CheckpointError("calibrator is not an object with a name", where=repr(entry)[:80])
    return CALIBRATORS[entry["name"]].from_json(entry)
