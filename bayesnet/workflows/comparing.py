"""The workflow behind `bayesnet compare`: the test metrics of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bayesnet.rundir import RunDirectory
from bayesnet.types import JsonObject
from bayesnet.workflows.trained import (
    EVALUATION,
    load_calibration,
    load_model,
    read_finished,
    read_settings,
    trained_names,
)


def compare(runs: Sequence[str | Path]) -> JsonObject:
    """Return the metrics of every model of the runs, before and after calibration where `calibrate` has run.

    Args:
        runs: Finished run directories.

    Returns:
        ``rows`` (run, data, model, family, seed, calibrated, metrics) and ``same_test_split``: whether all runs have
        the same data and splits, without which their metrics cannot be compared.

    Raises:
        CheckpointError: A run is missing, unfinished or damaged.
    """
    rows: list[JsonObject] = []
    fingerprints = set()
    for path in map(Path, runs):
        run = RunDirectory.open(path)
        summary = read_finished(run)
        fingerprints.add(summary["fingerprint"])
        rows += _rows(run, summary)
    return {"rows": rows, "same_test_split": len(fingerprints) == 1}


def _rows(run: RunDirectory, summary: JsonObject) -> list[JsonObject]:
    """Return one row per model of a run, and one more per calibrated model."""
    seed = read_settings(run).training.seed
    rows: list[JsonObject] = []
    for name in trained_names(summary, run.path):
        record = summary["models"][name]
        head = {"run": str(run.path), "data": summary["data"]["name"], "model": name, "family": record["family"]}
        rows.append({**head, "seed": seed, "calibrated": False, "metrics": _metrics(record)})
        calibration = load_calibration(run, load_model(run, name))
        if calibration is not None:
            rows.append({**head, "seed": seed, "calibrated": True, "metrics": _metrics(calibration["after"])})
    return rows


def _metrics(record: JsonObject) -> JsonObject:
    """Return the metrics alone of what may also say how a model was fitted."""
    return {key: record[key] for key in EVALUATION}
