"""T23: coverage of the intervals that `evaluate` publishes, on simulated truth, with many errors and with few.

Measured over 1,000 sets of 400 examples with 150, 38 and 24 errors on average: accuracy .946, .948, .950; NLL .946,
.952, .950; Brier score .944, .955, .946; AUROC of errors .949, .991, .998; AURC, whose interval is a percentile
bootstrap's and is not gated, .947, .948, .923.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from bayesnet.metrics import evaluate
from bayesnet.metrics.calibration_errors import ece_debiased
from bayesnet.metrics.scalar import ece
from tests.metrics.models import Array, draw_labels, draw_model

NUM_SETS, SIZE = 2000, 400
GATED = ("accuracy", "nll", "brier", "auroc_error")


class World(NamedTuple):
    """A kind of model.

    Attributes:
        power: What the true probabilities are raised to: more, and errors are fewer.
        stated_power: What the stated ones are, of the true: above 1, and the model is overconfident.
    """

    power: float
    stated_power: float


WORLDS = {"150 errors": World(1, 1.3), "38 errors": World(5, 0.7), "24 errors": World(8, 1.3)}


def probabilities(world: World) -> tuple[Array, Array]:
    """Return true and stated probabilities of a population."""
    population = draw_model(20_000, 4, 1) ** world.power
    population /= population.sum(1, keepdims=True)
    stated = population**world.stated_power
    return population, stated / stated.sum(1, keepdims=True)


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
        "aurc": float((errors[::-1].cumsum() / np.arange(1, len(errors) + 1)).mean()),
    }


def coverage(world: World, *, shrink: float = 1.0, num_sets: int = NUM_SETS) -> dict[str, float]:
    """Return the share of simulated test sets whose intervals, perhaps shrunk, hold the truth."""
    population, stated = probabilities(world)
    truth, rng = true_values(population, stated), np.random.default_rng(2)
    covered = dict.fromkeys(truth, 0)
    for seed in range(num_sets):
        rows = rng.integers(len(population), size=SIZE)
        found = evaluate(stated[rows], draw_labels(population[rows], 1000 + seed), num_resamples=400, seed=seed)
        for name, value in truth.items():
            low, high = found["ci95"][name]
            centre = found[name]
            covered[name] += centre - shrink * (centre - low) <= value <= centre + shrink * (high - centre)
    return {name: count / num_sets for name, count in covered.items()}


@pytest.mark.nightly
@pytest.mark.parametrize("name", WORLDS)
def test_intervals_cover_the_truth_at_full_size(name: str) -> None:
    """2,000 sets, coverage at least .924: false alarm 1e-6 each at .95; 90 % power at a coverage of .91.

    None covers more than .972 but the AUROC's, which is made of the wider of two.
    """
    found = coverage(WORLDS[name])
    assert all(found[metric] >= 0.924 for metric in GATED), found
    assert all(found[metric] <= 0.972 for metric in GATED if metric != "auroc_error"), found


@pytest.mark.nightly
def test_narrower_intervals_would_not() -> None:
    found = coverage(WORLDS["150 errors"], shrink=0.8)
    assert all(found[metric] < 0.924 for metric in GATED), found


@pytest.mark.parametrize("name", WORLDS)
def test_intervals_cover_the_truth(name: str) -> None:
    """200 sets, at least 173 of them: false alarm 1e-6 each at .95; 90 % power at a coverage of .83.

    The control: intervals of .6 times the width.
    """
    found = coverage(WORLDS[name], num_sets=200)
    assert all(found[metric] >= 0.865 for metric in GATED), found
    narrow = coverage(WORLDS[name], shrink=0.6, num_sets=200)
    assert sum(narrow[metric] < 0.865 for metric in GATED) >= 3, narrow


def test_the_simulated_truth_is_what_a_large_set_shows() -> None:
    population, stated = probabilities(WORLDS["150 errors"])
    found = evaluate(stated, draw_labels(population, 3), num_resamples=20, level=0.999999)
    truth = true_values(population, stated)
    standard_errors = {"accuracy": 0.0034, "nll": 0.0075, "brier": 0.0041, "auroc_error": 0.0041, "aurc": 0.004}
    for name, value in truth.items():
        assert abs(found[name] - value) < 4.892 * standard_errors[name], name  # false alarm 1e-6


@pytest.mark.parametrize(("stated_power", "plain_is_caught"), [(1.15, True), (1.3, True), (1.6, False)])
def test_the_debiased_ece_is_near_a_true_error(stated_power: float, plain_is_caught: bool) -> None:
    """True errors .035, .065 and .113, 400 examples: its mean over 300 sets is within .016 of the truth, mostly below.

    The standard error of the mean is .0012. The control is the plain ECE, .030 and .018 too high at the smaller errors.
    """
    population, stated = probabilities(World(1, stated_power))
    right = population[np.arange(len(stated)), stated.argmax(1)]
    bins = np.minimum((stated.max(1) * 15).astype(int), 14)
    truth = float(np.abs(np.bincount(bins, right - stated.max(1), minlength=15)).sum() / len(stated))
    rng = np.random.default_rng(4)
    plain, debiased = np.empty(300), np.empty(300)
    for index in range(300):
        rows = rng.integers(len(population), size=SIZE)
        labels = draw_labels(population[rows], index)
        plain[index], debiased[index] = ece(stated[rows], labels), ece_debiased(stated[rows], labels)
    assert abs(debiased.mean() - truth) < 0.016
    assert (abs(plain.mean() - truth) > 0.016) == plain_is_caught
