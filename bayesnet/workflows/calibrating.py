"""The workflow behind `bayesnet calibrate`: fit on half A, set thresholds on half B, then read the test split once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bayesnet import metrics, storage
from bayesnet.calibration import CALIBRATORS, Calibrator, ConformalThreshold, evaluate_sets, fit_lac, verdict
from bayesnet.calibration.identity import Identity
from bayesnet.calibration.temperature import Temperature
from bayesnet.config import require
from bayesnet.data import ImageData
from bayesnet.data.splits import halves
from bayesnet.engine import Engine
from bayesnet.errors import DataError
from bayesnet.predictive import Predictor, log_mean_exp
from bayesnet.report import CalibrationReport, calibration_report
from bayesnet.rundir import RunDirectory, find_run
from bayesnet.types import JsonObject
from bayesnet.workflows.trained import (
    NO_USER_CODE,
    TrainedModel,
    UserCode,
    load_model,
    read_data,
    read_finished,
    read_settings,
    trained_names,
)

COMPARED = ("nll", "brier", "accuracy")


class _Frozen(NamedTuple):
    """A model with everything fitted: from here on the test split may be read."""

    model: TrainedModel
    predictor: Predictor
    calibrator: Calibrator
    notice: str | None
    threshold: ConformalThreshold


class _Tested(NamedTuple):
    """Mean probabilities (N, K) on the test split."""

    before: NDArray[np.float64]
    after: NDArray[np.float64]


def calibrate(
    run: str | Path | None = None,
    *,
    alpha: float = 0.1,
    devices: str = "auto",
    data: ImageData | None = None,
    user: UserCode = NO_USER_CODE,
) -> JsonObject:
    """Calibrate the models of a run and say, with error bars, what it changed and which model is better.

    The calibration split is halved by seed: half A fits the temperature, half B sets the conformal threshold; only then
    is the test split read. The result is stored in the run and used by `predict` from then on.

    Args:
        run: A run directory; the newest finished one by default.
        alpha: 1 - alpha is the nominal coverage of the conformal sets.
        devices: "auto", "cpu", "cuda:0".
        data: The run's data, where they were given from Python.
        user: The run's own code, where it was given from Python.

    Returns:
        ``run``, ``models`` (each ``before``, ``after``, ``temperature``, ``conformal``), ``conformal`` of the Bayesian
        model (of the twin where it is alone), ``sentence``, ``report``.

    Raises:
        BayesnetError: A missing or damaged run, changed data, alpha out of range.
    """
    require(0 < alpha < 1, "must lie between 0 and 1", where=f"alpha = {alpha}")
    directory = find_run(run)
    with directory.lock():
        settings = read_settings(directory)
        names = trained_names(read_finished(directory), directory.path)
        engine = Engine.for_one(devices)
        models = {name: load_model(directory, name, user) for name in names}
        data = read_data(directory, settings, models[names[0]].preprocessing, data)
        if len(data.calibration) < 2:
            raise DataError("the calibration split has fewer than 2 images", where=data.spec, hint="add some")
        frozen = {name: _freeze(model, data, engine, alpha, settings.data.seed) for name, model in models.items()}
        tested = {
            name: _Tested(*each.predictor.probabilities_under(data.test, [Identity(), each.calibrator]))
            for name, each in frozen.items()
        }
        return _publish(directory, data, frozen, tested)


def _freeze(model: TrainedModel, data: ImageData, engine: Engine, alpha: float, seed: int) -> _Frozen:
    """Fit the calibrator on half A and the conformal threshold on half B of the calibration split."""
    predictor = model.predictor(engine)
    labels_N = data.calibration.labels_N
    half_a, half_b = halves(labels_N, seed)
    calibrator, notice = fit_temperature(predictor.raw_draws(data.calibration, half_a), labels_N[half_a])
    [calibrated_NK] = predictor.probabilities_under(data.calibration, [calibrator], half_b)
    threshold = fit_lac(calibrated_NK, labels_N[half_b].numpy(), alpha)
    return _Frozen(model, predictor, calibrator, notice, threshold)


def fit_temperature(draws_SNK: Tensor, labels_N: Tensor) -> tuple[Calibrator, str | None]:
    """Return the temperature fitted on half A, or the identity where half A cannot tell one; and a notice or None.

    Where every image of half A is classified right, its NLL falls without end as T falls: the temperature that it asks
    for is the most overconfident one, and ruins the NLL of the first error elsewhere. With errors an optimum at the
    bound of the range is a real one: the mean of sharpened draws is a vote, whose NLL stays finite where draws differ.

    Args:
        draws_SNK: Log-probabilities (S, N, K) on half A.
        labels_N: Its labels (N,).
    """
    errors = int((log_mean_exp(draws_SNK.double(), 0).argmax(1) != labels_N).sum())
    if not errors:
        found = f"{len(labels_N)} images of half A with {errors} errors"
        return Identity(), f"no temperature is applied: {found} cannot tell one"
    calibrator = CALIBRATORS["temperature"].fit(draws_SNK, labels_N)
    if isinstance(calibrator, Temperature) and calibrator.at_bound:
        return calibrator, f"the temperature is at the bound of its range, {calibrator.temperature:g}"
    return calibrator, None


def _publish(run: RunDirectory, data: ImageData, frozen: dict[str, _Frozen], tested: dict[str, _Tested]) -> JsonObject:
    """Evaluate on the test split; write calibration.json, the diagram and the report; return the record."""
    labels_N = data.test.labels_N.numpy()
    records = {name: _model_record(frozen[name], tested[name], labels_N) for name in frozen}
    panels: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
    for name, each in tested.items():
        panels |= {f"{name}, before": (each.before, labels_N), f"{name}, after": (each.after, labels_N)}
    from bayesnet.plots import reliability_diagram  # matplotlib takes half a second to import

    image = reliability_diagram(panels)
    differences: JsonObject = {}
    if len(tested) > 1:
        pair = tested["bayesian"].after, tested["deterministic"].after
        differences = {key: metrics.paired_difference(*pair, labels_N, key) for key in COMPARED}
    sentence = verdict({name: record["after"] for name, record in records.items()}, differences)
    default = list(records)[-1]
    record: JsonObject = {
        "run": str(run.path),
        "models": records,
        "differences": differences,
        "conformal": records[default]["conformal"]["lac"],
        "sentence": sentence,
        "report": str(run.report),
    }
    with storage.storage_errors("cannot make the directory", run.plots):
        storage.make_directories(run.plots)
    storage.write_bytes(run.plots / "reliability.png", image)
    report = CalibrationReport(
        title=f"Calibration of {run.path.name}",
        sentence=sentence,
        run=run.path.name,
        models=records,
        conformal=record["conformal"],
        images={"reliability": image},
    )
    run.write_text(run.report.name, calibration_report(report))
    run.write_json(run.calibration.name, record)
    return record


def _model_record(frozen: _Frozen, tested: _Tested, labels_N: NDArray[np.int64]) -> JsonObject:
    """Return what is stored of one model: its calibrator and threshold, and its metrics on the test split."""
    calibrator, threshold = frozen.calibrator, frozen.threshold
    return {
        "family": frozen.model.settings.inference.family,
        "posterior_temperature": frozen.model.settings.training.temperature,
        "digest": frozen.model.digest,
        "calibrator": calibrator.to_json(),
        "temperature": calibrator.temperature if isinstance(calibrator, Temperature) else 1.0,
        "notice": frozen.notice,
        "threshold": threshold.to_json(),
        "before": metrics.evaluate(tested.before, labels_N),
        "after": metrics.evaluate(tested.after, labels_N),
        "conformal": {threshold.method: evaluate_sets(tested.after, labels_N, threshold)},
    }
