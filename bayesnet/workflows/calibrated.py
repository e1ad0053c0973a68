"""From a run directory back to a model as it answers: with the calibrator and thresholds that `calibrate` stored."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from bayesnet.calibration import (
    AbstentionThreshold,
    Calibrator,
    ConformalThreshold,
    abstention_from_json,
    calibrator_from_json,
    threshold_from_json,
)
from bayesnet.errors import CheckpointError, ConfigError
from bayesnet.rundir import RunDirectory
from bayesnet.types import JsonObject
from bayesnet.workflows.trained import EVALUATION, NO_USER_CODE, TrainedModel, UserCode, load_model

_T = TypeVar("_T")


class CalibratedModel(NamedTuple):
    """A model of a run as it answers: with what `calibrate` stored for it, where it has run.

    Attributes:
        trained: The model.
        calibrator: Map on every draw's log-probabilities, or None.
        threshold: Of its label sets, or None.
        abstention: Confidence below which it does not answer, or None where no risk limit was set.
    """

    trained: TrainedModel
    calibrator: Calibrator | None
    threshold: ConformalThreshold | None
    abstention: AbstentionThreshold | None


def record_calibrator(run: RunDirectory, record: JsonObject) -> Calibrator:
    """Return the calibrator of a record that `load_calibration` gave.

    Raises:
        CheckpointError: It is unknown or damaged.
    """
    return _parsed(run, calibrator_from_json, record["calibrator"])


def load_calibration(run: RunDirectory, model: TrainedModel) -> JsonObject | None:
    """Return what `calibrate` stored for this model, or None where it has not run.

    Raises:
        CheckpointError: calibration.json is damaged, or belongs to another checkpoint.
    """
    if not run.calibration.exists():
        return None
    try:
        record: JsonObject = run.read_json(run.calibration.name)["models"][model.name]
        digest = record["digest"]
        itemgetter("calibrator", "threshold", "abstention_threshold")(record)
        itemgetter(*EVALUATION)(record["after"])
    except (KeyError, TypeError) as error:
        raise CheckpointError("not a calibration", where=run.calibration, hint="run `bayesnet calibrate`") from error
    if digest != model.digest:
        hint = "run `bayesnet calibrate` again"
        raise CheckpointError("the calibration belongs to another checkpoint", where=run.calibration, hint=hint)
    return record


def load_calibrated(run: RunDirectory, name: str, user: UserCode = NO_USER_CODE) -> CalibratedModel:
    """Return a model of a finished run with its calibration.

    Args:
        run: The run.
        name: "deterministic" or "bayesian".
        user: The code that it was trained with where that was the caller's own.

    Raises:
        CheckpointError: See `load_model` and `load_calibration`.
    """
    trained = load_model(run, name, user)
    record = load_calibration(run, trained)
    if record is None:
        return CalibratedModel(trained, None, None, None)
    limit = record["abstention_threshold"]
    return CalibratedModel(
        trained,
        record_calibrator(run, record),
        _parsed(run, threshold_from_json, record["threshold"]),
        None if limit is None else _parsed(run, abstention_from_json, limit),
    )


def _parsed(run: RunDirectory, parse: Callable[[Any], _T], entry: object) -> _T:
    """Return what an entry of the calibration says, or raise a CheckpointError that names the file too."""
    try:
        return parse(entry)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError("cannot use the calibration", where=run.calibration, hint=str(error)) from error
