"""The workflow behind `bayesnet compare`: the test metrics of several runs side by side, and over their seeds.

The interval of a single run speaks of other test images; another training run moves a metric too. So runs whose
settings differ by ``training.seed`` alone form a group, with mean and spread, and the Bayesian model less its twin of
the same run, with a t interval over the seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from bayesnet.metrics import METRICS
from bayesnet.metrics.resampling import t_interval
from bayesnet.rundir import RunDirectory
from bayesnet.types import JsonObject
from bayesnet.workflows.calibrated import load_calibration
from bayesnet.workflows.trained import (
    EVALUATION,
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
        ``rows`` (run, data, model, family, seed, calibrated, metrics); ``same_test_split``: whether all runs have the
        same data and splits, without which their metrics cannot be compared; ``groups``, one for each model of two or
        more runs that differ by seed alone (data, model, family, calibrated, seeds, metrics and, for the Bayesian
        model, ``difference_to_twin``: each metric with ``mean``, ``sd`` and ``ci95``); ``notices``: what was left out
        of them.

    Raises:
        CheckpointError: A run is missing, unfinished or damaged.
    """
    rows: list[JsonObject] = []
    by_settings: dict[str, dict[int, list[JsonObject]]] = {}
    notices: list[str] = []
    fingerprints = set()
    for path in map(Path, runs):
        run = RunDirectory.open(path)
        summary = read_finished(run)
        fingerprints.add(summary["fingerprint"])
        found = _rows(run, summary)
        rows += found
        seeds = by_settings.setdefault(_all_but_the_seed(run, summary), {})
        if seeds.setdefault(found[0]["seed"], found) is not found:
            notices.append(f"{run.path} has the seed of another run: it is in no group")
    groups = [group for seeds in by_settings.values() if len(seeds) > 1 for group in _groups(seeds)]
    return {"rows": rows, "same_test_split": len(fingerprints) == 1, "groups": groups, "notices": notices}


def _all_but_the_seed(run: RunDirectory, summary: JsonObject) -> str:
    """Return what runs of one group share: the data's fingerprint, and all settings but the seed of training."""
    settings = read_settings(run).to_mapping()
    settings["training"].pop("seed")
    return json.dumps([summary["fingerprint"], settings], sort_keys=True)


def _groups(seeds: dict[int, list[JsonObject]]) -> list[JsonObject]:
    """Return one group for each model, before and after calibration, that every run has."""
    by_key = [{(row["model"], row["calibrated"]): row for row in rows} for rows in seeds.values()]
    groups = []
    for key in [key for key in by_key[0] if all(key in found for found in by_key)]:
        rows, twins = [found[key] for found in by_key], [found.get(("deterministic", key[1])) for found in by_key]
        group = {name: rows[0][name] for name in ("data", "model", "family", "calibrated")}
        group |= {
            "seeds": list(seeds),
            "metrics": {name: _over_seeds([_value(row, name) for row in rows]) for name in METRICS},
        }
        if key[0] == "bayesian":
            pairs = list(zip(rows, twins, strict=True))
            group["difference_to_twin"] = {
                name: _over_seeds([_value(row, name) - _value(twin, name) for row, twin in pairs]) for name in METRICS
            }
        groups.append(group)
    return groups


def _value(row: JsonObject | None, metric: str) -> float:
    """Return a metric of a row; NaN where there is no row or no value."""
    value = None if row is None else row["metrics"][metric]
    return math.nan if value is None else float(value)


def _over_seeds(values: Sequence[float]) -> JsonObject:
    """Return mean, standard deviation and the 95 % t interval of the mean over seeds; None where a value is missing."""
    if any(math.isnan(value) for value in values):
        return {"mean": None, "sd": None, "ci95": [None, None]}
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values), "ci95": list(t_interval(values))}


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
