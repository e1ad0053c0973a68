"""Powers that T9 to T11 state, the statistics behind them, and the batched fits against fits one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from bayesnet.battery import many_heads, simulated_predictions, simulated_ranks, simulation_based, softmax_calibration
from bayesnet.battery.base import Z_BOUND
from bayesnet.battery.seeding import seeded
from bayesnet.inference import FAMILIES, gaussian_weight
from bayesnet.inference.base import HeadPosterior, Parts
from bayesnet.inference.vbll import VBLLConfig
from bayesnet.testing import FlattenBackbone

NUM_SETS = simulation_based.NUM_SETS
NUM_WEIGHTS_AND_LOGIT, NUM_QUANTITIES = 7, 9


def test_the_cuts_are_those_of_the_docstring() -> None:
    assert simulated_ranks.chi2_cut(1) == pytest.approx(63.68, abs=0.005)
    assert simulated_ranks.ks_cut(1, NUM_SETS) == pytest.approx(2.68, abs=0.005)
    assert stats.kstwobign.isf(1e-6) == pytest.approx(2.69, abs=0.005)
    tail = stats.norm.sf(simulated_ranks.spread_cut(1))
    ends = [math.sqrt(stats.chi2.ppf(p, NUM_SETS) / NUM_SETS) for p in (tail, 1 - tail)]
    assert ends == pytest.approx([0.849, 1.158], abs=0.0005)


def test_counts_have_nearly_the_tail_of_chi2() -> None:
    """25 ranks per bin are whole numbers: at 1e-4 the chi2 statistic is above its quantile 1.1 times as often."""
    counts = np.random.default_rng(0).multinomial(NUM_SETS, [0.05] * 20, size=400_000)
    statistic = ((counts - 25.0) ** 2).sum(1) / 25
    share = float((statistic > stats.chi2.isf(1e-4, 19)).mean())
    assert 0.5e-4 < share < 1.6e-4


def test_spread_power() -> None:
    """Draws of sd r give r^-2 chi2 as the sum of squares: the sd caught with power 0.99, in closed form."""
    cut = simulated_ranks.spread_cut(NUM_WEIGHTS_AND_LOGIT)
    low, high = stats.chi2.ppf(stats.norm.cdf(-cut), NUM_SETS), stats.chi2.isf(stats.norm.sf(cut), NUM_SETS)
    narrow = math.sqrt(stats.chi2.ppf(0.01, NUM_SETS) / high)
    wide = math.sqrt(stats.chi2.ppf(0.99, NUM_SETS) / low)
    assert (narrow, wide) == pytest.approx((0.79, 1.28), abs=0.005)
    for scale in (narrow, wide):
        z_SR = np.random.default_rng(0).normal(size=(500, NUM_SETS)) / scale
        rejected = np.mean([abs(simulated_ranks.spread_score(z_R)) > cut for z_R in z_SR])
        assert rejected > 0.97


def test_shift_power() -> None:
    """A mean moved by 0.42 sd is caught by the Kolmogorov-Smirnov distance with power 0.99, by simulation."""
    rng, cut = np.random.default_rng(0), simulated_ranks.ks_cut(NUM_QUANTITIES, NUM_SETS)
    rank_SR = np.floor(1000 * stats.norm.cdf(rng.normal(size=(500, NUM_SETS)) + 0.42)).clip(0, 999).astype(int)
    rejected = np.mean([simulated_ranks.ks_statistic(rank_R) > cut for rank_R in rank_SR])
    assert rejected > 0.97


def test_ranks_of_equal_values_are_uniform() -> None:
    """A quantity with two values, each as often: ranks of the truth are 0 to L alike (chi2, 1e-6)."""
    rng = np.random.default_rng(0)
    found = simulated_ranks.ranked(
        rng.integers(0, 2, 4000), rng.integers(0, 2, (4000, simulated_ranks.NUM_DRAWS)), seed=1
    )
    assert simulated_ranks.chi2_statistic(found.rank_R) < simulated_ranks.chi2_cut(1)


def test_intervals_hold_their_share_of_the_ranks() -> None:
    ranks = torch.arange(simulated_ranks.NUM_DRAWS + 1)
    for level in softmax_calibration.LEVELS:
        assert float(softmax_calibration._central(ranks, level).double().mean()) == level


@pytest.mark.parametrize("num_covered", [0, 1, 160, 199, 200])
def test_clopper_pearson(num_covered: int) -> None:
    exact = stats.binomtest(num_covered, 200).proportion_ci(0.95, method="exact")
    lower, upper = simulated_ranks.clopper_pearson(num_covered, 200)
    assert (lower, upper) == pytest.approx((exact.low, exact.high), abs=1e-9)
    for end in {lower, upper} - {0.0, 1.0}:
        assert simulated_ranks.exact_score(num_covered, 200, end) == pytest.approx(stats.norm.isf(0.025), abs=1e-6)


def test_coverage_of_dependent_weights() -> None:
    """Nine weights that are covered together or not at all are one trial, independent ones nine."""
    rng = np.random.default_rng(0)
    together_R: simulated_ranks.Array = (rng.random(4000) < 0.8).astype(np.float64)
    apart_R: simulated_ranks.Array = (rng.random((4000, 9)) < 0.8).mean(1).astype(np.float64)
    for share_R, expected in ((together_R, 1), (apart_R, 9)):
        found = softmax_calibration.Calibration.effective_trials(share_R)
        assert found / 4000 == pytest.approx(expected, rel=0.1)


def test_gate_power() -> None:
    """An sd of z that is 5 % off the frozen one is 3 standard errors away with power 0.99.

    Squares vary between data sets as those of full_rank: their mean has a relative standard error of 1.8 %.
    """
    rng, frozen = np.random.default_rng(0), softmax_calibration.Frozen(1.0, 0.8, 0.95, 0.0, 0.8, 0.9, 0.95)
    caught = []
    for _ in range(400):
        squares_R = 1.05**2 * rng.gamma(3.0, 1 / 3, softmax_calibration.NUM_SETS)
        shares = {level: rng.binomial(9, level, len(squares_R)) / 9 for level in softmax_calibration.LEVELS}
        probability_RK, y_R = np.full((len(squares_R), 2), [0.4, 0.6]), rng.integers(0, 2, len(squares_R))
        held = {level: rng.binomial(3, level, len(squares_R)) / 3 for level in softmax_calibration.INTERVAL_LEVELS}
        found = softmax_calibration.Calibration(squares_R, shares, held, probability_RK, y_R)
        caught.append(found.distances(frozen)["sd of z"] > softmax_calibration.GATE)
    assert np.mean(caught) > 0.97


@pytest.mark.slow
def test_prediction_power() -> None:
    """Logits of the exact predictions times 0.6 or 1.5 are caught with power 0.99, by simulated labels."""
    exact_RK = simulated_predictions.predictions(1).probability_RK
    rng = np.random.default_rng(0)
    for factor in (0.6, 1.5):
        wrong_RK = exact_RK**factor / (exact_RK**factor).sum(1, keepdims=True)
        rejected = [
            _largest_z(wrong_RK, (rng.random(len(exact_RK)) < exact_RK[:, 1]) * 1) > Z_BOUND for _ in range(400)
        ]
        assert np.mean(rejected) > 0.97


def _largest_z(probability_RK: simulated_ranks.Array, y_R: NDArray[np.int64]) -> float:
    z = simulated_predictions.z_scores(simulated_predictions.Predictions(probability_RK, y_R))
    return max(map(abs, z.values()))


def test_the_factor_that_vmap_takes_is_the_librarys() -> None:
    """Value and gradient."""
    with seeded(0):
        raw_nn, scale_n = torch.randn(5, 5).double(), torch.rand(5).double() + 0.5
        weight_nn = torch.randn(5, 5).double()
    found = []
    for function in (many_heads.covariance_factor, gaussian_weight.covariance_factor):
        inputs = [raw_nn.clone().requires_grad_(), scale_n.clone().requires_grad_()]
        factor_nn, total = function(*inputs)
        gradients = torch.autograd.grad((weight_nn * factor_nn).sum() + 3 * total, inputs)
        found.append(torch.cat([factor_nn.flatten(), total[None], *(each.flatten() for each in gradients)]))
    assert torch.allclose(found[0], found[1], rtol=1e-12)


def test_fits_at_once_are_fits_one_by_one() -> None:
    """Of a loss without noise, up to rounding."""
    problems = softmax_calibration.problems_of(3, 0)
    settings = {"covariance": "dense"}
    with seeded(0):
        for index, posterior in enumerate(many_heads.fit_each("vbll", problems, settings, num_steps=50, repeats=1)):
            alone = fit_alone(problems, index)
            for name, parameter in posterior.named_parameters():
                assert torch.allclose(parameter, alone.get_parameter(name), atol=1e-4), name


def fit_alone(problems: many_heads.SoftmaxProblems, index: int, num_steps: int = 50) -> HeadPosterior:
    with seeded(0):
        posterior = FAMILIES["vbll"].build(Parts(FlattenBackbone(2), 3, 20), VBLLConfig(covariance="dense"))
    assert isinstance(posterior, HeadPosterior)
    optimizer = Adam(posterior.variational_parameters(), lr=many_heads.FIRST_RATE)
    schedule = ExponentialLR(optimizer, (many_heads.LAST_RATE / many_heads.FIRST_RATE) ** (1 / num_steps))
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.autograd.backward(posterior.loss(problems.features_RND[index], problems.y_RN[index]).total)
        optimizer.step()
        schedule.step()
    return posterior
