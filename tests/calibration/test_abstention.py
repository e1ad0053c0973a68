"""Abstention: the bound and the search by hand, ties, what is unattainable, and the guarantee over simulated splits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from bayesnet.calibration import (
    AbstentionThreshold,
    abstains,
    abstention_from_json,
    evaluate_abstention,
    fit_abstention,
    parse_risk,
)
from bayesnet.calibration.abstention import num_needed, risk_upper_bound
from bayesnet.errors import CheckpointError, ConfigError

Array = NDArray[np.float64]
NUM_SPLITS = 2000
N = 1000


def predictions(confidence_N: Array, wrong_N: NDArray[np.bool_]) -> tuple[Array, NDArray[np.int64]]:
    """Return two-class probabilities with these confidences, above 1/2, and labels of which these are missed."""
    return np.stack([confidence_N, 1 - confidence_N], 1), wrong_N.astype(np.int64)


@pytest.mark.parametrize("max_risk", [0.001, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_bound_is_the_largest_risk_that_the_errors_do_not_refute(max_risk: float, level: float) -> None:
    for num_errors, num_kept in ((0, 1), (0, 149), (1, 10), (5, 200), (199, 200)):
        bound = risk_upper_bound(num_errors, num_kept, level)
        assert binom.cdf(num_errors, num_kept, bound) == pytest.approx(1 - level)
    assert risk_upper_bound(7, 7, level) == 1.0
    needed = num_needed(max_risk, level)
    assert risk_upper_bound(0, needed, level) <= max_risk
    assert needed == 1 or risk_upper_bound(0, needed - 1, level) > max_risk


def test_two_percent_needs_149_images_without_an_error() -> None:
    right = [False] * 149
    found = fit_abstention(*predictions(np.linspace(0.9, 0.99, 149), np.array(right)), 0.02)
    assert (found.attained, found.coverage, found.num_kept, found.threshold) == (True, 1.0, 149, 0.0)
    assert found.notice is None
    short = fit_abstention(*predictions(np.linspace(0.9, 0.99, 148), np.array(right[1:])), 0.02)
    assert (short.attained, short.coverage, short.num_kept, short.risk_bound) == (False, 0.0, 0, None)
    assert short.notice == (
        "a risk of at most 2 % needs at least 149 images without an error to be shown; there are 148: the model "
        "abstains on every image"
    )
    assert abstains([[1.0, 0.0], [0.4, 0.6]], short).all()


def test_errors_among_the_most_confident_end_the_search() -> None:
    """One error at the top of 300 fails the first coverage; 299 right answers below it are not looked at."""
    wrong_N = np.arange(300) == 0
    confidence_N = np.linspace(0.99, 0.9, 300)
    found = fit_abstention(*predictions(confidence_N, wrong_N), 0.02)
    assert not found.attained
    assert found.notice == (
        "a risk of at most 2 % could not be shown: too many errors among the most confident of 300 images: the model "
        "abstains on every image"
    )
    assert risk_upper_bound(1, 300) <= 0.02  # a scan of all thresholds would have taken this one
    assert fit_abstention(*predictions(confidence_N, wrong_N[::-1]), 0.02).coverage == 1.0


def test_the_search_goes_on_to_the_first_coverage_that_fails() -> None:
    """Of 1000 images the 300 least confident are all wrong: 70 % pass without an error, 75 % fail with 50."""
    confidence_N = np.linspace(0.99, 0.6, 1000)
    found = fit_abstention(*predictions(confidence_N, np.arange(1000) >= 700), 0.02)
    assert (found.num_kept, found.coverage) == (700, 0.7)
    assert found.risk_bound == risk_upper_bound(0, 700)
    assert found.threshold is not None
    assert confidence_N[700] < found.threshold <= confidence_N[699]
    kept = ~abstains(predictions(confidence_N, confidence_N < 0)[0], found)
    assert kept.tolist() == [True] * 700 + [False] * 300


@pytest.mark.parametrize(
    ("sizes", "num_kept"),
    [
        ((600, 400), 600),  # saturated: the first groups hold no border below 60 %
        ((720, 280), 720),  # a group ends between two of the coverages: 75 % keeps what is above its border
        ((740, 30, 230), 740),  # the border of 75 % lies in the second group, which is dropped whole
        ((1000,), 0),  # all tied, and too many errors among all
    ],
)
def test_images_of_equal_confidence_are_kept_or_dropped_together(sizes: tuple[int, ...], num_kept: int) -> None:
    confidence_N = np.repeat(1.0 - 0.1 * np.arange(len(sizes)), sizes)
    wrong_N = np.arange(1000) >= (sizes[0] if len(sizes) > 1 else 900)
    shuffled = np.random.default_rng(0).permutation(1000)
    p_NK, labels_N = predictions(confidence_N[shuffled], wrong_N[shuffled])
    found = fit_abstention(p_NK, labels_N, 0.02)
    assert found.num_kept == num_kept
    assert int((~abstains(p_NK, found)).sum()) == num_kept
    assert fit_abstention(p_NK[::-1], labels_N[::-1], 0.02) == found


Risk = Callable[[Array], Array]


def naive_scan(confidence_N: Array, wrong_N: NDArray[np.bool_], most_errors_N: Array) -> float:
    """Return the least confidence kept by the largest of all sets whose bound passes, infinite if none does."""
    order_N = np.argsort(-confidence_N)
    passing = np.flatnonzero(np.cumsum(wrong_N[order_N]) <= most_errors_N)
    return float(confidence_N[order_N][passing[-1]]) if len(passing) else math.inf


def false_claims(error_rate: Risk, digits: int | None) -> tuple[int, int, int]:
    """Return, of 2,000 splits: claims that 2 % is attained, those of them that are false, and those of the naive scan.

    An image's place u in the order of confidence is uniform, and ``error_rate`` its probability of an error. Confidence
    falls with u, in steps of 10^-digits of u where digits are given; the true risk above any threshold is the mean of
    ``error_rate`` up to the u where it ends.
    """
    rng = np.random.default_rng(7)
    num_cells = 100_000
    risk_M = np.cumsum(error_rate((np.arange(num_cells) + 0.5) / num_cells)) / np.arange(1, num_cells + 1)
    passing = [binom.cdf(np.arange(60), num_kept, 0.02) <= 0.05 for num_kept in range(1, N + 1)]
    most_errors_N = np.array([each.sum() - 1 for each in passing])
    claims = false = naive_false = 0
    for _ in range(NUM_SPLITS):
        u_N = rng.random(N)
        place_N = u_N if digits is None else np.floor(u_N * 10**digits) / 10**digits
        wrong_N = rng.random(N) < error_rate(u_N)
        found = fit_abstention(*predictions(1 - 0.4 * place_N, wrong_N), 0.02)
        naive = naive_scan(1 - 0.4 * place_N, wrong_N, most_errors_N)
        are_false = []
        for threshold in (math.inf if found.threshold is None else found.threshold, naive):
            end = max(min((1 - threshold) / 0.4, 1.0), 0.0)
            if digits is not None:  # a step is kept whole or not at all
                end = float(np.mean(1 - 0.4 * (np.arange(10**digits) / 10**digits) >= threshold))
            are_false.append(threshold <= 1 and bool(risk_M[max(round(end * num_cells) - 1, 0)] > 0.02))
        claims += found.attained
        false += are_false[0]
        naive_false += are_false[1]
    return claims, false, naive_false


@pytest.mark.parametrize(
    ("error_rate", "digits", "least_claims"),
    [
        (lambda u: np.where(u < 0.16, 0.0, 0.05), None, 1800),
        (lambda u: 0.016 + 0.016 * u, 1, 20),
        (lambda u: np.where((20 * u) % 1 < 0.5, 0.0, 0.041), None, 20),
    ],
    ids=["a step", "rising, with ties", "up and down, against the assumption"],
)
def test_the_risk_is_claimed_falsely_in_at_most_5_percent_of_splits(
    error_rate: Risk, digits: int | None, least_claims: int
) -> None:
    """2,000 splits of 1,000 images: at most 149 false claims, a false alarm of 1e-6 if their rate is 5 %.

    A rate of 8.9 % is caught with power .99. Measured: 13, 16 and 35 false claims.
    """
    claims, false, _ = false_claims(error_rate, digits)
    assert false <= binom.isf(1e-6, NUM_SPLITS, 0.05) == 149
    assert claims >= least_claims


def test_where_every_claim_is_false_the_naive_scan_is_caught() -> None:
    """The error rate is 2.01 % everywhere: 90 claims of 2,000, of the best of all thresholds 309 (15 %)."""
    claims, false, naive_false = false_claims(lambda u: np.full_like(u, 0.0201), None)
    assert false == claims <= 149
    assert naive_false > 149


def test_evaluation_by_hand() -> None:
    threshold = AbstentionThreshold(0.02, 0.95, 0.8, 0.5, 0.015, 400, 200)
    p_NK = [[0.8, 0.2], [0.1, 0.9], [0.79, 0.21], [0.05, 0.95]]
    found = evaluate_abstention(p_NK, [0, 1, 0, 0], threshold)
    assert {name: found[name] for name in ("max_risk", "coverage", "risk_bound", "attained", "notice")} == {
        "max_risk": 0.02,
        "coverage": 0.5,
        "risk_bound": 0.015,
        "attained": True,
        "notice": None,
    }
    test = found["test"]
    assert (test["coverage"], test["num_kept"], test["num_errors"], test["risk"]) == (0.75, 3, 1, 1 / 3)
    assert test["ci95"] == pytest.approx([0.0084, 0.9057], abs=1e-4)  # the textbook's interval for 1 of 3
    none = evaluate_abstention([[0.7, 0.3]], [0], threshold)["test"]
    assert none == {"coverage": 0.0, "num_kept": 0, "num_errors": 0, "risk": None, "ci95": [None, None]}
    assert evaluate_abstention([[0.9, 0.1]], [0], threshold)["test"]["ci95"] == pytest.approx([0.0, 0.975])
    assert evaluate_abstention([[0.9, 0.1]], [1], threshold)["test"]["ci95"] == pytest.approx([0.025, 1.0])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def attained() -> AbstentionThreshold:
    confidence_N = np.linspace(0.99, 0.6, 400)
    return fit_abstention(*predictions(confidence_N, np.arange(400) >= 300), 0.02)


def test_json_round_trip() -> None:
    """With and without the part about the test split; the threshold is exact, so the same images are answered."""
    unattained = fit_abstention([[0.9, 0.1]], [0], 0.02)
    for found in (attained(), unattained):
        for entry in (found.to_json(), evaluate_abstention([[0.9, 0.1]], [0], found)):
            assert abstention_from_json(json.loads(json.dumps(entry, allow_nan=False))) == found
    assert unattained.notice is not None
    assert "there is 1:" in unattained.notice


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"max_risk": 0},
        {"max_risk": math.nan},
        {"confidence_level": 1.0},
        {"threshold": 1.5},
        {"threshold": math.nan},
        {"threshold": True},
        {"threshold": None},
        {"coverage": 0.7},
        {"coverage": "0.75"},
        {"risk_bound": None},
        {"risk_bound": 0.03},
        {"num_kept": 0},
        {"num_kept": 401},
        {"num_fitted": 400.0},
        {"attained": False},
        {"attained": 1},
        {"notice": "all is well"},
    ],
)
def test_bad_json_is_refused(change: dict[str, object]) -> None:
    entry = attained().to_json()
    assert abstention_from_json(entry).num_kept == 300
    with pytest.raises(CheckpointError, match=r"abstention threshold (cannot be used|has other keys than expected)"):
        abstention_from_json(entry | change)


@pytest.mark.parametrize("entry", [None, [], {}, "2%"])
def test_json_of_another_kind_is_refused(entry: object) -> None:
    with pytest.raises(CheckpointError, match="abstention threshold has other keys than expected"):
        abstention_from_json(entry)


@pytest.mark.parametrize(
    ("text", "risk"), [("2%", 0.02), ("2 %", 0.02), (" 0.02 ", 0.02), (".5%", 0.005), ("7%", 0.07), ("1e-3", 0.001)]
)
def test_risks_are_read_as_they_are_written(text: str, risk: float) -> None:
    assert parse_risk(text) == risk


@pytest.mark.parametrize(
    "text",
    ["", "%", "two", "2", "0", "0%", "100%", "1.0", "-2%", "2%%", "nan", "inf", "1_0%", "٢%", "2 % of all", "1e-400"],
)
def test_nonsense_is_no_risk(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not a risk between 0 and 1 \(.*\): write a share of errors such as 2% or"):
        parse_risk(text)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_settings_out_of_range(value: float) -> None:
    with pytest.raises(ConfigError, match=r"max_risk must be between 0 and 1 \("):
        fit_abstention([[1.0]], [0], value)
    with pytest.raises(ConfigError, match=r"confidence_level must be between 0 and 1 \("):
        fit_abstention([[1.0]], [0], 0.02, confidence_level=value)
