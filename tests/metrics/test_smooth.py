"""Smooth ECE against the definition, integrated by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from bayesnet import metrics
from bayesnet.metrics.smooth import MIN_BANDWIDTH
from tests.metrics.models import Array, draw_labels, draw_model


def brute_area(confidence: Array, residual: Array, bandwidth: float) -> float:
    """Smooth with the Gaussian kernel and its mirror images, and integrate on 10,000 points."""
    t = (np.arange(10_000) + 0.5) / 10_000
    smoothed = np.zeros_like(t)
    for place, height in zip(confidence, residual, strict=True):
        for image in (turn + sign * place for turn in range(-6, 8, 2) for sign in (1, -1)):
            smoothed += height * np.exp(-(((t - image) / bandwidth) ** 2) / 2)
    return float(np.abs(smoothed).mean() / (bandwidth * math.sqrt(2 * math.pi) * len(residual)))


@pytest.mark.parametrize(("n", "k", "seed"), [(1, 2, 0), (6, 2, 1), (25, 4, 2)])
def test_against_brute_force(n: int, k: int, seed: int) -> None:
    p = draw_model(n, k, seed)
    y = draw_labels(p, seed + 20)
    confidence, correct = p.max(1), np.array(p.argmax(1) == y, float)
    expected = brentq(lambda s: brute_area(confidence, correct - confidence, s) - s, 0.01, 1, xtol=1e-9)
    assert metrics.ece_smooth(p, y) == pytest.approx(expected, abs=1e-7)


def test_at_the_least_bandwidth_it_is_the_area_there() -> None:
    """Nearly sure and always right, but for one pair of opposite residuals that only a narrow kernel tells apart."""
    p = np.array([[1 - 4e-4, 4e-4], [1 - 2e-4, 2e-4]])
    found = metrics.ece_smooth(p, [0, 0])
    assert found < MIN_BANDWIDTH
    assert found == pytest.approx(brute_area(p.max(1), 1 - p.max(1), MIN_BANDWIDTH), rel=1e-4)


def test_perfect_answers_have_none_and_sure_mistakes_all() -> None:
    assert metrics.ece_smooth(np.eye(3), [0, 1, 2]) == 0
    assert metrics.ece_smooth(np.eye(3), [1, 2, 0]) == pytest.approx(1, abs=1e-9)
    assert metrics.ece_smooth([[1 + 5e-5, 0.0]], [0]) == pytest.approx(5e-5, abs=1e-9)  # a float32 sum above 1


def test_it_is_bounded_by_the_plain_gaps() -> None:
    """Smoothing can only cancel: mean residual <= smooth ECE <= mean size of a residual."""
    for seed in range(20):
        p = draw_model(200, 4, seed)
        y = draw_labels(p, seed + 90)
        residual = (p.argmax(1) == y) - p.max(1)
        assert abs(residual.mean()) - 1e-9 <= metrics.ece_smooth(p, y) <= np.abs(residual).mean() + 1e-9


def test_it_is_smooth_where_ece_jumps() -> None:
    """Probabilities that cross the edge of a bin change it by as little as they move."""
    step = 1e-6
    below, above = ([[0.6 + each, 0.4 - each]] * 10 + [[0.65, 0.35]] * 10 for each in (0.0, step))
    y = [0] * 10 + [1] * 10
    assert abs(metrics.ece(below, y) - metrics.ece(above, y)) > 0.1
    assert abs(metrics.ece_smooth(below, y) - metrics.ece_smooth(above, y)) < 10 * step


def test_it_finds_a_planted_overconfidence() -> None:
    p = draw_model(2000, 5, 1)
    y = draw_labels(p, 2)
    sharp = p**1.6 / (p**1.6).sum(1, keepdims=True)
    assert metrics.ece_smooth(p, y) < 0.03
    assert metrics.ece_smooth(sharp, y) > 0.1
