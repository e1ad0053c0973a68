"""T27: nothing that `calibrate` fits has seen the test split, and calibrator and thresholds see different halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnet.calibration import (
    CONFORMAL,
    AbstentionThreshold,
    ConformalThreshold,
    FittedCalibrator,
    fit_abstention,
    fit_calibrator,
    fit_lac,
)
from bayesnet.calibration.conformal import ConformalMethod
from bayesnet.data import DataConfig, Examples, ImageData, Preprocessing, load_data
from bayesnet.data.splits import halves
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError, DataError
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.types import JsonObject
from bayesnet.workflows import calibrating
from bayesnet.workflows.calibrating import CalibrationPlan, calibrate
from bayesnet.workflows.trained import load_model, read_data

Snapshot = Callable[[Path], dict[str, str]]

MODELS = ("deterministic", "bayesian")
NUM_FROZEN = 2 * (len(CONFORMAL) + 1)
"""Thresholds of both models: of each kind of label set, and of abstention."""


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, which takes longer than the rest; ``calibrated_run`` has real figures."""
    monkeypatch.setattr("bayesnet.plots.draw_figures", lambda record: {})
    monkeypatch.setattr("bayesnet.plots.draw_grids", lambda record, pixels: {})


def calibrate_only(run: Path, **arguments: Any) -> JsonObject:  # noqa: ANN401
    """Calibrate without corrupted and unfamiliar images."""
    return calibrate(run, devices="cpu", **{"ood": "none", "num_corrupted": 0, **arguments})


class Logged(Examples):
    """A split that logs when its pixels are read, and refuses them and its labels before everything is frozen.

    Args:
        name: Of the split.
        examples: The split.
        log: Where reading is noted.
        needed: How many thresholds must be fitted before.
    """

    def __init__(self, name: str, examples: Examples, log: list[str], needed: int) -> None:
        self.split, self.examples, self.log, self.needed = name, examples, log, needed

    def __len__(self) -> int:
        """Return how many there are, which may be known."""
        return len(self.examples)

    @property
    def labels_N(self) -> Tensor:  # type: ignore[override]
        """The labels."""
        self.check()
        return self.examples.labels_N

    def check(self) -> None:
        """Fail where it is too early."""
        assert self.log.count("threshold") >= self.needed, f"{self.split} read too early"

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pixels."""
        self.check()
        self.log.append(self.split)
        return self.examples.read(indices)

    def name(self, index: int) -> str:
        """Return the name."""
        return self.examples.name(index)

    def verify(self) -> None:
        """Allow looking."""


def watch(monkeypatch: pytest.MonkeyPatch, *, swapped: bool = False) -> list[str]:
    """Log what is read and fitted; test may be read after all thresholds of both models, validation never."""
    log: list[str] = []
    all_frozen = NUM_FROZEN

    def read(run: RunDirectory, settings: Settings, preprocessing: Preprocessing, given: None) -> ImageData:
        data = read_data(run, settings, preprocessing)
        calibration, test = (data.test, data.calibration) if swapped else (data.calibration, data.test)
        return data._replace(
            train=Logged("train", data.train, log, 0),
            validation=Logged("validation", data.validation, log, 99),
            calibration=Logged("test" if swapped else "calibration", calibration, log, all_frozen if swapped else 0),
            test=Logged("test", test, log, all_frozen),
        )

    def noting(method: ConformalMethod) -> ConformalMethod:
        def fit(*args: Any) -> ConformalThreshold:  # noqa: ANN401
            log.append("threshold")
            return method.fit(*args)

        return method._replace(fit=fit)

    def fit(name: str, draws_SNK: Tensor, labels_N: Tensor) -> FittedCalibrator:
        log.append("calibrator")
        return fit_calibrator(name, draws_SNK, labels_N)

    def abstain(*args: Any) -> AbstentionThreshold:  # noqa: ANN401
        log.append("threshold")
        return fit_abstention(*args)

    watched = {name: noting(method) for name, method in CONFORMAL.items()}
    monkeypatch.setattr("bayesnet.workflows.calibrating.read_data", read)
    monkeypatch.setattr("bayesnet.workflows.calibrating.CONFORMAL", watched)
    monkeypatch.setattr("bayesnet.workflows.calibrating.fit_calibrator", fit)
    monkeypatch.setattr("bayesnet.workflows.calibrating.fit_abstention", abstain)
    return log


def shortened(log: list[str]) -> list[str]:
    return [each for index, each in enumerate(log) if index == 0 or log[index - 1] != each]


def test_the_test_split_is_read_when_everything_is_frozen(trained_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = watch(monkeypatch)
    calibrate_only(trained_copy, max_risk=0.1)
    half_a = ["calibration", "calibrator"]
    half_b = ["calibration", "threshold"]  # once for both models
    assert shortened(log) == ["train", *half_a, *half_a, *half_b, "test"]  # one training image tells the type of pixels
    assert log.count("threshold") == NUM_FROZEN
    assert log.count("test") == 12  # 360 images in chunks of 32, once for both models


def test_nothing_is_read_early_for_unfamiliar_and_corrupted_images(
    trained_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = watch(monkeypatch)
    calibrate_only(trained_copy, ood="photographs", num_corrupted=4, max_risk=0.1)
    assert log.count("threshold") == NUM_FROZEN
    assert {"train", "test"} <= set(log)


def test_calibrating_on_the_test_split_is_noticed(trained_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    watch(monkeypatch, swapped=True)
    with pytest.raises(AssertionError, match="test read too early"):
        calibrate_only(trained_copy, max_risk=0.1)


@pytest.mark.parametrize("look", ["pixels", "labels"])
def test_abstention_that_has_seen_the_test_split_is_noticed(
    trained_copy: Path, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    """The control: everything else is frozen, and the test split is looked at before the abstention threshold is."""
    watch(monkeypatch)
    freeze = calibrating._freeze

    def leaking(models: Any, data: ImageData, engine: Engine, plan: CalibrationPlan, seed: int) -> Any:  # noqa: ANN401
        freeze(models, data, engine, plan._replace(max_risk=None), seed)
        _ = data.test.labels_N if look == "labels" else data.test.read([0])
        return freeze(models, data, engine, plan, seed)

    monkeypatch.setattr(calibrating, "_freeze", leaking)
    with pytest.raises(AssertionError, match="test read too early"):
        calibrate_only(trained_copy, max_risk=0.1)


def test_unfamiliar_images_that_cannot_be_read_are_told_before_the_test_split_is(
    trained_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = watch(monkeypatch)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        calibrate_only(trained_copy, ood=str(tmp_path / "strange"), max_risk=0.1)
    with pytest.raises(ConfigError, match="unknown unfamiliar set"):
        calibrate_only(trained_copy, ood="phtographs", max_risk=0.1)
    assert set(log) == {"train"}


def test_calibrator_and_threshold_see_different_halves(trained_copy: Path) -> None:
    data = load_data(DataConfig())
    half_a, half_b = (set(half.tolist()) for half in halves(data.calibration.labels_N, 0))
    assert half_a | half_b == set(range(179))
    assert not half_a & half_b
    record = calibrate_only(trained_copy, max_risk=0.1)
    for name in MODELS:
        model = load_model(RunDirectory.open(trained_copy), name)
        predictor = model.predictor(Engine.for_one("cpu"))
        a, b = (torch.tensor(sorted(half)) for half in (half_a, half_b))
        fitted, _ = fit_calibrator(
            "temperature", predictor.raw_draws(data.calibration, a), data.calibration.labels_N[a]
        )
        assert fitted.to_json() == record["models"][name]["calibrator"]
        [mean_BK] = predictor.probabilities_under(data.calibration, [fitted], b)
        threshold = fit_lac(mean_BK, data.calibration.labels_N[b].numpy(), 0.1)
        assert threshold.to_json() == record["models"][name]["threshold"]
        assert threshold.num_calibration == len(b)
        abstention = fit_abstention(mean_BK, data.calibration.labels_N[b].numpy(), 0.1)
        assert abstention.to_json() == record["models"][name]["abstention_threshold"]
