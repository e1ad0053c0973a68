"""One honest closing sentence on two calibrated models, or on one."""

from __future__ import annotations

from collections.abc import Mapping

from bayesnet.metrics import METRICS
from bayesnet.types import JsonObject

MIN_ERRORS = 10
LEVEL = 0.05
"""Largest probability, over test splits, of any false claim of a difference in one sentence."""

_TITLES = {"nll": "NLL", "brier": "Brier score", "accuracy": "accuracy"}
_MODELS = {"bayesian": "Bayesian", "deterministic": "deterministic"}


def verdict(after: Mapping[str, JsonObject], differences: Mapping[str, JsonObject]) -> str:
    """Return one sentence: which calibrated model is better, on which metrics, and where the data do not say.

    A difference counts only if its p-value, corrected for all that are looked at, is at most 5 % and its 95 % interval
    excludes 0. With fewer than ten test errors in either model the sentence says that there are too few to compare.

    Args:
        after: Metrics after calibration, as from `evaluate`, of "deterministic", "bayesian" or both.
        differences: `paired_difference` of "nll", "brier" and "accuracy", Bayesian minus deterministic, each with
            ``p_value_holm``; empty for one model.

    Raises:
        ValueError: No model, or a model of another name.
    """
    if not after or not set(after) <= set(_MODELS):
        raise ValueError(f"expected the metrics of {' and '.join(_MODELS)}; got {sorted(after)}")
    if len(after) == 1:
        [(name, metrics)] = after.items()
        return _single(name, metrics)
    errors = {name: after[name]["num_errors"] for name in _MODELS}
    if min(errors.values()) < MIN_ERRORS:
        return (
            f"Too few test errors to compare the two models: {errors['bayesian']} (Bayesian) and "
            f"{errors['deterministic']} (deterministic) of {after['bayesian']['num_test']} test images, "
            f"where at least {MIN_ERRORS} each are needed."
        )
    return (
        f"After calibration, {_comparison(after, differences)}; p corrected for {_number_tested(differences)} by "
        "Holm's method; this holds for this pair of trained models only."
    )


def _comparison(after: Mapping[str, JsonObject], differences: Mapping[str, JsonObject]) -> str:
    """Return what can be said on each metric, in clauses joined to one."""
    better: dict[str, list[str]] = {name: [] for name in _MODELS}
    undecided: list[str] = []
    infinite: list[str] = []
    for metric, title in _TITLES.items():
        difference, (low, high) = differences[metric]["difference"], differences[metric]["ci95"]
        if difference is None:
            infinite.append(title)
            continue
        p_value = differences[metric]["p_value_holm"]
        clause = (
            f"{title} ({_values(metric, after)}, difference {_ends(metric, low, high)} at 95 %, {_p_value(p_value)})"
        )
        if p_value > LEVEL or low <= 0 <= high:
            undecided.append(clause)
        else:
            bayesian = (difference > 0) == METRICS[metric].higher_is_better
            better["bayesian" if bayesian else "deterministic"].append(clause)
    clauses = [f"the {_MODELS[name]} model is better on {_join(found)}" for name, found in better.items() if found]
    if undecided:
        start = "no difference is established" if clauses else "neither model is shown to be better"
        clauses.append(f"{start} on {_join(undecided)}")
    if infinite:
        clauses.append(f"{_join(infinite)} cannot be compared as a test label was given probability 0")
    return "; ".join(clauses)


def _single(name: str, metrics: JsonObject) -> str:
    """Return the sentence on a model that has no twin."""
    low, high = metrics["ci95"]["accuracy"]
    null_low, null_high = metrics["ece_null95"]
    place = "above" if metrics["ece"] > null_high else "below" if metrics["ece"] < null_low else "within"
    return (
        f"After calibration, the {_MODELS[name]} model is right on {metrics['accuracy']:.1%} of {metrics['num_test']} "
        f"test images (95 % interval {low:.1%} to {high:.1%}) and its ECE of {metrics['ece']:.3f} is {place} the range "
        f"that a perfectly calibrated model would show, {null_low:.3f} to {null_high:.3f}; this holds for this trained "
        "model only."
    )


def _values(metric: str, after: Mapping[str, JsonObject]) -> str:
    return ", ".join(f"{title} {_number(metric, after[name][metric])}" for name, title in _MODELS.items())


def _ends(metric: str, low: float, high: float) -> str:
    return f"{_number(metric, low, sign='+')} to {_number(metric, high, sign='+')}"


def _number(metric: str, value: float, *, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if metric == "accuracy" else f"{value:{sign}.4f}"


def _p_value(value: float) -> str:
    """Return it with three decimals; never a significant one that looks like 0, nor 0.050 for one above."""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if f"{value:.3f}" != "0.050" or value <= LEVEL else "p > 0.050"


def _number_tested(differences: Mapping[str, JsonObject]) -> str:
    number = sum(each["difference"] is not None for each in differences.values())
    return f"{number} comparisons" if number > 1 else "one comparison"


def _join(parts: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
