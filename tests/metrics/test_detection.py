"""Detection scores against scikit-learn and brute force, and the interval of the AUROC against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bayesnet.metrics import aupr, auroc, auroc_interval, fpr_at_tpr
from tests.metrics.models import Array

SCORES = st.lists(st.integers(-3, 3).map(float) | st.floats(-5, 5), min_size=1, max_size=40).map(np.array)
FUNCTIONS = (auroc, aupr, fpr_at_tpr)


def joined(positive: Array, negative: Array) -> tuple[Array, Array]:
    return np.repeat([1.0, 0.0], [len(positive), len(negative)]), np.concatenate((positive, negative))


@settings(max_examples=100, deadline=None)
@given(SCORES, SCORES)
def test_against_scikit_learn_and_brute_force(positive: Array, negative: Array) -> None:
    truth, scores = joined(positive, negative)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert aupr(positive, negative) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(np.mean(pairs), abs=1e-12)
    rates = [
        (np.mean(negative >= t), np.mean(positive >= t)) for t in positive if np.mean(positive >= t) >= 0.95 - 1e-12
    ]
    assert fpr_at_tpr(positive, negative) == min(rates)[0]
    false_rates, true_rates, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert fpr_at_tpr(positive, negative) == pytest.approx(false_rates[true_rates >= 0.95 - 1e-12].min(), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_only_the_order_of_the_scores_counts(positive: Array, negative: Array) -> None:
    """Turning scores and groups round changes nothing; no monotone map of the scores does."""
    assert auroc(-negative, -positive) == pytest.approx(auroc(positive, negative), abs=1e-12)
    assert auroc(negative, positive) == pytest.approx(1 - auroc(positive, negative), abs=1e-12)
    low, high = auroc_interval(positive, negative)
    assert 0 <= low <= auroc(positive, negative) <= high <= 1
    assert auroc_interval(negative, positive) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    for function in (*FUNCTIONS, auroc_interval):
        expected = function(np.round(positive, 3), np.round(negative, 3))
        assert function(np.round(positive, 3) * 2 + 1, np.round(negative, 3) * 2 + 1) == pytest.approx(
            expected, abs=1e-12
        )


@pytest.mark.parametrize(("positive", "negative"), [([], [1.0]), ([1.0], []), ([], [])])
def test_an_empty_group_is_nan(positive: list[float], negative: list[float]) -> None:
    assert all(math.isnan(function(positive, negative)) for function in FUNCTIONS)
    assert all(math.isnan(end) for end in auroc_interval(positive, negative))


def test_all_equal_scores_tell_nothing() -> None:
    positive, negative = np.zeros(30), np.zeros(10)
    assert (auroc(positive, negative), aupr(positive, negative), fpr_at_tpr(positive, negative)) == (0.5, 0.75, 1.0)
    low, high = auroc_interval(positive, negative)
    assert low < 0.5 < high


def test_perfect_separation_is_not_taken_as_proof() -> None:
    few, many = (auroc_interval(np.ones(n), np.zeros(n)) for n in (5, 500))
    assert few[1] == many[1] == 1
    assert few[0] < 0.75
    assert 0.98 < many[0] < 1
    assert auroc_interval(np.zeros(5), np.ones(5)) == pytest.approx((0, 1 - few[0]), abs=1e-9)


def test_infinite_scores_are_scores() -> None:
    assert auroc([math.inf, 1.0], [-math.inf, 1.0]) == 0.875
    assert fpr_at_tpr([math.inf, math.inf], [math.inf, 0.0]) == 0.5


@pytest.mark.parametrize("num_positive", [20, 40, 100, 1000])
def test_the_rate_is_not_missed_by_a_rounding_error(num_positive: int) -> None:
    """At 95 % of 20 the lowest positive is let go, so a negative equal to it is no false alarm."""
    assert fpr_at_tpr(np.arange(num_positive, dtype=float), [0.0]) == 0.0
    assert fpr_at_tpr(np.arange(num_positive, dtype=float), [0.0], tpr=1.0) == 1.0


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ([0.0, math.nan], [1.0], "positive score 1 is NaN"),
        ([0.0], [math.nan], "negative score 0 is NaN"),
        ([[0.0]], [1.0], r"positive scores must have one dimension; got shape \(1, 1\)"),
    ],
)
def test_wrong_scores_are_named(positive: list[float], negative: list[float], message: str) -> None:
    for function in (*FUNCTIONS, auroc_interval):
        with pytest.raises(ValueError, match=message):
            function(positive, negative)


@pytest.mark.parametrize("tpr", [0.0, 1.5, math.nan])
def test_a_rate_out_of_range(tpr: float) -> None:
    with pytest.raises(ValueError, match="tpr must be above 0 and at most 1; got"):
        fpr_at_tpr([1.0], [0.0], tpr)


def coverage(kind: str, truth: float, num_positive: int, num_negative: int, *, shrink: float = 1.0) -> float:
    """Return the share of 2,000 simulated sets whose 95 % interval, perhaps shrunk, holds the true AUROC."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        if kind == "normal":
            positive, negative = rng.normal(norm.ppf(truth) * 2**0.5, 1, num_positive), rng.normal(0, 1, num_negative)
        else:
            positive, negative = rng.exponential(truth / (1 - truth), num_positive), rng.exponential(1, num_negative)
        value, (low, high) = auroc(positive, negative), auroc_interval(positive, negative)
        covered += value - shrink * (value - low) <= truth <= value + shrink * (high - value)
    return covered / 2000


@pytest.mark.parametrize(("kind", "truth"), [("normal", 0.6), ("exponential", 0.8)])
def test_the_interval_covers_the_truth(kind: str, truth: float) -> None:
    """95 % intervals of 2,000 sets hold it in .924 to .972: false alarm 1e-6 where the coverage is .95."""
    assert 0.924 <= coverage(kind, truth, 60, 150) <= 0.972


def test_few_positives_and_a_high_area_are_covered_too() -> None:
    """Where DeLong's interval alone covers 75 %; false alarm of the bound 1e-6 at .95."""
    assert coverage("exponential", 0.99, 30, 300) >= 0.924


def test_a_narrower_interval_would_not() -> None:
    assert coverage("normal", 0.6, 60, 150, shrink=0.8) < 0.924
