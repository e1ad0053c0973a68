"""The workflow behind `bayesnet calibrate`: fit on half A, set thresholds on half B, then read the test split once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnet import metrics, storage
from bayesnet.calibration import (
    CALIBRATORS,
    CONFORMAL,
    AbstentionThreshold,
    Calibrator,
    ConformalThreshold,
    evaluate_abstention,
    evaluate_sets,
    fit_abstention,
    fit_calibrator,
    verdict,
)
from bayesnet.calibration.temperature import Temperature
from bayesnet.config import require
from bayesnet.data import Examples, ImageData, Preprocessing
from bayesnet.data.corruptions import why_not_corruptible
from bayesnet.data.splits import halves
from bayesnet.data.unfamiliar import PHOTOGRAPHS, UnfamiliarSet, why_not_comparable
from bayesnet.engine import Engine
from bayesnet.errors import DataError
from bayesnet.report import calibration_report
from bayesnet.rundir import RunDirectory, find_run
from bayesnet.types import JsonObject
from bayesnet.workflows.answering import Answering, Answers, answer
from bayesnet.workflows.robustness import SomeImages, robustness_records
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
from bayesnet.workflows.uncertainty import uncertainty_record
from bayesnet.workflows.unfamiliarity import corrupted_set, read_unfamiliar, unfamiliar_records

COMPARED = ("nll", "brier", "accuracy")
MAX_CORRUPTED = 200
NONE = "none"
"""The spec of no unfamiliar images."""


class CalibrationPlan(NamedTuple):
    """What `calibrate` is asked for.

    Attributes:
        alpha: 1 - alpha is the nominal coverage of the label sets.
        calibrator: A name of CALIBRATORS.
        sets: A name of CONFORMAL: the label sets that `predict` gives.
        max_risk: Largest share of wrong answers among those that are given; None for no abstention.
        ood: Unfamiliar images: "photographs", a data set, a folder, or "none".
        num_corrupted: Test images that are corrupted, 0 for none.
    """

    alpha: float = 0.1
    calibrator: str = "temperature"
    sets: str = "lac"
    max_risk: float | None = None
    ood: str = PHOTOGRAPHS
    num_corrupted: int = MAX_CORRUPTED

    def check(self) -> None:
        """Raise ConfigError unless every value is one that can be had."""
        require(0 < self.alpha < 1, "must lie between 0 and 1", where=f"alpha = {self.alpha}")
        valid = self.max_risk is None or 0 < self.max_risk < 1
        require(valid, "must lie between 0 and 1", where=f"max_risk = {self.max_risk}")
        require(self.num_corrupted >= 0, "must not be negative", where=f"num_corrupted = {self.num_corrupted}")
        _ = CALIBRATORS[self.calibrator], CONFORMAL[self.sets]  # an unknown name is told before anything is read


class _Shift(NamedTuple):
    """What the models are asked about beyond the test split, settled before that is read.

    Attributes:
        unfamiliar: Images of no known class, or None.
        num_corrupted: Test images to corrupt.
        shown: Whether test images can be put on the page.
        left_out: What these images do not allow, and why.
    """

    unfamiliar: UnfamiliarSet | None
    num_corrupted: int
    shown: bool
    left_out: list[str]


class _Frozen(NamedTuple):
    """A model with everything fitted: from here on the test split may be read."""

    model: TrainedModel
    answering: Answering
    notice: str | None
    thresholds: dict[str, ConformalThreshold]
    abstention: AbstentionThreshold | None


def calibrate(
    run: str | Path | None = None,
    *,
    alpha: float = 0.1,
    calibrator: str = "temperature",
    sets: str = "lac",
    max_risk: float | None = None,
    ood: str = PHOTOGRAPHS,
    num_corrupted: int = MAX_CORRUPTED,
    devices: str = "auto",
    data: ImageData | None = None,
    user: UserCode = NO_USER_CODE,
) -> JsonObject:
    """Calibrate the models of a run and say, with error bars, what it changed and which model is better.

    The calibration split is halved by seed: half A fits the calibrator, half B the thresholds of label sets and
    abstention; only then is the test split read. The result is stored in the run and used by `predict` from then on.

    Args:
        run: A run directory; the newest finished one by default.
        alpha: 1 - alpha is the nominal coverage of the label sets.
        calibrator: "temperature", "vector", "isotonic", "bayesian_temperature" or "identity".
        sets: Which label sets `predict` gives: "lac", "aps", "raps" or "class_conditional"; all are evaluated.
        max_risk: Largest share of wrong answers, such as 0.02, among the images that are not abstained from.
        ood: Unfamiliar images: "photographs", a data set, a folder, or "none".
        num_corrupted: Test images that are corrupted, at most; 0 leaves corruptions out.
        devices: "auto", "cpu", "cuda:0".
        data: The run's data, where they were given from Python.
        user: The run's own code, where it was given from Python.

    Returns:
        What calibration.json holds: ``run``, ``data``, ``alpha``, ``models`` (each ``before``, ``after``,
        ``temperature``, ``conformal``, ``abstention``, ``uncertainty``, ``unfamiliar``, ``robustness`` and what the
        figures show), ``differences``, ``conformal`` of the Bayesian model (of the twin where it is alone),
        ``left_out`` (what these images do not allow, and why), ``sentence`` and ``report``.

    Raises:
        BayesnetError: A missing or damaged run, changed data, a value out of range.
    """
    plan = CalibrationPlan(alpha, calibrator, sets, max_risk, ood, num_corrupted)
    plan.check()
    directory = find_run(run)
    with directory.lock():
        settings = read_settings(directory)
        names = trained_names(read_finished(directory), directory.path)
        engine = Engine.for_one(devices)
        models = {name: load_model(directory, name, user) for name in names}
        preprocessing = models[names[0]].preprocessing
        data = read_data(directory, settings, preprocessing, data)
        if len(data.calibration) < 2:
            raise DataError("the calibration split has fewer than 2 images", where=data.spec, hint="add some")
        shift = _shift(data, preprocessing, plan)
        half_sizes, frozen = _freeze(models, data, engine, plan, settings.data.seed)
        return _publish(directory, data, plan, shift, half_sizes, frozen)


def _shift(data: ImageData, preprocessing: Preprocessing, plan: CalibrationPlan) -> _Shift:
    """Return what can be asked beyond the test split; what is wrong with unfamiliar images is told now."""
    x_1CHW = data.train.read([0])  # tells type, channels and size of all
    left_out, num_corrupted, unfamiliar = [], plan.num_corrupted, None
    if num_corrupted and (why := why_not_corruptible(x_1CHW)):
        left_out.append(f"no corruptions: {why}")
        num_corrupted = 0
    if plan.ood == PHOTOGRAPHS and (why := why_not_comparable(x_1CHW)):  # the default; images asked for by name must do
        left_out.append(f"no unfamiliar images: {why}")
    elif plan.ood != NONE:
        unfamiliar = read_unfamiliar(plan.ood, data, preprocessing)
    if why := _why_not_shown(x_1CHW):
        left_out.append(f"no images on the page: {why}")
    return _Shift(unfamiliar, num_corrupted, not why, left_out)


def _freeze(
    models: Mapping[str, TrainedModel], data: ImageData, engine: Engine, plan: CalibrationPlan, seed: int
) -> tuple[tuple[int, int], dict[str, _Frozen]]:
    """Fit calibrators on half A of the calibration split, thresholds on half B; return the sizes of the halves too."""
    labels_N = data.calibration.labels_N
    half_a, half_b = halves(labels_N, seed)
    answering, notices = {}, {}
    for name, model in models.items():
        predictor = model.predictor(engine)
        draws_SNK = predictor.raw_draws(data.calibration, half_a)
        fitted = fit_calibrator(plan.calibrator, draws_SNK, labels_N[half_a])
        answering[name], notices[name] = Answering(predictor, fitted.calibrator), fitted.notice
    labels_B = labels_N[half_b].numpy()
    frozen = {}
    for name, answers in answer(answering, data.calibration, half_b).items():
        p_BK, uniform_B = answers.after_NK, answers.uniform_N
        thresholds = {key: method.fit(p_BK, labels_B, plan.alpha, uniform_B) for key, method in CONFORMAL.items()}
        abstention = None if plan.max_risk is None else fit_abstention(p_BK, labels_B, plan.max_risk)
        frozen[name] = _Frozen(models[name], answering[name], notices[name], thresholds, abstention)
    return (len(half_a), len(half_b)), frozen


def _publish(
    run: RunDirectory,
    data: ImageData,
    plan: CalibrationPlan,
    shift: _Shift,
    half_sizes: tuple[int, int],
    frozen: Mapping[str, _Frozen],
) -> JsonObject:
    """Evaluate on the test split; write calibration.json, the figures and the report; return the record."""
    models = {name: each.answering for name, each in frozen.items()}
    tested = answer(models, data.test, keep_features=shift.unfamiliar is not None)
    records = {name: _model_record(model, tested[name], data, plan) for name, model in frozen.items()}
    for key, found in _beyond_the_test_split(models, tested, data, shift).items():
        for name, each in records.items():
            each[key] = found.get(name)
    for name, each in records.items():
        each["training"] = training_trace(run, name)
    labels_N = data.test.labels_N.numpy()
    differences: JsonObject = {}
    if len(tested) > 1:
        pair = tested["bayesian"].after_NK, tested["deterministic"].after_NK
        differences = {key: metrics.paired_difference(*pair, labels_N, key) for key in COMPARED}
        corrected = metrics.holm({key: found["p_value"] for key, found in differences.items()})
        differences = {key: found | {"p_value_holm": corrected[key]} for key, found in differences.items()}
    num_half_a, num_half_b = half_sizes
    record: JsonObject = {
        "run": str(run.path),
        "data": {
            "name": data.name,
            "classes": list(data.classes),
            "num_half_a": num_half_a,
            "num_half_b": num_half_b,
            "num_test": len(labels_N),
        },
        "alpha": plan.alpha,
        "models": records,
        "differences": differences,
        "conformal": records[list(records)[-1]]["conformal"][plan.sets],
        "left_out": shift.left_out,
        "sentence": verdict({name: each["after"] for name, each in records.items()}, differences),
        "report": str(run.report),
    }
    _write(run, record, data.test if shift.shown else None)
    return record


def _model_record(frozen: _Frozen, tested: Answers, data: ImageData, plan: CalibrationPlan) -> JsonObject:
    """Return what is stored of one model: its calibrator and thresholds, and all about it on the test split."""
    labels_N, after_NK = data.test.labels_N.numpy(), tested.after_NK
    calibrator, settings = frozen.answering.calibrator, frozen.model.settings
    return {
        "family": settings.inference.family,
        "posterior_temperature": settings.training.temperature,
        "digest": frozen.model.digest,
        "calibrator": calibrator.to_json(),
        "temperature": _temperature(calibrator),
        "notice": frozen.notice,
        "threshold": frozen.thresholds[plan.sets].to_json(),
        "abstention_threshold": None if frozen.abstention is None else frozen.abstention.to_json(),
        "before": metrics.evaluate(tested.before_NK, labels_N),
        "after": metrics.evaluate(after_NK, labels_N),
        "reliability": {
            "before": metrics.reliability_record(tested.before_NK, labels_N),
            "after": metrics.reliability_record(after_NK, labels_N),
        },
        "risk_coverage": metrics.risk_coverage_record(after_NK, labels_N),
        "confusion": metrics.confusion_cells(after_NK, labels_N),
        "classes": metrics.per_class(after_NK, labels_N, data.classes),
        "conformal": {
            name: evaluate_sets(after_NK, labels_N, threshold, tested.uniform_N, classes=data.classes)
            for name, threshold in frozen.thresholds.items()
        },
        "abstention": None if frozen.abstention is None else evaluate_abstention(after_NK, labels_N, frozen.abstention),
        "uncertainty": uncertainty_record(tested, labels_N, data.test, data.classes),
    }


def _temperature(calibrator: Calibrator) -> float | None:
    """Return the temperature of a calibrator that has one; 1 where nothing is changed."""
    if isinstance(calibrator, Temperature):
        return calibrator.temperature
    return 1.0 if calibrator.name == "identity" else None


def _beyond_the_test_split(
    models: Mapping[str, Answering], tested: Mapping[str, Answers], data: ImageData, shift: _Shift
) -> dict[str, dict[str, JsonObject]]:
    """Return what the models make of corrupted and of unfamiliar images, by key and model."""
    robustness: dict[str, JsonObject] = {}
    unfamiliar: dict[str, JsonObject] = {name: {} for name in models}
    sets = [] if shift.unfamiliar is None else [shift.unfamiliar]
    if shift.num_corrupted:
        images = SomeImages.of(data.test, shift.num_corrupted)
        robustness = robustness_records(models, images)
        if sets:
            sets.append(corrupted_set(images))
    if sets:
        unfamiliar = unfamiliar_records(models, tested, data.train, sets)
    return {"robustness": robustness, "unfamiliar": unfamiliar}


def _why_not_shown(x_NCHW: Tensor) -> str | None:
    """Return why images such as these cannot be put on the page, in a clause, or None where they can."""
    shown = x_NCHW.dtype == torch.uint8 and x_NCHW.shape[1] in (1, 3)
    return None if shown else f"{x_NCHW.shape[1]} channels of {str(x_NCHW.dtype).removeprefix('torch.')}"


def training_trace(run: RunDirectory, name: str) -> list[JsonObject]:
    """Return NLL, KL / N and their sum of each epoch of a model, nats per example.

    The sum is the negative ELBO / N whatever weight the KL had in training, so that epochs can be compared.
    """
    lines = [line for line in run.read_metrics() if line.get("model") == name]
    return [
        {
            "epoch": epoch,
            "nll": line["train_nll"],
            "kl": line["kl_per_example"],
            "loss": None if line["train_nll"] is None else line["train_nll"] + line["kl_per_example"],
        }
        for epoch, line in enumerate(lines, start=1)
    ]


def _write(run: RunDirectory, record: JsonObject, shown: Examples | None) -> None:
    """Write figures, report and, last, calibration.json, which `predict` reads; grids of test images where given."""
    from bayesnet.plots import FIGURES, draw_figures, draw_grids  # matplotlib takes half a second to import

    data = storage.json_file(run.calibration, record)
    figures = draw_figures(record)
    if shown is not None:
        figures |= draw_grids(record, lambda indices: shown.read(indices).numpy())
    with storage.storage_errors("cannot make the directory", run.plots):
        storage.make_directories(run.plots)
        for name in FIGURES - figures.keys():  # of an earlier calibration, which this one does not show
            (run.plots / f"{name}.png").unlink(missing_ok=True)
    for name, image in figures.items():
        storage.write_bytes(run.plots / f"{name}.png", image)
    run.write_text(run.report.name, calibration_report(record, figures, title=f"Calibration of {run.path.name}"))
    storage.write_bytes(run.calibration, data)
