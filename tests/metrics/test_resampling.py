"""Resamples and intervals: their own equations, and their coverage of simulated truth.

Seeds are fixed; under fresh ones each stochastic bound is exceeded with the probability that its comment states.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from bayesnet.metrics import evaluate, wilson_interval
from bayesnet.metrics.resampling import bootstrap_counts, calibrated_draws
from tests.metrics.models import draw_labels, draw_model


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (5, 5), (3, 7), (951, 1000)])
def test_wilson_solves_its_own_equation(hits: int, trials: int) -> None:
    """The ends are where |share - p| is exactly 1.96 standard errors at p."""
    z = 1.959963984540054
    for end in wilson_interval(hits, trials):
        assert trials * (hits / trials - end) ** 2 == pytest.approx(z * z * end * (1 - end), abs=1e-9)
        assert 0 <= end <= 1


def test_bootstrap_counts_are_complete_and_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.metrics.resampling._CHUNK_ELEMENTS", 70)
    chunks = list(bootstrap_counts(30, 7, 0))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
    assert (np.concatenate(chunks).sum(1) == 30).all()
    assert sum(len(chunk) for chunk in calibrated_draws(np.full(30, 0.5), 7, 0)) == 7


def test_intervals_cover_the_truth() -> None:
    """200 test sets from one population; coverage of 95 % intervals within the 1e-6 binomial bounds of .95."""
    population = draw_model(20_000, 4, 1)
    sharp = population**1.3 / (population**1.3).sum(1, keepdims=True)
    truth = {
        "accuracy": population[np.arange(20_000), sharp.argmax(1)].mean(),
        "nll": -(population * np.log(sharp)).sum(1).mean(),
        "brier": (1 - 2 * (population * sharp).sum(1) + (sharp**2).sum(1)).mean(),
    }
    rng = np.random.default_rng(2)
    covered = dict.fromkeys(truth, 0)
    for seed in range(200):
        rows = rng.integers(20_000, size=150)
        found = evaluate(sharp[rows], draw_labels(population[rows], 1000 + seed), num_resamples=100, seed=seed)
        for name, value in truth.items():
            low, high = found["ci95"][name]
            covered[name] += low <= value <= high
    floor, ceiling = binom.ppf([1e-6, 1 - 1e-6], 200, 0.95)
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
