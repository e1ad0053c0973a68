"""The closing sentence says what the numbers say, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from bayesnet.calibration import verdict


def metrics(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    base = {
        "accuracy": 0.9,
        "nll": 0.3,
        "brier": 0.15,
        "ece": 0.02,
        "num_test": 1000,
        "num_errors": 100,
        "ci95": {"accuracy": [0.88, 0.917]},
        "ece_null95": [0.01, 0.03],
    }
    return base | changes


def difference(value: float, half: float) -> dict[str, Any]:
    p_value = 0.0004 if abs(value) > half else 0.3
    return {"difference": value, "ci95": [value - half, value + half], "p_value": p_value, "p_value_holm": p_value}


AFTER = {"deterministic": metrics(nll=0.34, accuracy=0.89), "bayesian": metrics()}


def test_better_on_one_metric_only() -> None:
    differences = {"nll": difference(-0.04, 0.01), "brier": difference(0, 0.01), "accuracy": difference(0.01, 0.02)}
    assert verdict(AFTER, differences) == (
        "After calibration, the Bayesian model is better on NLL (Bayesian 0.3000, deterministic 0.3400, difference "
        "-0.0500 to -0.0300 at 95 %, p < 0.001); no difference is established on Brier score (Bayesian 0.1500, "
        "deterministic 0.1500, difference -0.0100 to +0.0100 at 95 %, p = 0.300) and accuracy (Bayesian 90.0%, "
        "deterministic 89.0%, difference -1.0% to +3.0% at 95 %, p = 0.300); p corrected for 3 comparisons by Holm's "
        "method; this holds for this pair of trained models only."
    )


def test_higher_accuracy_but_lower_nll_is_better() -> None:
    up = {"nll": difference(0.2, 0.1), "brier": difference(0.2, 0.1), "accuracy": difference(0.2, 0.1)}
    sentence = verdict(AFTER, up)
    assert "the Bayesian model is better on accuracy (" in sentence
    assert "the deterministic model is better on NLL (" in sentence
    assert sentence.index("deterministic model is better") < sentence.index("Brier score (")


def test_nothing_beyond_the_interval() -> None:
    none = {name: difference(0.001, 0.01) for name in ("nll", "brier", "accuracy")}
    sentence = verdict(AFTER, none)
    assert sentence.startswith("After calibration, neither model is shown to be better on NLL (")
    assert "is better on" not in sentence


def test_infinite_nll_is_not_compared() -> None:
    differences = {name: difference(0.001, 0.01) for name in ("brier", "accuracy")}
    differences["nll"] = {"difference": None, "ci95": [None, None], "p_value": None, "p_value_holm": None}
    after = {"deterministic": metrics(nll=None), "bayesian": metrics()}
    assert "; NLL cannot be compared as a test label was given probability 0; p corrected for 2" in verdict(
        after, differences
    )


def test_an_interval_that_excludes_0_is_not_enough() -> None:
    """Four images against none: the bootstrap's interval excludes 0, the exact p-value is .125."""
    clear = {name: difference(0.2, 0.1) for name in ("nll", "brier", "accuracy")}
    clear["accuracy"] |= {"p_value_holm": 0.125}
    sentence = verdict(AFTER, clear)
    assert "no difference is established on accuracy (" in sentence
    assert "p = 0.125" in sentence


@pytest.mark.parametrize(("value", "shown"), [(0.0502, "p > 0.050"), (0.0498, "p = 0.050"), (0.0004, "p < 0.001")])
def test_a_p_value_reads_as_it_counts(value: float, shown: str) -> None:
    found = {name: difference(0.2, 0.1) | {"p_value_holm": value} for name in ("nll", "brier", "accuracy")}
    sentence = verdict(AFTER, found)
    assert sentence.count(shown) == 3
    assert ("is better on" in sentence) == (value <= 0.05)


@pytest.mark.parametrize("few", ["deterministic", "bayesian"])
def test_fewer_than_ten_errors_is_too_few(few: str) -> None:
    clear = {name: difference(0.2, 0.1) for name in ("nll", "brier", "accuracy")}
    after = AFTER | {few: metrics(num_errors=9)}
    sentence = verdict(after, clear)
    assert sentence.startswith("Too few test errors to compare the two models: ")
    assert sentence.endswith("of 1000 test images, where at least 10 each are needed.")
    assert "Too few" not in verdict(AFTER | {few: metrics(num_errors=10)}, clear)


@pytest.mark.parametrize(("ece", "place"), [(0.005, "below"), (0.02, "within"), (0.04, "above")])
def test_a_single_model(ece: float, place: str) -> None:
    assert verdict({"deterministic": metrics(ece=ece)}, {}) == (
        "After calibration, the deterministic model is right on 90.0% of 1000 test images (95 % interval 88.0% to "
        f"91.7%) and its ECE of {ece:.3f} is {place} the range that a perfectly calibrated model would show, 0.010 to "
        "0.030; this holds for this trained model only."
    )


@pytest.mark.parametrize("after", [{}, {"twin": metrics()}])
def test_other_models_are_a_mistake(after: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected the metrics of bayesian and deterministic"):
        verdict(after, {})
