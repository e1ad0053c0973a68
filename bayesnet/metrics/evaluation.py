"""All metrics of a model at once with their intervals, and the difference of two models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bayesnet.metrics.calibration_errors import brier_decomposition, ece_classwise, ece_debiased
from bayesnet.metrics.checks import Array, Labels, checked
from bayesnet.metrics.counted import Scores, brier_each, correct_each, nll_each, value
from bayesnet.metrics.detection import auroc_interval
from bayesnet.metrics.resampling import (
    bootstrap_counts,
    bootstrap_values,
    calibration_interval,
    central,
    mean_intervals,
    null_values,
    wilson_interval,
)
from bayesnet.metrics.scalar import accuracy, ace, aurc, auroc_error, brier, ece, mce, nll, top5
from bayesnet.metrics.selective import coverage_at_risk_of, eaurc_of, risk_at_coverage_of, risk_curve
from bayesnet.metrics.significance import paired_p_value
from bayesnet.metrics.smooth import ece_smooth_of
from bayesnet.registry import Registry
from bayesnet.types import JsonObject

COVERAGES = (0.5, 0.8, 0.9, 0.95)
RISKS = (0.01, 0.02, 0.05, 0.1)
_CALIBRATION_ERRORS = ("ece", "ace", "mce")
_OWN_INTERVAL = {"accuracy", "auroc_error", "nll", "brier"}


class Metric(NamedTuple):
    """An entry of METRICS: ``function(probabilities_NK, labels_N)`` and one plain sentence on what it says."""

    name: str
    function: Callable[[ArrayLike, ArrayLike], float]
    higher_is_better: bool
    description: str


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        metric.name: metric
        for metric in (
            Metric("accuracy", accuracy, True, "Share of the test images whose most probable class is the right one."),
            Metric("nll", nll, False, "How surprised the model is by the right class; confident mistakes cost most."),
            Metric("brier", brier, False, "Squared distance between the stated probabilities and what was true."),
            Metric("ece", ece, False, "Average distance between stated confidence and the share that is right."),
            Metric("ace", ace, False, "As ECE, but over groups that all hold the same number of images."),
            Metric("mce", mce, False, "As ECE, but for the worst group alone, however few images it holds."),
            Metric(
                "aurc", aurc, False, "Error rate among the most confident answers, averaged over how many are kept."
            ),
            Metric("auroc_error", auroc_error, True, "Chance that a mistake was less confident than a right answer."),
        )
    },
)


def evaluate(
    probabilities: ArrayLike, labels: ArrayLike, *, seed: int = 0, num_resamples: int = 1000, level: float = 0.95
) -> JsonObject:
    """Return all metrics with their uncertainty, ready for JSON: a value that is not finite is None.

    The intervals are Wilson's for accuracy, `auroc_interval` for auroc_error, `mean_intervals` for nll and brier,
    `calibration_interval` for ece, ace and mce, and the percentile bootstrap over examples for aurc. Resamples where a
    metric is NaN are left out of its interval.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.
        seed: Seed of the bootstrap and of the null band.
        num_resamples: Number of resamples of each.
        level: Level of the intervals; their keys are named after it, ``ci95`` and ``ece_null95`` at 0.95.

    Returns:
        Each of METRICS by name; ``num_test``, ``ci95``, ``ece_null95``, ``ece_debiased``, ``num_errors``,
        ``num_infinite_nll``, ``top5`` (None for fewer than six classes), ``ece_classwise``, ``ece_smooth``, ``eaurc``,
        ``brier_decomposition``, ``risk_at_coverage`` and ``coverage_at_risk``.

    Raises:
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    scores = Scores.of(probabilities, labels)
    num_examples = len(scores.correct_N)
    num_correct = int(scores.correct_N.sum())
    values = {name: value(name, scores) for name in METRICS}
    null = null_values(scores, _CALIBRATION_ERRORS, num_resamples, seed)
    intervals = _intervals(scores, values, null, num_resamples, seed, level)
    intervals["accuracy"] = wilson_interval(num_correct, num_examples, level=level)
    intervals["auroc_error"] = _auroc_error_interval(scores, level)
    intervals |= mean_intervals({"nll": scores.nll_N, "brier": scores.brier_N}, level, num_resamples, seed)
    percent = f"{100 * level:g}"
    return {
        **{name: _json(number) for name, number in values.items()},
        "num_test": num_examples,
        f"ci{percent}": {name: [_json(low), _json(high)] for name, (low, high) in intervals.items()},
        f"ece_null{percent}": list(central(null["ece"], level)),
        "ece_debiased": ece_debiased(probabilities, labels),
        "num_errors": num_examples - num_correct,
        "num_infinite_nll": int(np.isinf(scores.nll_N).sum()),
        **_without_intervals(probabilities, labels, scores),
    }


def paired_difference(
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    labels: ArrayLike,
    metric: str,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> JsonObject:
    """Return metric(a) - metric(b) on the same examples, with its paired bootstrap interval and p-value.

    Args:
        probabilities_a: (N, K) of the first model.
        probabilities_b: (N, K) of the second.
        labels: (N,), integers in 0..K-1.
        metric: "accuracy", "nll" or "brier": a mean over examples.
        level: Level of the interval, which names its key: ``ci95`` at 0.95.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        ``{"difference": d, "ci95": [low, high], "p_value": p}``, p from `paired_p_value`; None throughout if the metric
        is nll and a label has probability 0.

    Raises:
        ConfigError: The metric is not one of the three.
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    values = _PER_EXAMPLE[metric]
    a_N, b_N = (values(*checked(probabilities, labels)) for probabilities in (probabilities_a, probabilities_b))
    key = f"ci{100 * level:g}"
    if np.isinf(a_N).any() or np.isinf(b_N).any():
        return {"difference": None, key: [None, None], "p_value": None}
    difference_N = a_N - b_N
    sums = [counts_RN @ difference_N for counts_RN in bootstrap_counts(len(a_N), num_resamples, seed)]
    interval = central(np.concatenate(sums) / len(a_N), level)
    p_value = paired_p_value(difference_N, seed=seed)
    return {"difference": float(difference_N.mean()), key: list(interval), "p_value": p_value}


_PER_EXAMPLE: Registry[Callable[[Array, Labels], Array]] = Registry(
    "metric with a value per example", {"accuracy": correct_each, "nll": nll_each, "brier": brier_each}
)


def _intervals(
    scores: Scores, values: dict[str, float], null: dict[str, Array], num_resamples: int, seed: int, level: float
) -> dict[str, tuple[float, float]]:
    """Return the bootstrap intervals of the metrics that have none of their own."""
    drawn = bootstrap_values(scores, values.keys() - _OWN_INTERVAL, num_resamples, seed)
    return {
        name: calibration_interval(values[name], values_R, null[name], level)
        if name in _CALIBRATION_ERRORS
        else central(values_R, level)
        for name, values_R in drawn.items()
    }


def _auroc_error_interval(scores: Scores, level: float) -> tuple[float, float]:
    """Return the interval of the chance that a mistake was less confident than a right answer."""
    wrong_N = scores.correct_N == 0
    return auroc_interval(-scores.confidence_N[wrong_N], -scores.confidence_N[~wrong_N], level=level)


def _without_intervals(probabilities: ArrayLike, labels: ArrayLike, scores: Scores) -> JsonObject:
    """Return what has no interval of its own."""
    risk_N = risk_curve(scores)
    return {
        "top5": _json(top5(probabilities, labels)),
        "ece_classwise": ece_classwise(probabilities, labels),
        "ece_smooth": ece_smooth_of(scores),
        "eaurc": eaurc_of(scores),
        "brier_decomposition": brier_decomposition(probabilities, labels)._asdict(),
        "risk_at_coverage": {f"{each:g}": risk_at_coverage_of(risk_N, each) for each in COVERAGES},
        "coverage_at_risk": {f"{each:g}": coverage_at_risk_of(risk_N, each) for each in RISKS},
    }


def _json(number: float) -> float | None:
    return number if math.isfinite(number) else None
