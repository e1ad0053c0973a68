"""`calibrate`: the order of what is read, what it writes, and that others then use it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesnet import metrics, workflows
from bayesnet.calibration import CALIBRATORS, CalibratorFamily, calibrator_from_json, fit_lac, prediction_sets
from bayesnet.calibration import threshold_from_json as read_threshold
from bayesnet.data import ArrayExamples, DataConfig, Examples, ImageData, Preprocessing, load_data
from bayesnet.data.splits import halves
from bayesnet.engine import Engine
from bayesnet.errors import BusyError, ConfigError, DataError
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.workflows.calibrating import calibrate, fit_temperature
from bayesnet.workflows.trained import load_model, read_data

Snapshot = Callable[[Path], dict[str, str]]

MODELS = ("deterministic", "bayesian")


@pytest.fixture(autouse=True)
def no_diagram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, which takes longer than the rest; ``calibrated_run`` has a real diagram."""
    monkeypatch.setattr("bayesnet.plots.reliability_diagram", lambda panels: b"no diagram")


class Logged(Examples):
    """A split that logs when it is read, and can refuse it.

    Args:
        name: Of the split.
        examples: The split.
        log: Where reading is noted.
        needed: How many thresholds must be fitted before.
    """

    def __init__(self, name: str, examples: Examples, log: list[str], needed: int) -> None:
        self.split, self.examples, self.log, self.needed = name, examples, log, needed
        self.labels_N = examples.labels_N

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pixels."""
        assert self.log.count("threshold") >= self.needed, f"{self.split} read too early"
        self.log.append(self.split)
        return self.examples.read(indices)

    def name(self, index: int) -> str:
        """Return the name."""
        return self.examples.name(index)

    def verify(self) -> None:
        """Allow looking."""


def watch(monkeypatch: pytest.MonkeyPatch, *, swapped: bool = False) -> list[str]:
    """Log what is read and fitted; train and validation must not be read at all, test after both thresholds."""
    log: list[str] = []

    def read(run: RunDirectory, settings: Settings, preprocessing: Preprocessing, given: None) -> ImageData:
        data = read_data(run, settings, preprocessing)
        calibration, test = (data.test, data.calibration) if swapped else (data.calibration, data.test)
        return data._replace(
            train=Logged("train", data.train, log, 99),
            validation=Logged("validation", data.validation, log, 99),
            calibration=Logged("test" if swapped else "calibration", calibration, log, 2 if swapped else 0),
            test=Logged("test", test, log, 2),
        )

    def fit_threshold(*args: object) -> object:
        log.append("threshold")
        return fit_lac(*args)  # type: ignore[arg-type]

    def fit_calibrator(draws_SNK: Tensor, labels_N: Tensor) -> object:
        log.append("calibrator")
        return family.fit(draws_SNK, labels_N)

    family = CALIBRATORS["temperature"]
    watched = {"temperature": CalibratorFamily(family.name, fit_calibrator, family.from_json)}  # type: ignore[arg-type]
    monkeypatch.setattr("bayesnet.workflows.calibrating.read_data", read)
    monkeypatch.setattr("bayesnet.workflows.calibrating.fit_lac", fit_threshold)
    monkeypatch.setattr("bayesnet.workflows.calibrating.CALIBRATORS", watched)
    return log


def shortened(log: list[str]) -> list[str]:
    return [each for index, each in enumerate(log) if index == 0 or log[index - 1] != each]


def test_the_test_split_is_read_when_everything_is_frozen(trained_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = watch(monkeypatch)
    calibrate(trained_copy, devices="cpu")
    one = ["calibration", "calibrator", "calibration", "threshold"]  # half A, then half B
    assert shortened(log) == [*one, *one, "test"]
    assert log.count("test") == 2 * 12  # 360 images in chunks of 32, once for each model


def test_calibrating_on_the_test_split_is_noticed(trained_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    watch(monkeypatch, swapped=True)
    with pytest.raises(AssertionError, match="test read too early"):
        calibrate(trained_copy, devices="cpu")


def test_calibrator_and_threshold_see_different_halves(trained_copy: Path) -> None:
    data = load_data(DataConfig())
    half_a, half_b = (set(half.tolist()) for half in halves(data.calibration.labels_N, 0))
    assert half_a | half_b == set(range(179))
    assert not half_a & half_b
    record = calibrate(trained_copy, devices="cpu")
    for name in MODELS:
        model = load_model(RunDirectory.open(trained_copy), name)
        predictor = model.predictor(Engine.for_one("cpu"))
        a, b = (torch.tensor(sorted(half)) for half in (half_a, half_b))
        fitted, _ = fit_temperature(predictor.raw_draws(data.calibration, a), data.calibration.labels_N[a])
        assert fitted.to_json() == record["models"][name]["calibrator"]
        [mean_BK] = predictor.probabilities_under(data.calibration, [fitted], b)
        threshold = fit_lac(mean_BK, data.calibration.labels_N[b].numpy(), 0.1)
        assert threshold.to_json() == record["models"][name]["threshold"]
        assert threshold.num_calibration == len(b)


def test_what_calibrate_leaves(trained_run: Path, calibrated_run: Path, snapshot: Snapshot) -> None:
    new = {"calibration.json", "report.html", "plots", "plots/reliability.png"}
    before, after = snapshot(trained_run), snapshot(calibrated_run)
    assert after.keys() - before.keys() == new
    assert before.items() <= after.items()
    record = json.loads((calibrated_run / "calibration.json").read_text())
    summary = json.loads((calibrated_run / "summary.json").read_text())
    assert list(record["models"]) == list(MODELS)
    for name in MODELS:
        model, trained = record["models"][name], summary["models"][name]
        assert model["digest"] == trained["digest"]
        assert model["temperature"] == model["calibrator"].get("temperature", 1.0)
        refused = (model["notice"] or "").startswith("no temperature is applied")
        assert refused == (model["calibrator"]["name"] == "identity")
        assert model["notice"] is None or refused or "at the bound of its range" in model["notice"]
        # `train` and `calibrate` agree on the model as it was, digit for digit.
        assert model["before"].items() <= trained.items()
        assert model["after"]["num_test"] == 360
        assert 0 <= model["conformal"]["lac"]["coverage"] <= 1
    assert record["conformal"] == record["models"]["bayesian"]["conformal"]["lac"]
    assert record["sentence"] in (calibrated_run / "report.html").read_text()
    assert record["run"] == str(calibrated_run)
    assert record["report"] == str(calibrated_run / "report.html")
    for metric in ("nll", "brier", "accuracy"):
        difference = record["models"]["bayesian"]["after"][metric] - record["models"]["deterministic"]["after"][metric]
        assert record["differences"][metric]["difference"] == pytest.approx(difference)


def test_what_it_says_can_be_computed_again(calibrated_run: Path) -> None:
    """Metrics after, coverage and set size follow from the stored calibrator and threshold."""
    run, data = RunDirectory.open(calibrated_run), load_data(DataConfig())
    labels_N = data.test.labels_N.numpy()
    for name, record in run.read_json("calibration.json")["models"].items():
        calibrator = calibrator_from_json(record["calibrator"])
        predictor = load_model(run, name).predictor(Engine.for_one("cpu"), calibrator=calibrator)
        probabilities_NK = predictor.probabilities(data.test)
        assert metrics.evaluate(probabilities_NK, labels_N) == record["after"]
        sets_NK = prediction_sets(probabilities_NK, read_threshold(record["threshold"]))
        conformal = record["conformal"]["lac"]
        assert conformal["coverage"] == np.mean(sets_NK[np.arange(360), labels_N])
        assert conformal["mean_set_size"] == sets_NK.sum(1).mean()


def test_calibrating_again_gives_the_same(calibrated_copy: Path) -> None:
    first = json.loads((calibrated_copy / "calibration.json").read_text())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert calibrate(calibrated_copy, devices="cpu")["models"] == first["models"]
    assert torch.equal(torch.get_rng_state(), state)
    wide = calibrate(calibrated_copy, alpha=0.01, devices="cpu")["conformal"]
    assert wide["alpha"] == 0.01
    assert wide["mean_set_size"] > first["conformal"]["mean_set_size"]


def test_a_twin_alone_is_calibrated_too(folder_data: Path, tmp_path: Path) -> None:
    small = ("backbone.width=4", "training.batch_size=16")
    workflows.train(data=f"folder:{folder_data}", epochs=2, overrides=small, devices="cpu", out=tmp_path / "run")
    record = calibrate(tmp_path / "run", devices="cpu")
    assert list(record["models"]) == ["deterministic"]
    assert record["differences"] == {}
    assert record["conformal"] == record["models"]["deterministic"]["conformal"]["lac"]
    assert "deterministic model" in record["sentence"]


def test_what_is_refused(calibrated_copy: Path, snapshot: Snapshot) -> None:
    before = snapshot(calibrated_copy)
    with pytest.raises(ConfigError, match=r"must lie between 0 and 1 \(alpha = 1\)"):
        calibrate(calibrated_copy, alpha=1)
    with (
        RunDirectory.open(calibrated_copy).lock(),
        pytest.raises(BusyError, match="run directory is in use by process"),
    ):
        calibrate(calibrated_copy)
    assert snapshot(calibrated_copy) == before


def draws(margin_N: list[float]) -> tuple[Tensor, Tensor]:
    """Return one draw of log-probabilities (1, N, 2) and labels (N,): a negative margin is an error."""
    logits_NK = torch.tensor([[margin, 0.0] for margin in margin_N])
    return logits_NK.log_softmax(-1)[None], torch.zeros(len(margin_N), dtype=torch.int64)


def test_images_without_an_error_cannot_tell_a_temperature() -> None:
    calibrator, notice = fit_temperature(*draws([1.0, 2.0, 3.0, 0.5]))
    assert calibrator.to_json() == {"name": "identity"}
    assert notice == "no temperature is applied: 4 images of half A with 0 errors cannot tell one"


def test_images_with_errors_tell_a_temperature() -> None:
    """Margins of 8 with one error in ten are overconfident: the best T for p = .9 is 8 / log 9."""
    calibrator, notice = fit_temperature(*draws([8.0] * 9 + [-8.0]))
    assert notice is None
    assert calibrator.to_json()["temperature"] == pytest.approx(8 / math.log(9), rel=1e-4)


def test_a_calibration_split_of_one_image_is_refused(trained_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(run: RunDirectory, settings: Settings, preprocessing: Preprocessing, given: None) -> ImageData:
        data = read_data(run, settings, preprocessing)
        one = ArrayExamples(data.calibration.read([0]), data.calibration.labels_N[:1])
        return data._replace(calibration=one)

    monkeypatch.setattr("bayesnet.workflows.calibrating.read_data", read)
    with pytest.raises(DataError, match="the calibration split has fewer than 2 images"):
        calibrate(trained_copy, devices="cpu")
