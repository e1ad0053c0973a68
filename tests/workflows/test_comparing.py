"""`compare`: every model of every run, and whether the runs were tested on the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bayesnet import workflows
from bayesnet.errors import CheckpointError
from bayesnet.workflows import compare


def test_rows(trained_run: Path, calibrated_run: Path) -> None:
    record = compare([trained_run, calibrated_run])
    heads = [(row["run"], row["model"], row["family"], row["calibrated"]) for row in record["rows"]]
    assert heads == [
        (str(trained_run), "deterministic", "deterministic", False),
        (str(trained_run), "bayesian", "mean_field", False),
        (str(calibrated_run), "deterministic", "deterministic", False),
        (str(calibrated_run), "deterministic", "deterministic", True),
        (str(calibrated_run), "bayesian", "mean_field", False),
        (str(calibrated_run), "bayesian", "mean_field", True),
    ]
    assert {(row["data"], row["seed"]) for row in record["rows"]} == {("digits", 0)}
    assert record["same_test_split"] is True
    summary = json.loads((trained_run / "summary.json").read_text())
    after = json.loads((calibrated_run / "calibration.json").read_text())["models"]["bayesian"]["after"]
    assert record["rows"][1]["metrics"].items() <= summary["models"]["bayesian"].items()
    assert record["rows"][5]["metrics"].items() <= after.items()
    assert {tuple(row["metrics"]) for row in record["rows"]} == {tuple(record["rows"][0]["metrics"])}


def test_other_images_are_noticed(trained_run: Path, folder_data: Path, tmp_path: Path) -> None:
    small = ("backbone.width=4", "training.batch_size=16")
    for seed in (0, 1):
        overrides = (*small, f"data.seed={seed}")
        out = tmp_path / str(seed)
        workflows.train(data=f"folder:{folder_data}", epochs=1, overrides=overrides, devices="cpu", out=out)
    assert compare([trained_run, tmp_path / "0"])["same_test_split"] is False
    assert compare([tmp_path / "0", tmp_path / "1"])["same_test_split"] is False
    assert compare([tmp_path / "0", tmp_path / "0"])["same_test_split"] is True


def test_an_unfinished_run_is_refused(trained_copy: Path) -> None:
    (trained_copy / "summary.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        compare([trained_copy])
    line = f"the run is not finished ({trained_copy}): finish it with `bayesnet train --resume {trained_copy}`"
    assert str(caught.value) == line
