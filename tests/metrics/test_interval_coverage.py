"""Coverage of the intervals that `evaluate` publishes, on simulated truth at full size."""

from __future__ import annotations

import numpy as np
import pytest

from bayesnet.metrics import evaluate
from tests.metrics.models import Array, draw_labels, draw_model

NUM_SETS, SIZE = 2000, 400


def true_values(population: Array, stated: Array) -> dict[str, float]:
    """Return the metrics of the stated probabilities where the population's are true."""
    predicted, confidence = stated.argmax(1), stated.max(1)
    right = population[np.arange(len(stated)), predicted]
    order = np.argsort(confidence)
    hits, errors = right[order], 1 - right[order]
    return {
        "accuracy": float(right.mean()),
        "nll": float(-(population * np.log(stated)).sum(1).mean()),
        "brier": float((1 - 2 * (population * stated).sum(1) + (stated**2).sum(1)).mean()),
        "auroc_error": float((errors * (hits.sum() - hits.cumsum() + hits / 2)).sum() / (hits.sum() * errors.sum())),
    }


def coverage(stated_power: float, *, shrink: float = 1.0, num_sets: int = NUM_SETS) -> dict[str, float]:
    """Return the share of simulated test sets whose intervals, perhaps shrunk, hold the truth."""
    population = draw_model(20_000, 4, 1)
    stated = population**stated_power / (population**stated_power).sum(1, keepdims=True)
    truth, rng = true_values(population, stated), np.random.default_rng(2)
    covered = dict.fromkeys(truth, 0)
    for seed in range(num_sets):
        rows = rng.integers(len(population), size=SIZE)
        found = evaluate(stated[rows], draw_labels(population[rows], 1000 + seed), num_resamples=200, seed=seed)
        for name, value in truth.items():
            low, high = found["ci95"][name]
            centre = found[name]
            covered[name] += centre - shrink * (centre - low) <= value <= centre + shrink * (high - centre)
    return {name: count / num_sets for name, count in covered.items()}


@pytest.mark.nightly
def test_intervals_cover_the_truth_at_full_size() -> None:
    """2,000 sets, every coverage in .924 to .972: false alarm 1e-6 each where the coverage is .95."""
    found = coverage(1.3)
    assert all(0.924 <= share <= 0.972 for share in found.values()), found


@pytest.mark.nightly
def test_narrower_intervals_would_not() -> None:
    found = coverage(1.3, shrink=0.8)
    assert all(share < 0.924 for share in found.values()), found


def test_the_simulated_truth_is_what_a_large_set_shows() -> None:
    population = draw_model(20_000, 4, 1)
    stated = population**1.3 / (population**1.3).sum(1, keepdims=True)
    found = evaluate(stated, draw_labels(population, 3), num_resamples=20, level=0.999999)
    truth = true_values(population, stated)
    standard_errors = {"accuracy": 0.0034, "nll": 0.0075, "brier": 0.0041, "auroc_error": 0.0041}
    for name, value in truth.items():
        assert abs(found[name] - value) < 4.892 * standard_errors[name], name  # false alarm 1e-6
