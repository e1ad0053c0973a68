"""What the docstrings of `bayesnet.battery.gradients` and `linear_gradients` say of their power."""

from __future__ import annotations

import math

import pytest

from bayesnet.battery.gradients import (
    NUM_GRADIENTS,
    Z_BOUND_OF_50,
    Estimator,
    exact_softmax_gradient,
    softmax_batch,
    softmax_gradients,
)
from bayesnet.battery.linear_gaussian import regressions
from bayesnet.battery.linear_gradients import linear_cases, linear_mean

# Estimator -> (norm of the mean gradient / its standard deviation, for one draw; smallest fault / that norm).
SNR: dict[Estimator, float] = {"local": 1.80, "weight": 1.43}
SMALLEST_FAULT: dict[Estimator, float] = {"local": 0.042, "weight": 0.040}
STANDARD_ERRORS = Z_BOUND_OF_50 + 2.33


@pytest.mark.parametrize("estimator", ["local", "weight"])
def test_the_stated_power_is_the_real_one(estimator: Estimator, figures: dict[str, list[str]]) -> None:
    """And the signal-to-noise ratio, from gradients that the check did not see."""
    norm = float(exact_softmax_gradient(softmax_batch()).norm())
    gradients_SP = softmax_gradients(estimator, softmax_batch(), seed=1)
    snr = norm / float(gradients_SP.var(0).sum().sqrt())
    figures.setdefault("T5 gradients", []).append(f"{estimator}: signal-to-noise ratio of one draw {snr:.2f}")
    assert snr == pytest.approx(SNR[estimator], rel=0.05)
    worst = STANDARD_ERRORS * float(gradients_SP.std(0).max()) / math.sqrt(NUM_GRADIENTS)
    assert worst / norm == pytest.approx(SMALLEST_FAULT[estimator], rel=0.1)


def test_the_stated_power_of_the_regression_is_the_real_one() -> None:
    problem = regressions(1)
    worst = []
    for case in linear_cases(problem, NUM_GRADIENTS):
        gradients_SP, expected_P = linear_mean(problem, case, seed=1)
        error = float(gradients_SP.std(0).max()) / math.sqrt(NUM_GRADIENTS)
        worst.append(STANDARD_ERRORS * error / float(expected_P.norm()))
    assert max(worst) == pytest.approx(0.12, abs=0.01)


def test_local_gradients_have_less_noise() -> None:
    assert SNR["local"] > SNR["weight"]
