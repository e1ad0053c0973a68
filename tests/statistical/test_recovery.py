"""The formulas that T6 measures with, against ones that share no term with them; the smallest faults caught."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import kl_divergence

from bayesnet.battery import recovery as t6
from bayesnet.battery.base import Check
from bayesnet.battery.linear_gaussian import Regressions, regressions
from bayesnet.battery.recovery import GAP_BOUND, Gaussian, recovery


@pytest.fixture(scope="module")
def problem() -> Regressions:
    return regressions(10)


def exact(problem: Regressions) -> Gaussian:
    posterior = problem.posterior()
    return posterior.mean, posterior.covariance_matrix


def test_the_elbo_of_the_exact_posterior_is_the_evidence(problem: Regressions) -> None:
    """The formula that measures the gap, against the marginal of y, which shares no term with it."""
    gap_R = problem.elbo(*exact(problem)) - problem.log_evidence()
    assert float(gap_R.abs().max()) <= 1e-9
    assert recovery(problem, exact(problem), factorised=False) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)


def test_the_factorised_optimum_loses_what_it_must(problem: Regressions) -> None:
    """Its gap is KL(q || p) = 1/2 (sum log diag(precision) - log det precision): no Gaussian q does better."""
    posterior = problem.posterior()
    diagonal_RD = posterior.precision_matrix.diagonal(dim1=1, dim2=2)
    expected_R = 0.5 * (diagonal_RD.log().sum(1) - torch.logdet(posterior.precision_matrix))
    gap_R = problem.log_evidence() - problem.elbo(posterior.mean, torch.diag_embed(1 / diagonal_RD))
    assert torch.allclose(gap_R, expected_R, rtol=1e-9)
    assert float(gap_R.max()) > GAP_BOUND, "the data sets do not tell mean field from full rank"


def test_the_gap_counts_correlations_between_data_sets() -> None:
    """It is KL(q || posterior) of all weights at once, by torch's formula."""
    problem = regressions(2)
    mean_RD, covariance_RDD = exact(problem)
    target = torch.distributions.MultivariateNormal(mean_RD.flatten(), torch.block_diag(*covariance_RDD))
    mixing = torch.eye(6).double() + 0.05 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    fitted = torch.distributions.MultivariateNormal(target.mean, mixing @ target.covariance_matrix @ mixing.T)
    found = recovery(problem, (mean_RD, fitted.covariance_matrix), factorised=False)
    assert found.gap == pytest.approx(float(kl_divergence(fitted, target)), rel=1e-9)


def test_shared_features_make_a_matrix_normal_posterior() -> None:
    problem = regressions(4, shared_features=True)
    _, covariance_RDD = exact(problem)
    whole = torch.kron(torch.eye(4).double(), covariance_RDD[0].contiguous())
    assert torch.allclose(torch.block_diag(*covariance_RDD), whole, rtol=1e-9)
    correlation = covariance_RDD[0, 0, 1] / (covariance_RDD[0, 0, 0] * covariance_RDD[0, 1, 1]).sqrt()
    assert abs(float(correlation)) > 0.1, "the problem does not tell columns from independent ones"


@pytest.mark.parametrize("factorised", [False, True])
def test_the_stated_faults_are_outside_the_bounds(problem: Regressions, factorised: bool) -> None:
    """Moved by more than the bound and the 0.021 sd and 1.4 % that fits are off by."""
    mean_RD, covariance_RDD = exact(problem)
    if factorised:
        precision_RDD = problem.posterior().precision_matrix
        covariance_RDD = torch.diag_embed(1 / precision_RDD.diagonal(dim1=1, dim2=2))
    sd_RD = covariance_RDD.diagonal(dim1=1, dim2=2).sqrt()
    assert recovery(problem, (mean_RD, covariance_RDD), factorised=factorised).accepted()
    for moved in (
        (mean_RD + (0.15 - 0.021) * sd_RD, covariance_RDD),
        (mean_RD - (0.15 - 0.021) * sd_RD, covariance_RDD),
        (mean_RD, (0.95 * 1.014) ** 2 * covariance_RDD),
        (mean_RD, (1.05 / 1.014) ** 2 * covariance_RDD),
    ):
        assert not recovery(problem, moved, factorised=factorised).accepted()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 8))
@pytest.mark.parametrize("check", t6.CHECKS, ids=lambda check: check.name)
def test_t6_other_data_and_noise(check: Check, seed: int) -> None:
    """And the largest numbers that the docstring states."""
    findings = check.run(seed)
    assert findings.passed, findings
    assert all(outcome.value < most for outcome, most in zip(findings.outcomes, (0.021, 0.014, 0.0046), strict=True)), (
        findings
    )
