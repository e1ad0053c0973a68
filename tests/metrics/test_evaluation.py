"""All metrics at once and paired differences: keys, edge cases, intervals."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from bayesnet import metrics
from bayesnet.errors import ConfigError
from bayesnet.metrics import METRICS, evaluate, paired_difference, wilson_interval
from tests.metrics.models import draw_labels, draw_model


@pytest.mark.parametrize(
    ("p", "y"),
    [
        ([[1.0]], [0]),  # one class
        ([[0.5, 0.5]], [1]),  # one example, tied classes: the first is predicted
        ([[0.9, 0.1]] * 4, [0] * 4),  # all right
        ([[0.9, 0.1]] * 4, [1] * 4),  # all wrong
        ([[0.2] * 5] * 7, [0, 1, 2, 3, 4, 0, 0]),  # all confidences tie
        (np.eye(3), [0, 1, 2]),  # exactly 0 and 1
    ],
)
def test_edge_cases_stay_json(p: list[list[float]], y: list[int]) -> None:
    found = evaluate(p, y, num_resamples=20)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, (low, high) in found["ci95"].items():
        assert (low is None) == (found[name] is None)
        assert low is None or 0 <= low <= found[name] <= high
    all_same = found["num_errors"] in (0, len(y))
    assert (found["auroc_error"] is None) == all_same


def test_evaluate_has_the_public_keys_and_is_reproducible() -> None:
    p = draw_model(200, 4, 11)
    y = draw_labels(p, 12)
    found = evaluate(p, y, num_resamples=100)
    counts = ["num_test", "ci95", "ece_null95", "ece_debiased", "num_errors", "num_infinite_nll"]
    parts = ["top5", "ece_classwise", "ece_smooth", "eaurc", "brier_decomposition"]
    assert list(found) == [*METRICS, *counts, *parts, "risk_at_coverage", "coverage_at_risk"]
    assert list(METRICS) == ["accuracy", "nll", "brier", "ece", "ace", "mce", "aurc", "auroc_error"]
    assert found["num_test"] == 200
    assert found["num_errors"] == round(200 * (1 - found["accuracy"]))
    assert found["ci95"]["accuracy"] == list(wilson_interval(200 - found["num_errors"], 200))
    for name, metric in METRICS.items():
        assert found[name] == metric.function(p, y)
        low, high = found["ci95"][name]
        assert low <= found[name] <= high
    assert found["top5"] is None
    for name in ("ece_classwise", "ece_smooth", "eaurc"):
        assert found[name] == getattr(metrics, name)(p, y)
    assert found["brier_decomposition"] == metrics.brier_decomposition(p, y)._asdict()
    assert found["risk_at_coverage"] == {f"{c}": metrics.risk_at_coverage(p, y, c) for c in (0.5, 0.8, 0.9, 0.95)}
    assert found["coverage_at_risk"] == {f"{r}": metrics.coverage_at_risk(p, y, r) for r in (0.01, 0.02, 0.05, 0.1)}
    assert evaluate(p, y, num_resamples=100) == found
    assert evaluate(p, y, num_resamples=100, seed=1)["ci95"]["nll"] != found["ci95"]["nll"]
    assert "ci90" in evaluate(p, y, num_resamples=20, level=0.9)
    band = metrics.ece_null_band(p, num_resamples=100)
    assert found["ece_null95"] == pytest.approx([band.low, band.high], abs=1e-15)
    assert band.low < band.mean < band.high


@pytest.mark.parametrize("name", ["nll", "brier", "accuracy"])
def test_paired_difference(name: str) -> None:
    a = draw_model(400, 4, 21)
    y = draw_labels(a, 22)
    b = 0.7 * a + 0.3 / 4
    function: Callable[..., float] = METRICS[name].function
    found = paired_difference(a, b, y, name)
    low, high = found["ci95"]
    assert found["difference"] == pytest.approx(function(a, y) - function(b, y), abs=1e-12)
    assert low <= found["difference"] <= high
    assert 0 < found["p_value"] <= 1
    mirrored = paired_difference(b, a, y, name)
    assert mirrored["ci95"] == pytest.approx([-high, -low], abs=1e-12)
    assert paired_difference(a, a, y, name) == {"difference": 0.0, "ci95": [0.0, 0.0], "p_value": 1.0}


def test_pairing_narrows_the_interval() -> None:
    a = draw_model(400, 4, 21)
    y = draw_labels(a, 22)
    low, high = paired_difference(a, 0.9 * a + 0.1 / 4, y, "nll")["ci95"]
    single_low, single_high = evaluate(a, y)["ci95"]["nll"]
    assert high - low < 0.3 * (single_high - single_low)


def test_paired_difference_of_infinite_nll_is_none() -> None:
    a, b = np.array([[1.0, 0.0], [0.5, 0.5]]), np.full((2, 2), 0.5)
    assert paired_difference(a, b, [1, 0], "nll") == {"difference": None, "ci95": [None, None], "p_value": None}
    assert paired_difference(a, b, [1, 0], "brier")["difference"] == pytest.approx(0.75, abs=1e-12)


EQUAL = [[0.5, 0.5], [0.25, 0.75]]


def test_paired_difference_needs_a_mean_over_examples() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown metric with a value per example \(ece\): .*Known: accuracy, nll, brier"
    ):
        paired_difference(EQUAL, EQUAL, [0, 1], "ece")
