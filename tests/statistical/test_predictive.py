"""T16 and T17: the numerics of the posterior predictive, and its decomposition of uncertainty.

Both are deterministic: no false alarms. T16 compares with 50-digit arithmetic, T17 with identities. Planted bugs of the
field must be rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, getcontext
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesnet import predictive
from bayesnet.inference.draw_table import normal_table, table_prefix
from bayesnet.predictive import entropy, interval_kind, log_mean_exp, summarize

EXTREMES: dict[str, list[list[float]]] = {
    "confidently wrong": [[0.0, 60.0, 0.0], [0.0, 45.0, -3.0]],
    "huge": [[1e4, -1e4, 0.0], [1e4, 1e4 - 1, 0.0]],
    "ties": [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]],
    "impossible class": [[0.0, -math.inf, 1.0], [0.0, -math.inf, 3.0]],
    "one draw": [[-5.0, 3.0, 40.0]],
}


def exact_log_mean_softmax(logits_SK: list[list[float]]) -> list[float]:
    """Return log(mean over draws of softmax) with 50 digits, from the definition."""
    getcontext().prec = 50
    totals = [Decimal(0)] * len(logits_SK[0])
    for logits_K in logits_SK:
        top = max(logits_K)
        weights = [Decimal(0) if value == -math.inf else (Decimal(value) - Decimal(top)).exp() for value in logits_K]
        totals = [total + weight / sum(weights) for total, weight in zip(totals, weights, strict=True)]
    return [-math.inf if not total else float((total / len(logits_SK)).ln()) for total in totals]


def check_log_mean_exp() -> None:
    for name, logits_SK in EXTREMES.items():
        expected = torch.tensor(exact_log_mean_softmax(logits_SK), dtype=torch.float64)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            log_probabilities = torch.tensor(logits_SK, dtype=dtype).log_softmax(-1)
            actual = predictive.log_mean_exp(log_probabilities, 0).double()
            finite = expected.isfinite()
            assert torch.equal(actual.isfinite(), finite), name
            error = (actual[finite] - expected[finite]).abs() / expected[finite].abs().clamp_min(1)
            assert error.max() <= tolerance, f"{name}, {dtype}: off by {error.max():.2e}"


def check_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_draws in (1, 2, 37, 256):
        logits_SK = 30 * torch.randn(num_draws, 4, generator=generator, dtype=torch.float64)
        expected = torch.tensor(exact_log_mean_softmax(logits_SK.tolist()), dtype=torch.float64)
        actual = predictive.log_mean_exp(logits_SK.log_softmax(-1), 0)
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_t16_extremes() -> None:
    check_log_mean_exp()


def test_t16_one_to_256_draws() -> None:
    check_many_draws()


def test_t16_nll_is_never_capped() -> None:
    """A probability that float32 rounds to 0 and that Categorical(probs) would cap at 15.94 nats stays what it is."""
    log_probabilities = torch.tensor([[[0.0, 51.45]]], dtype=torch.float64).log_softmax(-1)
    assert float(-log_mean_exp(log_probabilities, 0)[0, 0]) == pytest.approx(51.45, abs=1e-9)
    assert summarize(log_probabilities, 0.9).probability_BK[0, 0] == pytest.approx(math.exp(-51.45), rel=1e-9)


def draws(num_draws: int, num_images: int = 20, num_classes: int = 5, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_draws, num_images, num_classes, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def check_decomposition() -> None:
    for num_draws in (1, 2, 16, 256):
        log_probabilities = draws(num_draws)
        summary = predictive.summarize(log_probabilities, 0.9)
        probabilities = log_probabilities.exp().numpy()
        mean = probabilities.mean(0)
        total = -(mean * np.log(mean)).sum(-1)
        aleatoric = -(probabilities * np.log(probabilities)).sum(-1).mean(0)
        np.testing.assert_allclose(summary.entropy_B, total, rtol=1e-9)
        np.testing.assert_allclose(summary.expected_entropy_B, aleatoric, rtol=1e-9)
        np.testing.assert_allclose(
            summary.entropy_B, summary.expected_entropy_B + summary.mutual_information_B, rtol=0, atol=1e-15
        )
        assert (summary.mutual_information_B >= 0).all()
        assert (summary.mutual_information_B <= math.log(5) + 1e-12).all()


def test_t17_total_is_aleatoric_plus_epistemic() -> None:
    check_decomposition()


def test_t17_equal_draws_carry_no_information() -> None:
    same = draws(1).expand(64, -1, -1)
    assert (summarize(same, 0.9).mutual_information_B <= 1e-12).all()


def test_t17_disagreeing_certain_draws_reach_log_k() -> None:
    certain = torch.full((5, 1, 5), -math.inf, dtype=torch.float64)
    certain[range(5), 0, range(5)] = 0.0
    summary = summarize(certain, 0.9)
    assert summary.mutual_information_B[0] == pytest.approx(math.log(5), abs=1e-12)
    assert summary.expected_entropy_B[0] == 0.0


def test_t17_permuting_draws_or_classes_permutes_the_answer() -> None:
    log_probabilities = draws(32)
    summary = summarize(log_probabilities, 0.9)
    shuffled = summarize(log_probabilities[torch.randperm(32, generator=torch.Generator().manual_seed(1))], 0.9)
    np.testing.assert_allclose(shuffled.probability_BK, summary.probability_BK, rtol=1e-12)
    np.testing.assert_array_equal(shuffled.lower_BK, summary.lower_BK)
    flipped = summarize(log_probabilities.flip(-1), 0.9)
    np.testing.assert_array_equal(flipped.upper_BK, summary.upper_BK[:, ::-1])
    np.testing.assert_allclose(flipped.mutual_information_B, summary.mutual_information_B, atol=1e-12)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_draws", [1, 2, 16, 256])
def test_intervals_contain_the_mean_and_are_numpys_quantiles(num_draws: int, level: float) -> None:
    log_probabilities = draws(num_draws)
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


def test_table_beats_random_draws() -> None:
    """Mean probabilities of Gaussian logits, against 98,304 random draws: half the error of S random draws at most."""
    generator = torch.Generator().manual_seed(0)
    mean_BK = 2 * torch.randn(50, 10, generator=generator)
    scale_BK = torch.rand(50, 10, generator=generator) + 0.5
    long = torch.stack(
        [(mean_BK + scale_BK * torch.randn(2**12, 50, 10, generator=generator)).softmax(-1).mean(0) for _ in range(24)]
    ).mean(0)
    table = normal_table(256, 10, seed=0)
    error = ((mean_BK + scale_BK * table[:, None]).softmax(-1).mean(0) - long).square().mean().sqrt()
    random = torch.stack(
        [(mean_BK + scale_BK * torch.randn(256, 50, 10, generator=generator)).softmax(-1).mean(0) for _ in range(20)]
    )
    random_error = (random - long).square().mean().sqrt()
    assert error < 0.5 * random_error, f"table {error:.5f}, random {random_error:.5f}"


def test_table_is_the_same_everywhere() -> None:
    """Frozen values: a run must predict the same on any machine."""
    table = normal_table(256, 3, seed=0)
    assert torch.equal(table, normal_table(256, 3, seed=0))
    assert not torch.equal(table, normal_table(256, 3, seed=1))
    latin = normal_table(8, 21_300, seed=0)
    assert latin.shape == (8, 21_300)
    assert latin.mean(0).abs().max() < 1e-6


# Negative controls.


def mean_of_logits(log_values: Tensor, dim: int) -> Tensor:
    return log_values.mean(dim).log_softmax(-1)


def exponentials_in_float32(log_values: Tensor, dim: int) -> Tensor:
    return log_values.float().exp().mean(dim).clamp_min(torch.finfo(torch.float32).eps).log().to(log_values.dtype)


def sum_instead_of_mean(log_values: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(log_values, dim)


@pytest.mark.parametrize("planted", [mean_of_logits, exponentials_in_float32, sum_instead_of_mean])
@pytest.mark.parametrize("check", [check_log_mean_exp, check_many_draws])
def test_planted_mean_is_rejected(planted: Callable[[Tensor, int], Tensor], check: Callable[[], None]) -> None:
    with mock.patch.object(predictive, "log_mean_exp", planted), pytest.raises(AssertionError):
        check()


def test_planted_entropy_is_rejected() -> None:
    with mock.patch.object(predictive, "log_mean_exp", mean_of_logits), pytest.raises(AssertionError):
        check_decomposition()
