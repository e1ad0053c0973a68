"""T7: a logistic head of two parameters, slope and bias, against quadrature on a grid of 801 x 801.

A softmax head of two classes and one feature has four weights, but its likelihood sees only the two differences between
classes, d = w_1 - w_0 ~ N(0, 2 I) a priori; the sums keep their prior. So a grid over d gives the evidence, and mean
and covariance of d and of all four weights, exactly (an 8 sd square; 401 points give the same to 1e-7).

NUTS: means of the four weights, means and second moments of d, nine z-scores with their effective sample sizes below
4.892 (1e-6 each). 1,350 draws, worth 800 or more; the smallest faults caught with power 0.99 are a mean moved by
0.25 sd and an sd wrong by 20 %; the controls plant 0.3 sd and 25 %.

Gaussians: sd ratio of d and evidence less ELBO (exact but for Gauss-Hermite, 64 nodes). The seed is fixed and the
regions are no test of noise. What was measured, and what it is held to:

| fit | sd ratios | gap, nat | region |
|---|---|---|---|
| AutoMultivariateNormal | 0.97 1.03 | 0.012 | [0.95, 1.05], 0.02: as for any full covariance |
| full_rank | 0.99 1.00 | 0.005 | the same |
| mean field, one row of weights | 0.97 0.97 | 0.03 | [0.88, 1.02], 0.12: as for any factorised Gaussian |
| mean_field | 1.36 1.36 | 1.82 | [1.25, 1.42], 2.0 |
| laplace, full | 0.97 0.98 | - | [0.95, 1.02] |
| laplace, kronecker | 0.92 0.96 | - | [0.88, 1.02] |
| laplace, diagonal | 1.31 1.33 | - | [1.25, 1.42] |

mean_field is outside the region of factorised Gaussians, and has to be: it takes the two *classes* for independent too.
The data tie w_0 and w_1 together; without that correlation, a curvature h of the likelihood and a prior sd of 1 give d
the variance 2 / (h + 1) in the place of 2 / (2 h + 1), an sd up to sqrt(2) = 1.41 too large. With one row of weights
(prior sd sqrt(2): the same posterior of d) the factorised guide is where it should be.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from bayesnet.convergence import mcse_mean
from bayesnet.elbo import trace_elbo
from bayesnet.inference.base import GaussianHeadPosterior
from bayesnet.inference.guide import GuidePosterior
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.inference.nuts_sampler import HeadTarget, sample_head
from bayesnet.model import LABEL, WEIGHT, BayesianHead
from bayesnet.testing import ToyProblem, toy_problem
from tests.statistical.fitted import fit
from tests.statistical.linear_gaussian import averaged

PRIOR_VARIANCE = 2.0
LIMIT = 4.892
DIFFERENCES = torch.tensor([[-1.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 1.0]]).double()
"""From the weights (slope and bias of class 0, then of class 1) to d."""


class Moments(NamedTuple):
    """A distribution of d = (slope, bias): log evidence or ELBO in nats, mean (2,), covariance (2, 2)."""

    evidence: float
    mean_d: Tensor
    covariance_dd: Tensor


@pytest.fixture(scope="module")
def problem() -> ToyProblem:
    return toy_problem(60, 1, 2)


@pytest.fixture(scope="module")
def truth(problem: ToyProblem) -> Moments:
    return quadrature(problem)


def quadrature(problem: ToyProblem, num_points: int = 801, half_width: float = 8.0) -> Moments:
    """Return the exact posterior of d."""
    grid = torch.linspace(-half_width, half_width, num_points, dtype=torch.float64)
    slope, bias = grid[:, None], grid[None]
    log_joint = -(slope**2 + bias**2) / (2 * PRIOR_VARIANCE) - math.log(2 * math.pi * PRIOR_VARIANCE)
    for x, y in zip(problem.x_NCHW.flatten().double(), problem.y_N, strict=True):
        log_joint = log_joint + torch.nn.functional.logsigmoid((2 * y - 1) * (slope * x + bias))
    log_cell = 2 * math.log(float(grid[1] - grid[0]))
    evidence = float(log_joint.flatten().logsumexp(0)) + log_cell
    mass = (log_joint - evidence + log_cell).exp()
    mean_d = torch.stack([(mass * slope).sum(), (mass * bias).sum()])
    slope, bias = slope - mean_d[0], bias - mean_d[1]
    cross = (mass * slope * bias).sum()
    covariance_dd = torch.stack([(mass * slope**2).sum(), cross, cross, (mass * bias**2).sum()]).view(2, 2)
    return Moments(evidence, mean_d, covariance_dd)


def elbo(problem: ToyProblem, mean_d: Tensor, covariance_dd: Tensor, kl: float) -> float:
    """Return the exact ELBO of a Gaussian of d whose weights are KL nats from their prior."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    x_N = problem.x_NCHW.flatten().double()
    columns_N2 = torch.stack([x_N, torch.ones_like(x_N)], 1)
    scale_N = ((columns_N2 @ covariance_dd) * columns_N2).sum(1).sqrt()
    logits_NG = (columns_N2 @ mean_d)[:, None] + scale_N[:, None] * torch.tensor(nodes)
    log_likelihood_NG = torch.nn.functional.logsigmoid((2 * problem.y_N - 1)[:, None] * logits_NG)
    return float((log_likelihood_NG * torch.tensor(weights / weights.sum())).sum()) - kl


def test_the_grid_is_fine_and_wide_enough(problem: ToyProblem, truth: Moments) -> None:
    for other in (quadrature(problem, num_points=401), quadrature(problem, num_points=501, half_width=10)):
        assert other.evidence == pytest.approx(truth.evidence, abs=1e-7)
        assert torch.allclose(other.covariance_dd, truth.covariance_dd, rtol=1e-6)


def test_t7_nuts(problem: ToyProblem, truth: Moments, figures: dict[str, list[str]]) -> None:
    target = HeadTarget(BayesianHead(1, 2, 60, 1.0, 1.0), problem.x_NCHW.flatten(1), problem.y_N)
    found = sample_head(target, torch.zeros(2, 2), chains=3, warmup=100, draws=450, seed=0)
    assert found.num_divergences == 0
    difference_CS2 = found.draws_CSP @ DIFFERENCES.T
    half_d = truth.mean_d / 2

    def largest(shift: float = 0.0, scale: float = 1.0) -> float:
        """Return the largest |z|, of what is expected after moving means by ``shift`` sd and multiplying sd."""
        sd_d = truth.covariance_dd.diagonal().sqrt()
        mean_d, deviation_CS2 = truth.mean_d + shift * sd_d, difference_CS2 - truth.mean_d
        product_CS = deviation_CS2.prod(-1, keepdim=True)
        draws = torch.cat([found.draws_CSP, difference_CS2, deviation_CS2.square(), product_CS], -1)
        second = scale**2 * torch.cat([truth.covariance_dd.diagonal(), truth.covariance_dd[0, 1:]])
        expected = torch.cat([-half_d, half_d, mean_d, second])
        errors = torch.tensor([mcse_mean(draws_CS) for draws_CS in draws.permute(2, 0, 1).numpy()])
        return float(((draws.mean((0, 1)) - expected) / errors).abs().max())

    figures.setdefault("T7 quadrature", []).append(f"NUTS: largest |z| of nine {largest():.2f}")
    assert largest() < LIMIT
    for control in (largest(shift=0.3), largest(shift=-0.3), largest(scale=1.25), largest(scale=0.75)):
        assert control > LIMIT


def one_row(problem: ToyProblem) -> Moments:
    """Return the factorised Gaussian of slope and bias that stochastic variational inference finds."""

    def program(x_N: Tensor, y_N: Tensor) -> None:
        prior = dist.Normal(torch.zeros(1, 2).double(), math.sqrt(PRIOR_VARIANCE)).to_event(2)
        weight = pyro.sample(WEIGHT, prior).flatten(-2)
        with pyro.plate("data", len(y_N)):
            pyro.sample(LABEL, dist.Bernoulli(logits=weight[..., 0] * x_N + weight[..., 1]), obs=y_N)

    torch.manual_seed(0)
    prior_scale_KD = torch.full((1, 2), math.sqrt(PRIOR_VARIANCE)).double()
    guide = MeanFieldGuide(prior_scale_KD, 0.2).double()
    model, family = averaged(program, 64), averaged(guide, 64)
    optimizer = Adam(guide.parameters(), lr=0.1)
    schedule = ExponentialLR(optimizer, 1e-3 ** (1 / 500))
    for _ in range(500):
        optimizer.zero_grad()
        terms = trace_elbo(model, family, problem.x_NCHW.flatten().double(), problem.y_N.double())
        torch.autograd.backward(terms.kl - terms.log_likelihood)
        optimizer.step()
        schedule.step()
    mean_d, covariance_dd = guide.loc.detach()[0], (2 * guide.log_scale.detach()[0]).exp().diag()
    kl = float(guide.kl(prior_scale_KD).detach())
    return Moments(elbo(problem, mean_d, covariance_dd, kl), mean_d, covariance_dd)


def stock_guide(problem: ToyProblem) -> Moments:
    """Return the Gaussian of Pyro's AutoMultivariateNormal."""
    posterior = fit("guide", problem, num_steps=3000, repeats=1, guide="AutoMultivariateNormal")
    assert isinstance(posterior, GuidePosterior)
    assert isinstance(posterior.guide.owner, AutoMultivariateNormal)
    gaussian = posterior.guide.owner.get_posterior()
    mean_4, covariance_44 = gaussian.mean.detach().double(), gaussian.covariance_matrix.detach().double()
    kl = 0.5 * (covariance_44.trace() + mean_4.square().sum() - 4 - torch.logdet(covariance_44))
    mean_d, covariance_dd = DIFFERENCES @ mean_4, DIFFERENCES @ covariance_44 @ DIFFERENCES.T
    return Moments(elbo(problem, mean_d, covariance_dd, float(kl)), mean_d, covariance_dd)


def family(problem: ToyProblem, name: str, num_steps: int = 1000, **settings: Any) -> Moments:  # noqa: ANN401
    """Return the Gaussian of a family, read off its logits at x = 0, 1 and -1."""
    posterior = fit(name, problem, num_steps=num_steps, **settings)
    assert isinstance(posterior, GaussianHeadPosterior)
    with torch.no_grad():
        moments = posterior.head.logit_moments(torch.tensor([[0.0], [1.0], [-1.0]]))
        kl = float(posterior.loss(problem.x_NCHW, problem.y_N).kl)
    mean = (moments.mean_BK[:, 1] - moments.mean_BK[:, 0]).double()
    factor_BR = moments.factor_BKR[:, 1] - moments.factor_BKR[:, 0]
    variance = (moments.scale_BK.square().sum(1) + factor_BR.square().sum(1)).double()
    cross = (variance[1] - variance[2]) / 4
    slope = (variance[1] + variance[2]) / 2 - variance[0]
    mean_d, covariance_dd = torch.stack([mean[1] - mean[0], mean[0]]), torch.stack([slope, cross, cross, variance[0]])
    covariance_dd = covariance_dd.view(2, 2)
    return Moments(elbo(problem, mean_d, covariance_dd, kl), mean_d, covariance_dd)


class Region(NamedTuple):
    """What a fit is held to: bounds of the sd ratios, largest gap in nats (none where the KL is not of the fit)."""

    lowest: float
    highest: float
    gap: float | None

    def accepts(self, ratios: Tensor, gap: float) -> bool:
        within = self.lowest <= float(ratios.min()) and float(ratios.max()) <= self.highest
        return within and (self.gap is None or -1e-4 <= gap <= self.gap)


FULL, FACTORISED = Region(0.95, 1.05, 0.02), Region(0.88, 1.02, 0.12)
FITS: dict[str, tuple[Any, Region]] = {
    "AutoMultivariateNormal": (stock_guide, FULL),
    "full_rank": (lambda problem: family(problem, "full_rank", num_steps=2000), FULL),
    "mean field, one row": (one_row, FACTORISED),
    "mean_field": (lambda problem: family(problem, "mean_field"), Region(1.25, 1.42, 2.0)),
    "laplace full": (lambda problem: family(problem, "laplace", structure="full"), Region(0.95, 1.02, None)),
    "laplace kronecker": (lambda problem: family(problem, "laplace", structure="kronecker"), Region(0.88, 1.02, None)),
    "laplace diagonal": (lambda problem: family(problem, "laplace", structure="diagonal"), Region(1.25, 1.42, None)),
}


SLOW = ("full_rank",)
CASES = [pytest.param(name, marks=[pytest.mark.nightly] * (name in SLOW)) for name in FITS]


@pytest.mark.parametrize("name", CASES)
def test_t7_gaussians(name: str, problem: ToyProblem, truth: Moments, figures: dict[str, list[str]]) -> None:
    run, region = FITS[name]
    found: Moments = run(problem)
    ratios = (found.covariance_dd.diagonal() / truth.covariance_dd.diagonal()).sqrt()
    error = float(((found.mean_d - truth.mean_d) / truth.covariance_dd.diagonal().sqrt()).abs().max())
    gap = truth.evidence - found.evidence
    words = f"{name}: sd ratios {ratios[0]:.3f} {ratios[1]:.3f}, mean {error:.3f} sd"
    words += "" if region.gap is None else f", gap {gap:.4f} nat"
    figures.setdefault("T7 quadrature", []).append(words)
    assert region.accepts(ratios, gap), words
    assert error < 0.15, words
    assert not region.accepts(0.8 * ratios, gap), "an sd 20 % too small is outside every region"
    assert not region.accepts(1.2 * ratios, gap)
