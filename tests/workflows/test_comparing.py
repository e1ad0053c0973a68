"""`compare`: every model of every run, and whether the runs were tested on the same images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student_t

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


def copy_with_seed(run: Path, out: Path, seed: int, nll: dict[str, float]) -> Path:
    """Return a run that differs by its seed, and by the NLL that its summary says."""
    shutil.copytree(run, out)
    config = (out / "config.toml").read_text()
    (out / "config.toml").write_text(re.sub(r"(?s)(\[training\].*?seed = )0", rf"\g<1>{seed}", config))
    summary = json.loads((out / "summary.json").read_text())
    for name, value in nll.items():
        summary["models"][name]["nll"] = value
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def test_runs_that_differ_by_seed_are_grouped(trained_run: Path, tmp_path: Path) -> None:
    pairs = [(0.2, 0.1), (0.3, 0.1), (0.1, 0.3)]
    runs = [
        copy_with_seed(trained_run, tmp_path / str(seed), seed, {"deterministic": twin, "bayesian": bayesian})
        for seed, (twin, bayesian) in enumerate(pairs)
    ]
    record = compare([*runs, runs[0]])
    twin, bayesian = record["groups"]
    assert [twin["model"], bayesian["model"], bayesian["seeds"]] == ["deterministic", "bayesian", [0, 1, 2]]
    assert "difference_to_twin" not in twin
    assert twin["metrics"]["nll"]["mean"] == pytest.approx(0.2)
    assert twin["metrics"]["nll"]["sd"] == pytest.approx(0.1)
    differences = [-0.1, -0.2, 0.2]
    interval = student_t.interval(0.95, 2, np.mean(differences), np.std(differences, ddof=1) / np.sqrt(3))
    assert bayesian["difference_to_twin"]["nll"]["ci95"] == pytest.approx(interval)
    assert record["notices"] == [f"{runs[0]} has the seed of another run: it is in no group"]


def test_other_settings_are_another_group(trained_run: Path, tmp_path: Path) -> None:
    other = copy_with_seed(trained_run, tmp_path / "other", 1, {})
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(re.sub(r"batch_size = \d+", "batch_size = 7", text))
    assert compare([trained_run, other])["groups"] == []


def test_an_unfinished_run_is_refused(trained_copy: Path) -> None:
    (trained_copy / "summary.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        compare([trained_copy])
    line = f"the run is not finished ({trained_copy}): finish it with `bayesnet train --resume {trained_copy}`"
    assert str(caught.value) == line
