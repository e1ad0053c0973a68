"""LAC sets: the order statistic exactly, ties, splits that are too small; what all conformal methods share."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from bayesnet.calibration import conformal
from bayesnet.calibration.conformal import (
    ConformalThreshold,
    coverage_band,
    evaluate_sets,
    fit_lac,
    prediction_sets,
    threshold_from_json,
)
from bayesnet.errors import CheckpointError, ConfigError

ALPHAS = ("0.001", "0.01", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.5", "0.7", "0.9", "0.99")


def test_order_statistic_is_exact_for_all_small_splits() -> None:
    """k is the least integer with k / (n + 1) >= 1 - alpha, in exact arithmetic; the threshold is the k-th score."""
    rng = np.random.default_rng(0)
    for n in range(1, 201):
        p = rng.random(n)
        probabilities, labels = np.stack([p, 1 - p], 1), np.zeros(n, np.int64)
        scores = sorted(1.0 - p)
        for text in ALPHAS:
            level = 1 - Fraction(text)
            k = next(k for k in range(n + 2) if k >= (n + 1) * level)
            assert conformal.rank(n, float(text)) == k
            found = fit_lac(probabilities, labels, float(text))
            assert found.threshold == (scores[k - 1] if k <= n else 1.0)
            assert (found.notice is None) == (k <= n)


def test_floating_point_would_have_asked_for_one_score_more() -> None:
    assert math.ceil((9 + 1) * (1 - 0.7)) == 4
    assert conformal.rank(9, 0.7) == 3


def test_split_too_small_gives_full_sets_and_says_so() -> None:
    found = fit_lac([[0.9, 0.1]] * 8, [0] * 8, 0.1)
    assert found.notice == "8 calibration images are too few for alpha 0.1 (at least 9): every set holds all classes"
    assert fit_lac([[0.9, 0.1]] * 9, [0] * 9, 0.1).notice is None
    assert prediction_sets([[1.0, 0.0], [0.3, 0.7]], found).all()
    assert coverage_band(8, 100, 0.1) == (1.0, 1.0)
    assert evaluate_sets([[1.0, 0.0]], [1], found)["notice"] == found.notice


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 60), st.integers(2, 5), st.integers(0, 2**31), st.sampled_from([0.05, 0.1, 0.3, 0.5]), st.booleans()
)
def test_ties_are_never_dropped(n: int, k: int, seed: int, alpha: float, coarse: bool) -> None:
    """On the calibration split itself at least k of n labels are in their sets, whatever ties and rounding do."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 4, (n, k)).astype(float) if coarse else rng.random((n, k)) + 1e-12
    probabilities = weights / weights.sum(1, keepdims=True)
    labels = rng.integers(k, size=n)
    sets = prediction_sets(probabilities, fit_lac(probabilities, labels, alpha))
    assert sets[np.arange(n), labels].sum() >= min(conformal.rank(n, alpha), n)


def test_a_set_holds_what_is_at_least_as_probable_and_nothing_else() -> None:
    threshold = ConformalThreshold("lac", 0.1, 1.0 - 0.3, 100)
    sets = prediction_sets([[0.3, 0.3, 0.4], [0.2999, 0.7001, 0.0], [0.25, 0.25, 0.5]], threshold)
    assert sets.tolist() == [[True, True, True], [False, True, False], [False, False, True]]
    assert not prediction_sets([[0.25] * 4], threshold).any()  # an empty set is an answer too


@pytest.mark.parametrize(("n", "m", "alpha"), [(20, 30, 0.1), (99, 50, 0.2)])
def test_coverage_band_holds_its_level(n: int, m: int, alpha: float) -> None:
    low, high = coverage_band(n, m, alpha, level=0.9)
    k = conformal.rank(n, alpha)
    law = betabinom(m, k, n + 1 - k)
    assert law.cdf(round(high * m)) - law.cdf(round(low * m) - 1) >= 0.9
    assert law.cdf(round(low * m) - 1) < 0.05  # and no wider than it must be
    assert law.sf(round(high * m)) <= 0.05 < law.sf(round(high * m) - 1)


def test_evaluate_sets_counts_by_hand() -> None:
    threshold = ConformalThreshold("lac", 0.1, 0.5, 100)
    found = evaluate_sets([[0.5, 0.5], [0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], [0, 1, 1, 1], threshold)
    assert (found["coverage"], found["mean_set_size"], found["num_empty"]) == (0.75, 1.25, 0)
    assert found["coverage_band"] == list(coverage_band(100, 4, 0.1))
    assert list(found)[:6] == ["alpha", "method", "threshold", "coverage", "coverage_band", "mean_set_size"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_alpha_out_of_range(alpha: float) -> None:
    for call in (lambda: fit_lac([[1.0]], [0], alpha), lambda: coverage_band(10, 10, alpha)):
        with pytest.raises(
            ConfigError, match=r"alpha must be between 0 and 1 \(.*\): 0.1 asks for sets that hold 90 %"
        ):
            call()


def test_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0: probabilities sum to 5, not 1"):
        fit_lac([[2.0, 3.0]], [0], 0.1)


def test_json_round_trip_gives_the_same_sets() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet([0.5] * 4, 50)
    found = fit_lac(p, rng.integers(4, size=50), 0.2)
    again = threshold_from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert (prediction_sets(p, again) == prediction_sets(p, found)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "raps"},
        {"method": "median"},
        {"method": ["lac"]},
        {"alpha": 0.0},
        {"alpha": "0.1"},
        {"alpha": math.nan},
        {"threshold": 1.1},
        {"threshold": math.nan},
        {"threshold": True},
        {"num_calibration": 0},
        {"num_calibration": 5.0},
        {"extra": 1},
    ],
)
def test_bad_json_is_refused(change: dict[str, object]) -> None:
    entry = {"method": "lac", "alpha": 0.1, "threshold": 0.5, "num_calibration": 100}
    assert threshold_from_json(entry).threshold == 0.5
    with pytest.raises(CheckpointError, match=r"conformal threshold (cannot be used|has other keys than expected)"):
        threshold_from_json(entry | change)


@pytest.mark.parametrize("entry", [None, [], {}, "lac"])
def test_json_of_another_kind_is_refused(entry: object) -> None:
    with pytest.raises(CheckpointError, match="conformal threshold has other keys than expected"):
        threshold_from_json(entry)


def test_scores_that_rounding_makes_1_are_told() -> None:
    tiny = [[1e-18, 1.0 - 1e-18]] * 20
    threshold = fit_lac(tiny, [0] * 20, 0.1)
    assert prediction_sets(tiny, threshold).all()
    assert threshold.notice == (
        "labels of the calibration split have a probability below 1e-16: every set holds all classes"
    )
    assert fit_lac([[0.4, 0.6]] * 20, [0] * 20, 0.1).notice is None
