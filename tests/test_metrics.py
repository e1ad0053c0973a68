"""Metrics against scikit-learn, brute force and each other; their intervals against simulated truth.

Seeds are fixed; under fresh ones each stochastic bound is exceeded with the probability that its comment states.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from bayesnet import metrics
from bayesnet.errors import ConfigError
from bayesnet.metrics import METRICS, evaluate, paired_difference
from bayesnet.resampling import COUNTED, bin_index, bootstrap_counts, calibrated_draws, wilson_interval

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def draw_model(num_examples: int, num_classes: int, seed: int, *, decimals: int | None = None) -> Array:
    """Random probabilities; few decimals give heavy ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_examples, num_classes)) * 1.5
    if decimals is not None:
        logits = np.round(logits, decimals)
        logits[: num_examples // 2] = logits[0]
    p = np.exp(logits)
    return np.asarray(p / p.sum(1, keepdims=True), np.float64)


def draw_labels(p: Array, seed: int) -> Labels:
    """Labels drawn from the model's own probabilities: it is then perfectly calibrated."""
    u = np.random.default_rng(seed).random((len(p), 1))
    return np.asarray(np.minimum((u > p.cumsum(1)).sum(1), p.shape[1] - 1), np.int64)


def brute_ece(p: Array, y: Labels) -> tuple[float, float]:
    bins: dict[int, list[tuple[float, float]]] = {}
    for row, label in zip(p, y, strict=True):
        confidence = max(row)
        index = next(b for b in range(15) if confidence <= np.linspace(0, 1, 16)[b + 1] or b == 14)
        bins.setdefault(index, []).append((confidence, float(np.argmax(row) == label)))
    gaps = {b: abs(sum(c - a for c, a in rows) / len(rows)) for b, rows in bins.items()}
    return sum(gaps[b] * len(rows) / len(p) for b, rows in bins.items()), max(gaps.values())


def tie_averaged(p: Array, y: Labels) -> list[tuple[float, float]]:
    pairs = [(max(row), float(np.argmax(row) == label)) for row, label in zip(p, y, strict=True)]
    shared = []
    for confidence, _ in sorted(pairs):
        tied = [correct for other, correct in pairs if other == confidence]
        shared.append((confidence, sum(tied) / len(tied)))
    return shared


def brute_ace(p: Array, y: Labels) -> float:
    rows, n = tie_averaged(p, y), len(y)
    count = min(15, n)
    cuts = [b * n // count for b in range(count + 1)]
    return sum(abs(sum(c - a for c, a in rows[i:j])) for i, j in itertools.pairwise(cuts)) / n


def brute_aurc(p: Array, y: Labels) -> float:
    errors = [1 - correct for _, correct in reversed(tie_averaged(p, y))]
    return sum(sum(errors[:k]) / k for k in range(1, len(errors) + 1)) / len(errors)


CASES = [
    (n, k, seed, decimals)
    for n, k in ((1, 3), (2, 2), (14, 4), (16, 3), (97, 5))
    for seed in (0, 1)
    for decimals in (None, 0)
]


@pytest.mark.parametrize(("n", "k", "seed", "decimals"), CASES)
def test_against_brute_force(n: int, k: int, seed: int, decimals: int | None) -> None:
    p = draw_model(n, k, seed, decimals=decimals)
    y = draw_labels(p, seed + 100)
    expected_ece, expected_mce = brute_ece(p, y)
    assert metrics.ece(p, y) == pytest.approx(expected_ece, abs=1e-12)
    assert metrics.mce(p, y) == pytest.approx(expected_mce, abs=1e-12)
    assert metrics.ace(p, y) == pytest.approx(brute_ace(p, y), abs=1e-12)
    assert metrics.aurc(p, y) == pytest.approx(brute_aurc(p, y), abs=1e-12)


@pytest.mark.parametrize("decimals", [None, 0])
def test_against_scikit_learn(decimals: int | None) -> None:
    p = draw_model(300, 6, 3, decimals=decimals)
    y = draw_labels(p, 4)
    assert metrics.accuracy(p, y) == accuracy_score(y, p.argmax(1))
    assert metrics.nll(p, y) == pytest.approx(log_loss(y, p, labels=range(6)), abs=1e-12)
    assert metrics.brier(p, y) == pytest.approx(brier_score_loss(y, p, labels=range(6)), abs=1e-12)
    wrong = p.argmax(1) != y
    assert metrics.auroc_error(p, y) == pytest.approx(roc_auc_score(wrong, -p.max(1)), abs=1e-12)


def test_aurc_is_the_expectation_over_tie_orders() -> None:
    p = draw_model(40, 3, 5, decimals=0)
    y = draw_labels(p, 6)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(4000):
        order = np.lexsort((rng.random(40), -p.max(1)))
        wrong = (p.argmax(1) != y)[order]
        values.append((wrong.cumsum() / np.arange(1, 41)).mean())
    z = (np.mean(values) - metrics.aurc(p, y)) / (np.std(values) / math.sqrt(len(values)))
    assert np.std(values) > 0.001
    assert abs(z) < 4.892  # false alarm 1e-6


@pytest.mark.parametrize("name", list(METRICS))
def test_counts_equal_repeating_the_examples(name: str) -> None:
    """The bootstrap's weighted metric is the plain metric of the repeated examples: one formula, two uses."""
    p = draw_model(60, 4, 7, decimals=0)
    y = draw_labels(p, 8)
    counts = np.random.default_rng(9).multinomial(60, np.full(60, 1 / 60))
    scores = metrics._scores(p, y)
    order = np.argsort(p.max(1), kind="stable")
    weighted = COUNTED[name](scores, counts[order][None].astype(float))[0]
    plain = METRICS[name].function(np.repeat(p, counts, axis=0), np.repeat(y, counts))
    assert weighted == pytest.approx(plain, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([None, 0]))
def test_order_of_examples_is_irrelevant(n: int, k: int, seed: int, decimals: int | None) -> None:
    p = draw_model(n, k, seed, decimals=decimals)
    y = draw_labels(p, seed)
    order = np.random.default_rng(seed).permutation(n)
    for metric in METRICS.values():
        assert metric.function(p[order], y[order]) == pytest.approx(metric.function(p, y), abs=1e-12, nan_ok=True)
    assert metrics.ece_debiased(p[order], y[order]) == pytest.approx(metrics.ece_debiased(p, y), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_ranges(n: int, k: int, seed: int) -> None:
    p = draw_model(n, k, seed)
    y = draw_labels(p, seed)
    values = {name: metric.function(p, y) for name, metric in METRICS.items()}
    assert 0 <= values["ece"] <= values["mce"] + 1e-12 <= 1 + 1e-12
    assert 0 <= values["brier"] <= 2
    assert values["nll"] >= 0
    assert math.isnan(values["auroc_error"]) == (values["accuracy"] in (0, 1))
    gap = abs(p.max(1).mean() - values["accuracy"])
    assert min(values["ece"], values["ace"]) >= gap - 1e-12  # Jensen: binning can only add


def test_bins_are_closed_on_the_right() -> None:
    edges = np.linspace(0, 1, 16)
    assert bin_index(edges).tolist() == [0, *range(15)]
    assert bin_index(np.nextafter(edges[1:-1], 2)).tolist() == list(range(1, 15))
    assert bin_index(np.array([1 + 1e-7])).tolist() == [14]


def test_confidence_of_exactly_one_and_a_confident_mistake() -> None:
    p = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    right, wrong = np.array([0, 0, 1]), np.array([0, 0, 0])
    assert [metrics.ece(p, right), metrics.mce(p, right), metrics.nll(p, right), metrics.brier(p, right)] == [
        0,
        0,
        0,
        0,
    ]
    assert metrics.nll(p, wrong) == math.inf
    assert metrics.count_infinite(p, wrong) == 1
    assert metrics.brier(p, wrong) == pytest.approx(2 / 3, abs=1e-12)
    found = evaluate(p, wrong, num_resamples=50)
    assert (found["nll"], found["num_infinite_nll"], found["num_errors"]) == (None, 1, 1)
    assert found["ci95"]["nll"][1] is None  # infinity is no number of JSON either


def test_nll_is_not_capped() -> None:
    p = np.array([[1e-300, 1.0]])
    assert metrics.nll(p, [0]) == pytest.approx(300 * math.log(10), rel=1e-12)


def test_saturated_float32_softmax() -> None:
    p = np.array([[1.0, 1e-9]], np.float32)
    assert metrics.mce(p, [0]) == 0


def test_half_precision_is_computed_in_float64() -> None:
    p = np.full((5000, 2), 0.5, np.float16)
    assert metrics.nll(p, np.zeros(5000, np.uint8)) == pytest.approx(math.log(2), abs=1e-12)


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


def test_all_ties_have_auroc_one_half_and_aurc_the_error_rate() -> None:
    p, y = np.full((8, 2), 0.5), np.array([0, 0, 0, 1, 1, 1, 1, 1])
    assert metrics.auroc_error(p, y) == 0.5
    assert metrics.aurc(p, y) == pytest.approx(5 / 8, abs=1e-12)
    assert metrics.ace(p, y) == pytest.approx(1 / 8, abs=1e-12)


GOOD = [[0.5, 0.5], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([[0.5, 0.5], [math.nan, 1.0]], [0, 0], "row 1: probabilities contain NaN or infinity"),
        ([[math.inf, -math.inf], [0.5, 0.5]], [0, 0], "row 0: probabilities contain NaN or infinity"),
        ([[0.5, 0.5], [-0.5, 1.5]], [0, 0], "row 1: probability -0.5 is negative; are these logits?"),
        ([[0.5, 0.5], [0.5, 0.5002]], [0, 0], "row 1: probabilities sum to 1.0002, not 1"),
        ([[3.0, 1.0], [0.5, 0.5]], [0, 0], "row 0: probabilities sum to 4, not 1"),
        (GOOD, [0, 2], "row 1: label 2 is not in 0..1"),
        (GOOD, [-1, 0], "row 0: label -1 is not in 0..1"),
        (GOOD, [0], "labels must have shape (2,), one for each row; got (1,)"),
        (GOOD, [0.0, 1.0], "labels must be integers; got float64"),
        (GOOD, [True, False], "labels must be integers; got bool"),
        (np.empty((0, 3)), [], "probabilities must have shape (examples, classes), neither of them 0; got (0, 3)"),
        ([0.5, 0.5], [0, 0], "probabilities must have shape (examples, classes), neither of them 0; got (2,)"),
    ],
)
def test_wrong_input_names_the_row(p: list[list[float]], y: list[int], message: str) -> None:
    for function in (metrics.nll, evaluate):
        with pytest.raises(ValueError) as caught:
            function(p, y)
        assert str(caught.value) == message


def test_sums_within_tolerance_are_taken_as_they_are() -> None:
    assert metrics.nll([[0.50005, 0.49999]], [0]) == -math.log(0.50005)


def test_evaluate_has_the_public_keys_and_is_reproducible() -> None:
    p = draw_model(200, 4, 11)
    y = draw_labels(p, 12)
    found = evaluate(p, y, num_resamples=100)
    assert list(found) == [*METRICS, "num_test", "ci95", "ece_null95", "ece_debiased", "num_errors", "num_infinite_nll"]
    assert list(METRICS) == ["accuracy", "nll", "brier", "ece", "ace", "mce", "aurc", "auroc_error"]
    assert found["num_test"] == 200
    assert found["num_errors"] == round(200 * (1 - found["accuracy"]))
    assert found["ci95"]["accuracy"] == list(wilson_interval(200 - found["num_errors"], 200))
    for name, metric in METRICS.items():
        assert found[name] == metric.function(p, y)
        low, high = found["ci95"][name]
        assert low <= found[name] <= high
    assert evaluate(p, y, num_resamples=100) == found
    assert evaluate(p, y, num_resamples=100, seed=1)["ci95"]["nll"] != found["ci95"]["nll"]
    assert "ci90" in evaluate(p, y, num_resamples=20, level=0.9)
    band = metrics.ece_null_band(p, num_resamples=100)
    assert found["ece_null95"] == pytest.approx([band.low, band.high], abs=1e-15)
    assert band.low < band.mean < band.high


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (5, 5), (3, 7), (951, 1000)])
def test_wilson_solves_its_own_equation(hits: int, trials: int) -> None:
    """The ends are where |share - p| is exactly 1.96 standard errors at p."""
    z = 1.959963984540054
    for end in wilson_interval(hits, trials):
        assert trials * (hits / trials - end) ** 2 == pytest.approx(z * z * end * (1 - end), abs=1e-9)
        assert 0 <= end <= 1


def test_bootstrap_counts_are_complete_and_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.resampling._CHUNK_ELEMENTS", 70)
    chunks = list(bootstrap_counts(30, 7, 0))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
    assert (np.concatenate(chunks).sum(1) == 30).all()
    assert sum(len(chunk) for chunk in calibrated_draws(np.full(30, 0.5), 7, 0)) == 7


def test_calibrated_model_is_in_its_null_band_at_the_nominal_rate() -> None:
    """250 models, 90 % bands: the number outside is Binomial(250, ~.1); false alarm 1e-6 on each side."""
    outside = 0
    for seed in range(250):
        p = draw_model(150, 5, seed)
        band = metrics.ece_null_band(p, level=0.9, num_resamples=200, seed=seed)
        outside += not band.low <= metrics.ece(p, draw_labels(p, 10_000 + seed)) <= band.high
    assert binom.ppf(1e-6, 250, 0.1) <= outside <= binom.ppf(1 - 1e-6, 250, 0.1)


def test_planted_overconfidence_is_outside_the_null_band() -> None:
    p = draw_model(1000, 5, 1)
    y = draw_labels(p, 2)
    sharp = p**1.6 / (p**1.6).sum(1, keepdims=True)
    assert metrics.ece(sharp, y) > metrics.ece_null_band(sharp, level=0.9999, num_resamples=400).high
    assert evaluate(sharp, y, num_resamples=200)["ci95"]["ece"][0] > 0


def test_debiased_ece_halves_the_bias() -> None:
    """Mean over 100 calibrated models; measured .083 and .022 with standard errors .002 and .003."""
    models = [draw_model(200, 5, seed) for seed in range(100)]
    labels = [draw_labels(p, 500 + seed) for seed, p in enumerate(models)]
    plain = np.mean([metrics.ece(p, y) for p, y in zip(models, labels, strict=True)])
    debiased = np.mean([metrics.ece_debiased(p, y) for p, y in zip(models, labels, strict=True)])
    assert abs(debiased) < plain / 2


def test_intervals_cover_the_truth() -> None:
    """300 test sets from one population; coverage of 95 % intervals within the 1e-6 binomial bounds of .95."""
    population = draw_model(20_000, 4, 1)
    sharp = population**1.3 / (population**1.3).sum(1, keepdims=True)
    truth = {
        "accuracy": population[np.arange(20_000), sharp.argmax(1)].mean(),
        "nll": -(population * np.log(sharp)).sum(1).mean(),
        "brier": (1 - 2 * (population * sharp).sum(1) + (sharp**2).sum(1)).mean(),
    }
    rng = np.random.default_rng(2)
    covered = dict.fromkeys(truth, 0)
    for seed in range(300):
        rows = rng.integers(20_000, size=150)
        found = evaluate(sharp[rows], draw_labels(population[rows], 1000 + seed), num_resamples=150, seed=seed)
        for name, value in truth.items():
            low, high = found["ci95"][name]
            covered[name] += low <= value <= high
    floor, ceiling = binom.ppf([1e-6, 1 - 1e-6], 300, 0.95)
    assert all(floor <= count <= ceiling for count in covered.values()), covered


def test_intervals_of_calibration_errors_reach_the_truth_at_zero() -> None:
    """Percentiles of the bootstrap cover a true 0 in none of 60 sets; false alarm of the bound 1e-6 at 95 %."""
    covered = {"ece": 0, "ace": 0, "mce": 0}
    for seed in range(60):
        p = draw_model(150, 4, seed)
        found = evaluate(p, draw_labels(p, 2000 + seed), num_resamples=150, seed=seed)
        for name in covered:
            covered[name] += found["ci95"][name][0] == 0
    assert min(covered.values()) >= binom.ppf(1e-6, 60, 0.95)


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
    mirrored = paired_difference(b, a, y, name)
    assert mirrored["ci95"] == pytest.approx([-high, -low], abs=1e-12)
    assert paired_difference(a, a, y, name) == {"difference": 0.0, "ci95": [0.0, 0.0]}


def test_pairing_narrows_the_interval() -> None:
    a = draw_model(400, 4, 21)
    y = draw_labels(a, 22)
    low, high = paired_difference(a, 0.9 * a + 0.1 / 4, y, "nll")["ci95"]
    single_low, single_high = evaluate(a, y)["ci95"]["nll"]
    assert high - low < 0.3 * (single_high - single_low)


def test_paired_difference_of_infinite_nll_is_none() -> None:
    a, b = np.array([[1.0, 0.0], [0.5, 0.5]]), np.full((2, 2), 0.5)
    assert paired_difference(a, b, [1, 0], "nll") == {"difference": None, "ci95": [None, None]}
    assert paired_difference(a, b, [1, 0], "brier")["difference"] == pytest.approx(0.75, abs=1e-12)


def test_paired_difference_needs_a_mean_over_examples() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown metric with a value per example \(ece\): .*Known: accuracy, nll, brier"
    ):
        paired_difference(GOOD, GOOD, [0, 1], "ece")


def test_reliability_bins_add_up_to_the_ece() -> None:
    p = draw_model(500, 4, 31)
    y = draw_labels(p, 32)
    bins = metrics.reliability_bins(p, y, num_resamples=200)
    filled = bins.count_B > 0
    gaps = np.abs(bins.confidence_B - bins.accuracy_B)[filled] * bins.count_B[filled]
    assert gaps.sum() / 500 == pytest.approx(metrics.ece(p, y), abs=1e-12)
    assert not filled[:3].any()  # a confidence is at least 1/4
    assert np.isnan(bins.accuracy_B[~filled]).all()
    assert (bins.low_B[filled] <= bins.high_B[filled]).all()
