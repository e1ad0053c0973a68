"""T6: stochastic variational inference finds the exact posterior of linear-Gaussian regressions.

Ten data sets at once, one of them 30 x 3. A full-rank guide must find the posterior itself; the mean-field guide must
find the best factorised Gaussian: the same means, and variances 1 / diag(precision). Bounds: means within 0.1 posterior
sd, sd within 3 %, ELBO within 0.02 nat of its optimum, which for full rank is the log evidence.

The seed is fixed, and the bounds are no test of noise: the worst of ten data sets ends at 0.02 sd, 1.1 % and 0.0004
nat. The smallest faults caught are the bounds plus that: a mean moved by 0.15 sd, an sd wrong by 5 %
(`test_t6_mean_field` moves the fit by as much; T12 trains with a KL x 0.9, which makes an sd 5 % too small).
"""

from __future__ import annotations

from typing import NamedTuple

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from bayesnet.elbo import trace_elbo
from bayesnet.inference.mean_field import MeanFieldGuide
from tests.statistical.linear_gaussian import Regressions, averaged, regressions

NUM_SETS, NUM_STEPS, NUM_PARTICLES = 10, 1000, 64
MEAN_BOUND, SCALE_BOUND, GAP_BOUND = 0.1, 0.03, 0.02


class Recovery(NamedTuple):
    """How far a fitted Gaussian is from the one it should be, the worst of all data sets and coordinates.

    Attributes:
        mean_error: In standard deviations of the target.
        scale_error: |sd / target's sd - 1|.
        gap: |ELBO of the target - ELBO of the fit|, nats.
    """

    mean_error: float
    scale_error: float
    gap: float

    def accepted(self) -> bool:
        return self.mean_error < MEAN_BOUND and self.scale_error < SCALE_BOUND and self.gap < GAP_BOUND


def fit(guide: nn.Module, problem: Regressions, *, num_steps: int = NUM_STEPS, seed: int = 0) -> None:
    """Maximise the ELBO by Adam, its rate falling from 0.1 to 0.0001."""
    model = averaged(problem.program(), NUM_PARTICLES)
    family = averaged(guide, NUM_PARTICLES)
    optimizer = Adam(guide.parameters(), lr=0.1)
    schedule = ExponentialLR(optimizer, 1e-3 ** (1 / num_steps))
    torch.manual_seed(seed)
    for _ in range(num_steps):
        optimizer.zero_grad()
        terms = trace_elbo(model, family, *problem)
        torch.autograd.backward(terms.kl - terms.log_likelihood)
        optimizer.step()
        schedule.step()


def fitted_mean_field(problem: Regressions, *, num_steps: int = NUM_STEPS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return mean (R, D) and covariance (R, D, D) of a fitted `MeanFieldGuide`."""
    torch.manual_seed(seed)
    guide = MeanFieldGuide(torch.ones_like(problem.x_RND[:, 0]), 0.2).double()
    fit(guide, problem, num_steps=num_steps, seed=seed)
    return guide.loc.detach(), torch.diag_embed((2 * guide.log_scale.detach()).exp())


def fitted_stock_guide(
    name: str, problem: Regressions, *, num_steps: int = NUM_STEPS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return mean (R, D) and covariance (R, D, D) of a fitted guide of Pyro's; it has all R x D weights in one vector.

    Its posterior is exact too: independent between data sets. Low rank is exact at the rank R x D.
    """
    num_sets, _, dimension = problem.x_RND.shape
    program = problem.program()
    guide: AutoMultivariateNormal | AutoLowRankMultivariateNormal
    if name == "AutoMultivariateNormal":
        guide = AutoMultivariateNormal(program, init_scale=0.1)
    else:
        guide = AutoLowRankMultivariateNormal(program, init_scale=0.1, rank=num_sets * dimension)
    torch.manual_seed(seed)
    with pyro.get_param_store().scope():
        guide(*problem)
        guide.double()
        fit(guide, problem, num_steps=num_steps, seed=seed)
        posterior = guide.get_posterior()  # type: ignore[no-untyped-call]
    covariance = posterior.covariance_matrix.detach().reshape(num_sets, dimension, num_sets, dimension)
    sets = torch.arange(num_sets)
    return posterior.mean.detach().reshape(num_sets, dimension), covariance[sets, :, sets]


def recovery(problem: Regressions, fitted: tuple[Tensor, Tensor], *, factorised: bool) -> Recovery:
    """Compare a fit with the exact posterior, or with the best factorised Gaussian."""
    mean_RD, covariance_RDD = fitted
    exact = problem.posterior()
    target_RDD, best_R = exact.covariance_matrix, problem.log_evidence()
    if factorised:
        target_RDD = torch.diag_embed(1 / exact.precision_matrix.diagonal(dim1=1, dim2=2))
        best_R = problem.elbo(exact.mean, target_RDD)
    target_RD = target_RDD.diagonal(dim1=1, dim2=2).sqrt()
    ratio_RD = covariance_RDD.diagonal(dim1=1, dim2=2).sqrt() / target_RD
    return Recovery(
        float(((mean_RD - exact.mean) / target_RD).abs().max()),
        float((ratio_RD - 1).abs().max()),
        float((best_R - problem.elbo(mean_RD, covariance_RDD)).abs().max()),
    )


def check_mean_field_recovery() -> None:
    problem = regressions(NUM_SETS)
    found = recovery(problem, fitted_mean_field(problem), factorised=True)
    assert found.accepted(), found


def test_the_elbo_of_the_exact_posterior_is_the_evidence() -> None:
    """The formula that measures the gap, against the marginal of y, which shares no term with it."""
    problem = regressions(NUM_SETS)
    exact = problem.posterior()
    gap_R = problem.elbo(exact.mean, exact.covariance_matrix) - problem.log_evidence()
    assert float(gap_R.abs().max()) <= 1e-9


def test_the_factorised_optimum_loses_what_it_must() -> None:
    """Its gap is KL(q || p) = 1/2 (sum log diag(precision) - log det precision): no Gaussian q does better."""
    problem = regressions(NUM_SETS)
    exact = problem.posterior()
    diagonal_RD = exact.precision_matrix.diagonal(dim1=1, dim2=2)
    expected_R = 0.5 * (diagonal_RD.log().sum(1) - torch.logdet(exact.precision_matrix))
    gap_R = problem.log_evidence() - problem.elbo(exact.mean, torch.diag_embed(1 / diagonal_RD))
    assert torch.allclose(gap_R, expected_R, rtol=1e-9)
    assert float(gap_R.max()) > GAP_BOUND, "the data sets do not tell mean field from full rank"


def show(figures: dict[str, list[str]], name: str, found: Recovery) -> None:
    text = f"{name}: mean {found.mean_error:.3f} sd, sd {100 * found.scale_error:.1f} %, gap {found.gap:.5f} nat"
    figures.setdefault("T6 recovery, worst of 10 data sets", []).append(text)


def test_t6_mean_field(figures: dict[str, list[str]]) -> None:
    problem = regressions(NUM_SETS)
    mean_RD, covariance_RDD = fitted_mean_field(problem)
    found = recovery(problem, (mean_RD, covariance_RDD), factorised=True)
    show(figures, "MeanFieldGuide", found)
    assert found.accepted(), found
    sd_RD = covariance_RDD.diagonal(dim1=1, dim2=2).sqrt()
    for moved in (
        (mean_RD + 0.15 * sd_RD, covariance_RDD),
        (mean_RD - 0.15 * sd_RD, covariance_RDD),
        (mean_RD, 0.95**2 * covariance_RDD),
        (mean_RD, 1.05**2 * covariance_RDD),
    ):
        assert not recovery(problem, moved, factorised=True).accepted()


@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal"])
def test_t6_full_rank(name: str, figures: dict[str, list[str]]) -> None:
    problem = regressions(NUM_SETS)
    found = recovery(problem, fitted_stock_guide(name, problem), factorised=False)
    show(figures, name, found)
    assert found.accepted(), found


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 6))
def test_t6_other_data_and_seeds(seed: int) -> None:
    """Of larger data sets, with four times the steps: 40 weights in one full covariance converge slowly."""
    problem = regressions(NUM_SETS, num_examples=60, dimension=4, seed=100 + seed)
    steps = 4 * NUM_STEPS
    found = recovery(problem, fitted_mean_field(problem, num_steps=steps, seed=seed), factorised=True)
    assert found.accepted(), found
    fitted = fitted_stock_guide("AutoMultivariateNormal", problem, num_steps=steps, seed=seed)
    found = recovery(problem, fitted, factorised=False)
    assert found.accepted(), found
