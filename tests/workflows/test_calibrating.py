"""`calibrate`: what it writes, and that others then use it."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayesnet
from bayesnet import metrics, workflows
from bayesnet.calibration import (
    CALIBRATORS,
    CONFORMAL,
    calibrator_from_json,
    prediction_sets,
)
from bayesnet.calibration import threshold_from_json as read_threshold
from bayesnet.data import ArrayExamples, DataConfig, ImageData, Preprocessing, load_data
from bayesnet.data.corruptions import CORRUPTIONS
from bayesnet.engine import Engine
from bayesnet.errors import BusyError, ConfigError, DataError
from bayesnet.plots import GRIDS
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.types import JsonObject
from bayesnet.workflows.calibrated import load_calibrated
from bayesnet.workflows.calibrating import calibrate
from bayesnet.workflows.predicting import predict
from bayesnet.workflows.trained import load_model, read_data, read_settings

Snapshot = Callable[[Path], dict[str, str]]

MODELS = ("deterministic", "bayesian")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, which takes longer than the rest; ``calibrated_run`` has real figures."""
    monkeypatch.setattr("bayesnet.plots.draw_figures", lambda record: {})
    monkeypatch.setattr("bayesnet.plots.draw_grids", lambda record, pixels: {})


def calibrate_only(run: Path, **arguments: Any) -> JsonObject:  # noqa: ANN401
    """Calibrate without corrupted and unfamiliar images."""
    return calibrate(run, devices="cpu", **{"ood": "none", "num_corrupted": 0, **arguments})


def test_what_calibrate_leaves(trained_run: Path, calibrated_run: Path, snapshot: Snapshot) -> None:
    drawn = ("reliability", "risk_coverage", "uncertainty", "severity", "training", "confusion", *GRIDS)
    new = {"calibration.json", "report.html", "plots", *(f"plots/{name}.png" for name in drawn)}
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
        # `train` and `calibrate` agree on the model as it was, digit for digit.
        assert model["before"].items() <= trained.items()
        assert model["after"]["num_test"] == 360
        assert 0 <= model["conformal"]["lac"]["coverage"] <= 1
    assert record["conformal"] == record["models"]["bayesian"]["conformal"]["lac"]
    assert record["sentence"] in html.unescape((calibrated_run / "report.html").read_text())
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
    assert calibrate(calibrated_copy, devices="cpu", num_corrupted=20)["models"] == first["models"]
    assert torch.equal(torch.get_rng_state(), state)
    wide = calibrate_only(calibrated_copy, alpha=0.01)["conformal"]
    assert wide["alpha"] == 0.01
    assert wide["mean_set_size"] > first["conformal"]["mean_set_size"]


def test_a_twin_alone_is_calibrated_too(folder_data: Path, tmp_path: Path) -> None:
    small = ("backbone.width=4", "training.batch_size=16")
    workflows.train(data=f"folder:{folder_data}", epochs=2, overrides=small, devices="cpu", out=tmp_path / "run")
    record = calibrate_only(tmp_path / "run")
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


def test_noisy_digits_have_errors_enough(noisy_run: Path) -> None:
    summary = json.loads((noisy_run / "summary.json").read_text())
    errors = [1 - model["accuracy"] for model in summary["models"].values()]
    assert 0.08 <= min(errors) <= max(errors) <= 0.25


@pytest.mark.parametrize("calibrator", list(CALIBRATORS))
def test_every_calibrator_is_stored_and_used(noisy_copy: Path, calibrator: str) -> None:
    """It lowers the NLL of overconfident models where it was fitted, and what is stored gives the same answers."""
    record = calibrate_only(noisy_copy, calibrator=calibrator)
    run = RunDirectory.open(noisy_copy)
    settings = read_settings(run)
    for name in MODELS:
        found = record["models"][name]
        assert found["calibrator"]["name"] in (calibrator, "identity")
        assert (found["temperature"] is None) == (found["calibrator"]["name"] not in ("identity", "temperature"))
        model = load_calibrated(run, name)
        predictor = model.trained.predictor(Engine.for_one("cpu"), calibrator=model.calibrator)
        data = read_data(run, settings, model.trained.preprocessing)
        assert metrics.evaluate(predictor.probabilities(data.test), data.test.labels_N.numpy()) == found["after"]


def test_a_bayesian_temperature_gives_the_twin_intervals(noisy_copy: Path) -> None:
    calibrate_only(noisy_copy, calibrator="bayesian_temperature")
    classifier = bayesnet.load(noisy_copy, model="deterministic", devices="cpu")
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    interval = classifier.predict_interval(images)
    assert (interval.upper_NK > interval.lower_NK).all()
    calibrate_only(noisy_copy)
    interval = bayesnet.load(noisy_copy, model="deterministic", devices="cpu").predict_interval(images)
    assert (interval.upper_NK == interval.lower_NK).all()


@pytest.mark.parametrize("sets", list(CONFORMAL))
def test_the_label_sets_that_were_chosen_are_those_that_predict_gives(noisy_copy: Path, sets: str) -> None:
    """Coverage on the test split, through `predict`'s own path, is the one that was recorded."""
    record = calibrate_only(noisy_copy, sets=sets, alpha=0.2)
    assert record["conformal"] == record["models"]["bayesian"]["conformal"][sets]
    assert list(record["models"]["bayesian"]["conformal"]) == list(CONFORMAL)
    run = RunDirectory.open(noisy_copy)
    trained = load_model(run, "bayesian")
    data = read_data(run, trained.settings, trained.preprocessing)
    classifier = bayesnet.load(noisy_copy, devices="cpu")
    found = classifier.predict_set([Path(data.test.name(index)) for index in range(len(data.test))])
    labels = [data.classes[label] for label in data.test.labels_N.tolist()]
    covered = [label in members for label, members in zip(labels, found, strict=True)]
    assert np.mean(covered) == pytest.approx(record["conformal"]["coverage"])


def test_abstention_is_stored_and_predicted(noisy_copy: Path) -> None:
    """The limit holds on the test split here, and `predict` abstains from exactly the images that the record counts."""
    record = calibrate_only(noisy_copy, max_risk=0.1)
    found = record["models"]["bayesian"]["abstention"]
    assert found["attained"]
    assert 0 < found["test"]["coverage"] < 1
    run = RunDirectory.open(noisy_copy)
    trained = load_model(run, "bayesian")
    data = read_data(run, trained.settings, trained.preprocessing)
    paths = [Path(data.test.name(index)) for index in range(len(data.test))]
    rows = predict(paths, run=noisy_copy, devices="cpu")["predictions"]
    assert sum(not row["abstain"] for row in rows) == found["test"]["num_kept"]
    labels = [data.classes[label] for label in data.test.labels_N.tolist()]
    wrong = sum(row["label"] != label for row, label in zip(rows, labels, strict=True) if not row["abstain"])
    assert wrong == found["test"]["num_errors"]


def test_a_risk_that_cannot_be_shown_abstains_from_all(noisy_copy: Path) -> None:
    record = calibrate_only(noisy_copy, max_risk=0.001)
    found = record["models"]["bayesian"]["abstention"]
    assert not found["attained"]
    assert "needs at least" in found["notice"]
    assert found["test"]["num_kept"] == 0
    assert bayesnet.load(noisy_copy, devices="cpu").predict_abstain(np.zeros((2, 8, 8), np.uint8)).all()


def test_the_verdict_compares_where_there_are_errors(noisy_copy: Path) -> None:
    sentence = calibrate_only(noisy_copy)["sentence"]
    assert sentence.startswith("After calibration, ")
    assert sentence.endswith("this holds for this pair of trained models only.")


def test_corrupted_and_unfamiliar_images_are_measured(calibrated_run: Path) -> None:
    record = json.loads((calibrated_run / "calibration.json").read_text())
    for name, model in record["models"].items():
        robustness = model["robustness"]
        assert robustness["num_images"] == 20
        assert list(robustness["corruptions"]) == list(CORRUPTIONS)
        assert [entry["severity"] for entry in robustness["mean"]] == [0, 1, 2, 3, 4, 5]
        worst = [entries[-1]["nll"] for entries in robustness["corruptions"].values()]
        assert robustness["mean"][5]["nll"] == pytest.approx(np.mean(worst))
        assert robustness["mean"][5]["nll"] > robustness["mean"][0]["nll"]
        assert list(model["unfamiliar"]) == ["photographs", "corrupted"]
        scores = model["unfamiliar"]["photographs"]["scores"]
        assert (scores["mutual_information"]["auroc"] is None) == (name == "deterministic")
        for found in model["unfamiliar"].values():  # crops of two photographs, images of the test split
            assert found["no_interval"]
            assert {tuple(each["auroc_ci95"]) for each in found["scores"].values()} == {(None, None)}
        assert [line["epoch"] for line in model["training"]] == [1, 2, 3]


def test_an_unfamiliar_folder_and_what_is_none(calibrated_copy: Path, folder_data: Path) -> None:
    record = calibrate_only(calibrated_copy, ood=f"folder:{folder_data}")
    [found] = record["models"]["bayesian"]["unfamiliar"].values()
    assert found["num_images"] > 0
    assert found["no_interval"] is None
    low, high = found["scores"]["feature_density"]["auroc_ci95"]
    assert low <= found["scores"]["feature_density"]["auroc"] <= high
    assert record["models"]["bayesian"]["robustness"] is None
    with pytest.raises(DataError, match="training data"):
        calibrate_only(calibrated_copy, ood="digits")
    with pytest.raises(ConfigError, match="unfamiliar set"):
        calibrate_only(calibrated_copy, ood="no/such/folder")


def test_options_that_are_no_options(calibrated_copy: Path, snapshot: Snapshot) -> None:
    before = snapshot(calibrated_copy)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"calibrator": "temprature"}, "did you mean 'temperature'"),
        ({"sets": "lace"}, "did you mean 'lac'"),
        ({"max_risk": 1.5}, "must lie between 0 and 1"),
        ({"num_corrupted": -1}, "must not be negative"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ConfigError, match=message):
            calibrate_only(calibrated_copy, **arguments)
    assert snapshot(calibrated_copy) == before


def test_a_calibration_split_of_one_image_is_refused(trained_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(run: RunDirectory, settings: Settings, preprocessing: Preprocessing, given: None) -> ImageData:
        data = read_data(run, settings, preprocessing)
        one = ArrayExamples(data.calibration.read([0]), data.calibration.labels_N[:1])
        return data._replace(calibration=one)

    monkeypatch.setattr("bayesnet.workflows.calibrating.read_data", read)
    with pytest.raises(DataError, match="the calibration split has fewer than 2 images"):
        calibrate_only(trained_copy)


def test_figures_of_an_earlier_calibration_do_not_stay(calibrated_copy: Path) -> None:
    assert (calibrated_copy / "plots" / "severity.png").exists()
    (calibrated_copy / "plots" / "mine.png").write_bytes(b"of the user")
    calibrate_only(calibrated_copy)
    assert [path.name for path in (calibrated_copy / "plots").iterdir()] == ["mine.png"]
