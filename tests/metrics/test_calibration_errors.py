"""Calibration errors: null band, debiased and class-wise ECE, the Brier score's parts, the bins of the diagram."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binom, kstest

from bayesnet import metrics
from bayesnet.metrics import evaluate
from bayesnet.metrics.counted import Scores, value
from bayesnet.metrics.resampling import null_values
from tests.metrics.models import Array, draw_labels, draw_model


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


def test_reliability_record_is_the_bins_in_json() -> None:
    p = draw_model(300, 4, 41)
    y = draw_labels(p, 42)
    bins = metrics.reliability_bins(p, y, num_resamples=100)
    record = metrics.reliability_record(p, y, num_resamples=100)
    assert list(record) == ["count", "confidence", "accuracy", "low", "high"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for values, expected in zip(record.values(), bins, strict=True):
        assert len(values) == 15
        np.testing.assert_array_equal(np.array(values, float), expected)
    assert [value is None for value in record["low"]] == [count == 0 for count in record["count"]]


def brute_bins(p: Array) -> list[int]:
    return [next(b for b in range(15) if value <= np.linspace(0, 1, 16)[b + 1] or b == 14) for value in p]


@pytest.mark.parametrize(
    ("n", "k", "seed", "decimals"), [(1, 3, 0, None), (30, 2, 1, 0), (97, 5, 2, None), (97, 5, 3, 0)]
)
def test_class_wise_ece_and_the_parts_of_the_brier_score(n: int, k: int, seed: int, decimals: int | None) -> None:
    p = draw_model(n, k, seed, decimals=decimals)
    y = draw_labels(p, seed + 50)
    gaps, reliability, resolution, uncertainty = 0.0, 0.0, 0.0, 0.0
    for label in range(k):
        bins, true = np.array(brute_bins(p[:, label])), np.array(y == label, float)
        uncertainty += np.var(true)
        for b in set(bins.tolist()):
            mean, share, size = p[bins == b, label].mean(), true[bins == b].mean(), (bins == b).sum() / n
            gaps += size * abs(mean - share) / k
            reliability += size * (mean - share) ** 2
            resolution += size * (share - true.mean()) ** 2
    assert metrics.ece_classwise(p, y) == pytest.approx(gaps, abs=1e-12)
    found = metrics.brier_decomposition(p, y)
    assert found[:3] == pytest.approx((reliability, resolution, uncertainty), abs=1e-12)
    total = found.reliability - found.resolution + found.uncertainty + found.within_bin
    assert total == pytest.approx(metrics.brier(p, y), abs=1e-12)


def test_the_parts_say_what_they_are_called() -> None:
    """A model that always states the shares of the classes is reliable, resolves nothing and has only uncertainty."""
    y = np.array([0, 0, 1, 2] * 10)
    found = metrics.brier_decomposition(np.tile([0.5, 0.25, 0.25], (40, 1)), y)
    assert found == pytest.approx((0, 0, 0.625, 0), abs=1e-12)
    assert metrics.brier_decomposition(np.eye(3)[y], y) == pytest.approx((0, 0.625, 0.625, 0), abs=1e-12)


def p_values(name: str, num_sets: int, *, power: float = 1.0) -> Array:
    """P-values of a calibration error in its own null distribution; a power above 1 makes the model overconfident.

    Ties are broken at random, so that under calibration they are exactly uniform.
    """
    rng, found = np.random.default_rng(0), []
    for seed in range(num_sets):
        p = draw_model(100, 4, seed)
        y = draw_labels(p, 70_000 + seed)
        scores = Scores.of(p**power / (p**power).sum(1, keepdims=True), y)
        null_R = null_values(scores, (name,), 99, seed)[name]
        measured = value(name, scores)
        found.append(((null_R > measured).sum() + rng.random() * (1 + (null_R == measured).sum())) / 100)
    return np.array(found)


@pytest.mark.parametrize("name", ["ece", "ace"])
def test_p_values_of_a_calibrated_model_are_uniform(name: str) -> None:
    """500 sets, KS at the 1e-6 cut: its false-alarm rate. The control below is a sharpening by a power of 1.3."""
    assert kstest(p_values(name, 500), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("name", ["ece", "ace"])
def test_p_values_of_a_planted_overconfidence_are_not(name: str) -> None:
    assert kstest(p_values(name, 500, power=1.3), "uniform").pvalue < 1e-6
