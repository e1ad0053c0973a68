"""Calibration: maps on probabilities fitted to held-out labels, conformal sets, and what they say of two models."""

from __future__ import annotations

from bayesnet.calibration import identity, temperature
from bayesnet.calibration.base import Calibrator, CalibratorFamily, nll_of_mean
from bayesnet.calibration.conformal import (
    ConformalThreshold,
    coverage_band,
    evaluate_sets,
    fit_lac,
    prediction_sets,
    threshold_from_json,
)
from bayesnet.calibration.verdict import verdict
from bayesnet.errors import CheckpointError
from bayesnet.registry import Registry

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "CalibratorFamily",
    "ConformalThreshold",
    "calibrator_from_json",
    "coverage_band",
    "evaluate_sets",
    "fit_lac",
    "nll_of_mean",
    "prediction_sets",
    "threshold_from_json",
    "verdict",
]

CALIBRATORS: Registry[CalibratorFamily] = Registry(
    "calibrator", {family.name: family for family in (identity.FAMILY, temperature.FAMILY)}
)


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
