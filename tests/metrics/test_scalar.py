"""Metrics against scikit-learn, brute force and each other.

Seeds are fixed; under fresh ones each stochastic bound is exceeded with the probability that its comment states.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from bayesnet import metrics
from bayesnet.metrics import METRICS, evaluate
from bayesnet.metrics.counted import COUNTED, Counted, Scores, bin_index
from tests.metrics.models import Array, Labels, draw_labels, draw_model


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
    scores = Scores.of(p, y)
    order = np.argsort(p.max(1), kind="stable")
    weighted = COUNTED[name](Counted(scores, counts[order][None].astype(float)))[0]
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


def test_all_ties_have_auroc_one_half_and_aurc_the_error_rate() -> None:
    p, y = np.full((8, 2), 0.5), np.array([0, 0, 0, 1, 1, 1, 1, 1])
    assert metrics.auroc_error(p, y) == 0.5
    assert metrics.aurc(p, y) == pytest.approx(5 / 8, abs=1e-12)
    assert metrics.ace(p, y) == pytest.approx(1 / 8, abs=1e-12)
