"""The intervals of the posterior predictive, and the shape of the fixed table of draws.

Its numerics (T16) and its decomposition of uncertainty (T17) are checks of `bayesnet.battery.numerics`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesnet.battery.numerics import random_draws
from bayesnet.inference.draw_table import normal_table, table_prefix
from bayesnet.predictive import entropy, interval_kind, summarize


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_draws", [1, 2, 16, 256])
def test_intervals_contain_the_mean_and_are_numpys_quantiles(num_draws: int, level: float) -> None:
    log_probabilities = random_draws(num_draws)
    summary = summarize(log_probabilities, level)
    assert (summary.lower_BK <= summary.probability_BK).all()
    assert (summary.probability_BK <= summary.upper_BK).all()
    tail = 0.0 if interval_kind(num_draws, level).startswith("range") else (1 - level) / 2
    low, high = np.quantile(log_probabilities.exp().numpy(), [tail, 1 - tail], axis=0)
    kept = ~summary.widened_BK
    np.testing.assert_allclose(summary.lower_BK[kept], low[kept], rtol=1e-9)
    np.testing.assert_allclose(summary.upper_BK[kept], high[kept], rtol=1e-9)
    outside = (low > summary.probability_BK) | (high < summary.probability_BK)
    # A mean that rounding alone puts outside may count either way.
    certain = np.minimum(abs(low - summary.probability_BK), abs(high - summary.probability_BK)) > 1e-12
    np.testing.assert_array_equal(summary.widened_BK[certain], outside[certain])


def test_skewed_draws_widen_the_interval() -> None:
    """Nineteen draws near 0 and one near 1 put the mean above the 90th percentile."""
    log_odds = torch.tensor([-9.0] * 99 + [9.0], dtype=torch.float64)
    log_probabilities = torch.stack([log_odds, torch.zeros(100).double()], -1)[:, None].log_softmax(-1)
    summary = summarize(log_probabilities, 0.9)
    assert summary.widened_BK[0, 0]
    assert summary.upper_BK[0, 0] == summary.probability_BK[0, 0]


def test_interval_kind_names_the_range_of_few_draws() -> None:
    assert interval_kind(19, 0.9) == "range of 19 draws"
    assert interval_kind(20, 0.9) == "equal-tailed, contains mean"
    assert interval_kind(1, 0.5) == "range of 1 draw"


def test_entropy_of_a_certain_distribution_is_zero() -> None:
    assert float(entropy(torch.tensor([0.0, -math.inf]))) == 0.0


# The fixed table of draws against the integrals that it stands for.


@pytest.mark.parametrize("num_draws", [128, 256])
def test_table_is_standard_normal(num_draws: int) -> None:
    table = table_prefix(normal_table(256, 10, seed=0), num_draws).double()
    assert table.mean(0).abs().max() < 1e-6
    assert (table.square().mean(0) - 1).abs().max() < 1e-5
    correlation = table.T @ table / num_draws - torch.eye(10)
    # Independent draws would have a correlation error of 1 / sqrt(S) = .09 or .06; quasi-random ones stay below.
    assert correlation.abs().max() < 0.17
    assert table.pow(4).mean() == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("num_columns", [32, 33, 100, 1000])
def test_no_two_columns_move_together(num_columns: int) -> None:
    """256 independent draws of 1,000 columns reach a correlation of 0.31; scrambled Sobol points reach 0.94 there."""
    table = normal_table(256, num_columns, seed=0).double()
    correlation = table.T @ table / 256 - torch.eye(num_columns)
    assert correlation.abs().max() < 0.4


def test_table_is_the_same_everywhere() -> None:
    """Frozen values: a run must predict the same on any machine."""
    table = normal_table(256, 3, seed=0)
    assert torch.equal(table, normal_table(256, 3, seed=0))
    assert not torch.equal(table, normal_table(256, 3, seed=1))
    latin = normal_table(8, 21_300, seed=0)
    assert latin.shape == (8, 21_300)
    assert latin.mean(0).abs().max() < 1e-6
