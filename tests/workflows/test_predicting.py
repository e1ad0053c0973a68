"""`predict`: the numbers of the evaluation, whatever the companions, and intervals that hold the probability."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesnet.calibration import prediction_sets, threshold_from_json
from bayesnet.data import DataConfig, load_data
from bayesnet.data.images import write_png
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError, ConfigError, DataError
from bayesnet.predictive import interval_kind, summarize
from bayesnet.rundir import RunDirectory
from bayesnet.workflows import ImageClassifier, predict
from bayesnet.workflows.calibrated import load_calibration, record_calibrator
from bayesnet.workflows.trained import load_model

Row = dict[str, Any]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give the first 70 images of the digits' test split as files: two full chunks of 32, and 6 more."""
    folder, data = tmp_path_factory.mktemp("images"), load_data(DataConfig())
    paths = [folder / f"{index:03d}.png" for index in range(70)]
    for index, path in enumerate(paths):
        write_png(path, data.test.read([index])[0])
    return paths


def rows(run: Path, paths: Sequence[Path], **arguments: Any) -> list[Row]:  # noqa: ANN401 - what predict takes
    found: list[Row] = predict(paths, run=run, devices="cpu", **arguments)["predictions"]
    return found


def numbers(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "path"}


@pytest.mark.parametrize("name", ["deterministic", "bayesian"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_files_get_the_probabilities_of_the_evaluation(
    trained_run: Path, calibrated_run: Path, images: list[Path], name: str, calibrated: bool
) -> None:
    """The same image through a file and through the data set: equal in every bit."""
    path = calibrated_run if calibrated else trained_run
    run, data = RunDirectory.open(path), load_data(DataConfig())
    model = load_model(run, name)
    record = load_calibration(run, model)
    calibrator = None if record is None else record_calibrator(run, record)
    predictor = model.predictor(Engine.for_one("cpu"), calibrator=calibrator)
    expected_NK = predictor.probabilities(data.test)[:70]
    found = [[entry["probability"] for entry in row["classes"]] for row in rows(path, images, model=name)]
    assert np.array_equal(np.array(found), expected_NK)


def test_an_image_does_not_depend_on_its_companions(calibrated_run: Path, images: list[Path]) -> None:
    """In any order, alone, twice, or with others: every number of a row has the same bits."""
    expected = {row["path"]: numbers(row) for row in rows(calibrated_run, images)}
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).tolist()
    for chosen in (order, order[:33], [5], [5] * 40, [7, 5], list(range(69, -1, -1))):
        for row in rows(calibrated_run, [images[index] for index in chosen]):
            assert numbers(row) == expected[row["path"]]


def test_rows(calibrated_run: Path, images: list[Path]) -> None:
    record = predict(images, run=calibrated_run, devices="cpu")
    assert (record["run"], record["model"], record["calibrated"]) == (str(calibrated_run), "bayesian", True)
    assert record["skipped"] == []
    assert [row["path"] for row in record["predictions"]] == [str(path) for path in images]
    widened = 0
    for row in record["predictions"]:
        classes = row["classes"]
        assert [entry["name"] for entry in classes] == [str(digit) for digit in range(10)]
        assert sum(entry["probability"] for entry in classes) == pytest.approx(1)
        assert all(0 <= entry["lower"] <= entry["probability"] <= entry["upper"] <= 1 for entry in classes)
        top = max(classes, key=lambda entry: entry["probability"])
        assert (row["label"], row["probability"]) == (top["name"], top["probability"])
        assert (row["lower"], row["upper"]) == (top["lower"], top["upper"])
        probability_K = np.array([entry["probability"] for entry in classes])
        assert row["entropy"] == pytest.approx(-(probability_K * np.log(probability_K)).sum())
        assert 0 <= row["mutual_information"] <= row["entropy"] <= math.log(10) + 1e-12
        assert row["mutual_information"] > 1e-6
        assert row["upper"] - row["lower"] > 1e-3
        widened += top["probability"] in (top["lower"], top["upper"])
    interval = record["interval"]
    assert interval == {"level": 0.9, "kind": "equal-tailed, contains mean", "samples": 256, "widened": widened / 70}


def test_sets_are_those_of_the_threshold(trained_run: Path, calibrated_run: Path, images: list[Path]) -> None:
    assert {row["set"] for row in rows(trained_run, images)} == {None}
    threshold = threshold_from_json(
        RunDirectory.open(calibrated_run).read_json("calibration.json")["models"]["bayesian"]["threshold"]
    )
    for row in rows(calibrated_run, images):
        probability_K = np.array([entry["probability"] for entry in row["classes"]])
        members = prediction_sets(probability_K[None], threshold)[0]
        assert row["set"] == [entry["name"] for entry, inside in zip(row["classes"], members, strict=True) if inside]
        assert row["abstain"] is None


def test_levels_are_nested(calibrated_run: Path, images: list[Path]) -> None:
    narrow, wide = (rows(calibrated_run, images, interval=level) for level in (0.5, 0.95))
    for inner, outer in zip(narrow, wide, strict=True):
        assert outer["lower"] <= inner["lower"] <= inner["upper"] <= outer["upper"]
        assert inner["probability"] == outer["probability"]


def test_fewer_draws(calibrated_run: Path, images: list[Path]) -> None:
    record = predict(images[:3], run=calibrated_run, samples=8, devices="cpu")
    assert record["interval"]["samples"] == 8
    assert record["interval"]["kind"] == interval_kind(8, 0.9) == "range of 8 draws"
    assert record["predictions"][0]["probability"] != rows(calibrated_run, images[:3])[0]["probability"]


def test_the_twin_has_one_draw(calibrated_run: Path, images: list[Path]) -> None:
    record = predict(images, run=calibrated_run, model="deterministic", samples=64, devices="cpu")
    interval = {"level": 0.9, "kind": "range of 1 draw", "samples": 1, "widened": 0.0}
    assert (record["model"], record["interval"]) == ("deterministic", interval)
    for row in record["predictions"]:
        assert row["lower"] == row["probability"] == row["upper"]
        assert row["mutual_information"] == 0


def test_the_summary_is_that_of_the_draws(calibrated_run: Path, images: list[Path]) -> None:
    classifier = ImageClassifier(calibrated_run, level=0.8, devices="cpu")
    data = load_data(DataConfig())
    draws_SBK = classifier.predictor.log_probabilities(data.test.read(range(32)))
    summary = summarize(draws_SBK, 0.8)
    for index, row in enumerate(classifier.rows(images[:32])):
        assert row["entropy"] == summary.entropy_B[index]
        assert [entry["upper"] for entry in row["classes"]] == summary.upper_BK[index].tolist()
        quantile_K = draws_SBK[:, index].exp().quantile(0.9, 0)
        assert all(
            entry["upper"] == pytest.approx(max(float(quantile), entry["probability"]))
            for entry, quantile in zip(row["classes"], quantile_K, strict=True)
        )


def test_rows_are_given_as_they_come(calibrated_run: Path, images: list[Path]) -> None:
    """A chunk at a time and one ahead, so that a folder of any size can be streamed."""
    classifier = ImageClassifier(calibrated_run, devices="cpu")
    asked: list[Path] = []

    def paths() -> Any:  # noqa: ANN401 - a generator
        for path in images:
            asked.append(path)
            yield path

    stream = classifier.rows(paths())
    assert next(stream)["path"] == str(images[0])
    assert len(asked) == 64
    assert len(list(stream)) == 69


def test_what_cannot_be_read_is_skipped(calibrated_run: Path, images: list[Path], tmp_path: Path) -> None:
    shutil.copy(images[3], tmp_path / "b.png")
    for name, content in (("a.png", b""), ("c.png", images[3].read_bytes()[:60])):
        (tmp_path / name).write_bytes(content)
    record = predict([tmp_path], run=calibrated_run, devices="cpu")
    assert [Path(entry["path"]).name for entry in record["skipped"]] == ["a.png", "c.png"]
    assert all(str(tmp_path) in entry["reason"] for entry in record["skipped"])
    [row] = record["predictions"]
    assert numbers(row) == numbers(rows(calibrated_run, [images[3]])[0])
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError) as caught:
        predict([tmp_path], run=calibrated_run, devices="cpu")
    reason = f"cannot read the image ({tmp_path / 'a.png'}): the file is empty"
    assert str(caught.value) == f"no image could be read: {reason}; and 1 more"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"interval": 0.0}, "must lie between 0 and 1 (interval = 0.0)"),
        ({"samples": 0}, "must be a power of two from 1 to 256 (samples = 0)"),
        ({"samples": 100}, "must be a power of two from 1 to 256 (samples = 100)"),
        ({"model": "twin"}, "the run has no such model, it has deterministic, bayesian (twin)"),
    ],
)
def test_what_is_refused(calibrated_run: Path, images: list[Path], arguments: Row, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows(calibrated_run, images[:1], **arguments)
    assert str(caught.value) == what


def test_the_newest_finished_run_is_taken(
    calibrated_copy: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no finished run"):
        predict(images[:1], devices="cpu")
    (tmp_path / "runs").mkdir()
    calibrated_copy.rename(tmp_path / "runs" / "one")
    assert predict(images[:1], devices="cpu")["run"] == "runs/one"
