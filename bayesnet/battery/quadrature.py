"""T7: a logistic head of two parameters, slope and bias, against quadrature on a grid of 801 x 801.

d is the difference of the two classes' weights: see logistic.py.

NUTS: means of the four weights, means and second moments of d, nine z-scores with their effective sample sizes below
4.892 (1e-6 each). 1,350 draws, worth 800 or more; the smallest faults caught with power 0.99 are a mean moved by
0.25 sd and an sd wrong by 20 %; planted are 0.3 sd and 25 %. A prior twice as wide is none of them here.

Gaussians: sd ratio of d, means, and evidence less ELBO (exact but for Gauss-Hermite, 64 nodes), which must not be
negative either. Seed 0 is frozen, the regions are no test of noise. What was measured, and what it is held to:

| fit | sd ratios | gap, nat | region |
|---|---|---|---|
| guide, AutoMultivariateNormal | 0.97 1.03 | 0.012 | [0.95, 1.05], 0.02: as for any full covariance |
| full_rank | 0.99 1.00 | 0.005 | the same |
| matrix_normal | 0.97 1.02 | 0.022 | [0.95, 1.05], 0.03 |
| low_rank, R = 4 | 1.02 1.05 | 0.029 | [0.94, 1.06], 0.04 |
| mean field, one row of weights | 0.97 0.97 | 0.03 | [0.88, 1.02], 0.12: as for any factorised Gaussian |
| mean_field | 1.36 1.36 | 1.82 | [1.25, 1.42], 2.4 |
| vbll | 0.90 0.93 | 2.42 | [0.88, 0.95], 3.2 |
| vbll, dense | 0.94 0.97 | 2.39 | [0.92, 0.99], 3.2 |
| laplace (kronecker) | 0.92 0.96 | 0.026 | [0.88, 1.02], 0.035 |
| laplace, full | 0.97 0.98 | 0.013 | [0.95, 1.02], 0.018 |
| laplace, diagonal | 1.31 1.33 | 1.85 | [1.25, 1.42], 2.4 |

mean_field is outside the region of factorised Gaussians, and has to be: it takes the two *classes* for independent too.
The data tie w_0 and w_1 together; without that correlation, a curvature h of the likelihood and a prior sd of 1 give d
the variance 2 / (h + 1) in the place of 2 / (2 h + 1), an sd up to sqrt(2) = 1.41 too large. With one row of weights
(prior sd sqrt(2): the same posterior of d) the factorised guide is where it should be. vbll maximises a looser bound
than the ELBO, and pays for it in nats. The smallest faults caught in all Gaussians are an sd wrong by 20 % and a mean
moved by 0.26 sd.

Families without a Gaussian on the last layer or without a prior (nuts, mc_dropout, swag, ensemble) have no ELBO.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from bayesnet.battery.base import Z_BOUND, Check, Fault, Findings, Outcome, largest
from bayesnet.battery.faults import KL_TIMES_2
from bayesnet.battery.fitted import KL_TWICE, NARROW_MOMENTS, OTHER_LABELS, PRIOR_TWICE_AS_WIDE, fit
from bayesnet.battery.linear_gaussian import averaged
from bayesnet.battery.logistic import DIFFERENCES, PRIOR_VARIANCE, Moments, elbo, of_weights, problem, truth
from bayesnet.battery.seeding import seeded
from bayesnet.convergence import mcse_mean
from bayesnet.elbo import trace_elbo
from bayesnet.inference import FAMILIES, nuts_sampler
from bayesnet.inference.base import GaussianHeadPosterior
from bayesnet.inference.guide import GuidePosterior
from bayesnet.inference.laplace import Laplace
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.inference.nuts_sampler import Chains, HeadTarget, sample_head
from bayesnet.model import LABEL, WEIGHT, BayesianHead

MEAN_BOUND = 0.15
EXCESS_BOUND = 1e-4


def family_gaussian(name: str, num_steps: int, settings: Mapping[str, Any], seed: int) -> Moments:
    """Return the Gaussian of a family, read off its logits at x = 0, 1 and -1."""
    data = problem()
    posterior = fit(name, data, num_steps=num_steps, seed=seed, settings=settings)
    assert isinstance(posterior, GaussianHeadPosterior)
    with torch.no_grad():
        mean_BK, scale_BK, factor_BKR = posterior.head.logit_moments(torch.tensor([[0.0], [1.0], [-1.0]]))
        kl = None if isinstance(posterior, Laplace) else float(posterior.loss(data.x_NCHW, data.y_N).kl)
    covariance_BKK = (factor_BKR @ factor_BKR.mT + torch.diag_embed(scale_BK.square())).double()
    # Of slope and bias of two classes, logits show the mean of the two covariances alone; d sees no more of them.
    bias_KK, cross_KK = covariance_BKK[0], (covariance_BKK[1] - covariance_BKK[2]) / 4
    slope_KK = (covariance_BKK[1] + covariance_BKK[2]) / 2 - bias_KK
    blocks = torch.stack([slope_KK, cross_KK, cross_KK, bias_KK]).unflatten(0, (2, 2))
    mean_KD = torch.stack([mean_BK[1] - mean_BK[0], mean_BK[0]], 1).double()
    return of_weights(mean_KD.flatten(), blocks.permute(2, 0, 3, 1).reshape(4, 4), kl)


def one_row(seed: int) -> Moments:
    """Return the factorised Gaussian of slope and bias that stochastic variational inference finds."""
    data = problem()

    def program(x_N: Tensor, y_N: Tensor) -> None:
        prior = dist.Normal(torch.zeros(1, 2).double(), math.sqrt(PRIOR_VARIANCE)).to_event(2)
        weight = pyro.sample(WEIGHT, prior).flatten(-2)
        with pyro.plate("data", len(y_N)):
            pyro.sample(LABEL, dist.Bernoulli(logits=weight[..., 0] * x_N + weight[..., 1]), obs=y_N)

    prior_scale_KD = torch.full((1, 2), math.sqrt(PRIOR_VARIANCE)).double()
    with seeded(seed):
        guide = MeanFieldGuide(prior_scale_KD, 0.2).double()
        model, guide_64 = averaged(program, 64), averaged(guide, 64)
        optimizer = Adam(guide.parameters(), lr=0.1)
        schedule = ExponentialLR(optimizer, 1e-3 ** (1 / 500))
        for _ in range(500):
            optimizer.zero_grad()
            terms = trace_elbo(model, guide_64, data.x_NCHW.flatten().double(), data.y_N.double())
            torch.autograd.backward(terms.kl - terms.log_likelihood)
            optimizer.step()
            schedule.step()
    mean_d, covariance_dd = guide.loc.detach()[0], (2 * guide.log_scale.detach()[0]).exp().diag()
    return Moments(elbo(mean_d, covariance_dd, float(guide.kl(prior_scale_KD).detach())), mean_d, covariance_dd)


def stock_guide(seed: int) -> Moments:
    """Return the Gaussian of Pyro's AutoMultivariateNormal."""
    settings = {"guide": "AutoMultivariateNormal"}
    posterior = fit("guide", problem(), num_steps=3000, repeats=1, seed=seed, settings=settings)
    assert isinstance(posterior, GuidePosterior)
    assert isinstance(posterior.guide.owner, AutoMultivariateNormal)
    gaussian = posterior.guide.owner.get_posterior()
    return of_weights(gaussian.mean.detach().double(), gaussian.covariance_matrix.detach().double())


class Region(NamedTuple):
    """What a fit is held to.

    Attributes:
        ratio: Where the two ratios sd / exact sd of d should be.
        width: How far from there they may be.
        gap: Largest log evidence less ELBO, nats; None for a fit whose bound is not the matter.
    """

    ratio: float
    width: float
    gap: float | None


def compare(name: str, fitted: Callable[[int], Moments], region: Region, seed: int) -> Findings:
    """Return how far a fitted Gaussian is from the exact posterior of d, and the row of its family."""
    found, exact = fitted(seed), truth()
    scale_d = exact.covariance_dd.diagonal().sqrt()
    ratios_d = found.covariance_dd.diagonal().sqrt() / scale_d
    what = f"{name}: sd ratios {ratios_d[0]:.3f} and {ratios_d[1]:.3f}, larger distance from {region.ratio:g}"
    outcomes = [
        Outcome(what, largest((ratios_d - region.ratio).abs().tolist()), region.width),
        Outcome(f"{name}: largest error of a mean, sd", largest(_in_sd(found, exact)), MEAN_BOUND),
        Outcome(f"{name}: ELBO less log evidence, nat", found.evidence - exact.evidence, EXCESS_BOUND),
    ]
    gap = exact.evidence - found.evidence
    if region.gap is not None:
        outcomes.append(Outcome(f"{name}: log evidence less ELBO, nat", gap, region.gap))
    return Findings(outcomes, {name: {"elbo_gap": gap}} if name in FAMILIES else {})


def _in_sd(found: Moments, exact: Moments) -> list[float]:
    """Return the errors of the means in exact standard deviations."""
    errors: list[float] = ((found.mean_d - exact.mean_d) / exact.covariance_dd.diagonal().sqrt()).abs().tolist()
    return errors


def sampled(seed: int) -> Findings:
    """Return the z-scores of what NUTS says of the weights and of d."""
    data, exact = problem(), truth()
    target = HeadTarget(BayesianHead(1, 2, 60, 1.0, 1.0), data.x_NCHW.flatten(1), data.y_N)
    found = sample_head(target, torch.zeros(2, 2), chains=3, warmup=100, draws=450, seed=seed)
    difference_CS2 = found.draws_CSP @ DIFFERENCES.T
    deviation_CS2 = difference_CS2 - exact.mean_d
    product_CS1 = deviation_CS2.prod(-1, keepdim=True)
    draws = torch.cat([found.draws_CSP, difference_CS2, deviation_CS2.square(), product_CS1], -1)
    half_d, covariance_dd = exact.mean_d / 2, exact.covariance_dd
    expected = torch.cat([-half_d, half_d, exact.mean_d, covariance_dd.diagonal(), covariance_dd[0, 1:]])
    errors = torch.tensor([mcse_mean(draws_CS) for draws_CS in draws.permute(2, 0, 1).numpy()])
    z = (draws.mean((0, 1)) - expected) / errors
    what = "nuts: largest |z| of four means of weights, and two means and three moments of d"
    outcomes = [Outcome(what, largest(z.abs().tolist()), Z_BOUND)]
    return Findings([*outcomes, Outcome("nuts: draws that diverged", found.num_divergences, 0)])


@contextlib.contextmanager
def _moved_draws(*, scale: float = 1.0, shift: float = 0.0) -> Iterator[None]:
    """Make the sampler's draws have another sd, or means moved by a number of sd."""
    original = nuts_sampler.run_chains

    @functools.wraps(original)
    def moved(*args: Any, **kwargs: Any) -> Chains:  # noqa: ANN401 - whatever the original takes
        found = original(*args, **kwargs)
        mean_P, scale_P = found.draws_CSP.mean((0, 1)), found.draws_CSP.std((0, 1))
        return found._replace(draws_CSP=mean_P + scale * (found.draws_CSP - mean_P) + shift * scale_P)

    with mock.patch.object(nuts_sampler, "run_chains", moved):
        yield


FULL, FACTORISED = Region(1.0, 0.05, 0.02), Region(0.95, 0.07, 0.12)

SPREAD = Fault("sd of the chains x .75", lambda: _moved_draws(scale=0.75))
SHIFT = Fault("means of the chains moved by .3 sd", lambda: _moved_draws(shift=0.3))
FAULTS = (KL_TWICE, OTHER_LABELS, NARROW_MOMENTS)


def _check(
    name: str,
    region: Region,
    fitted: Callable[[int], Moments],
    faults: tuple[Fault, ...],
    *,
    full: bool = False,
) -> Check:
    run = functools.partial(compare, name, fitted, region)
    return Check("T7", f"{name} against quadrature", run, faults, full)


def _family_check(
    name: str,
    region: Region,
    faults: tuple[Fault, ...] = (*FAULTS, PRIOR_TWICE_AS_WIDE),
    *,
    settings: Mapping[str, Any] | None = None,
    num_steps: int = 1000,
    full: bool = False,
) -> Check:
    """Return the check of a family, its name followed by a comma and words where it is not the default."""
    fitted = functools.partial(family_gaussian, name.partition(",")[0], num_steps, settings or {})
    return _check(name, region, fitted, faults, full=full)


CHECKS: tuple[Check, ...] = (
    Check("T7", "nuts against quadrature", sampled, (SPREAD, SHIFT)),
    _check("mean field, one row", FACTORISED, one_row, (KL_TIMES_2,)),
    _family_check("mean_field", Region(1.335, 0.085, 2.4)),
    _family_check("laplace", FACTORISED._replace(gap=0.035)),
    _family_check("laplace, full", Region(0.985, 0.035, 0.018), settings={"structure": "full"}),
    _family_check("laplace, diagonal", Region(1.335, 0.085, 2.4), FAULTS, settings={"structure": "diagonal"}),
    _family_check("matrix_normal", FULL._replace(gap=0.03), full=True),
    _family_check("low_rank", Region(1.0, 0.06, 0.04), num_steps=2000, settings={"rank": 4}, full=True),
    _family_check("full_rank", FULL, num_steps=2000, full=True),
    _family_check("vbll", Region(0.915, 0.035, 3.2), full=True),
    _family_check("vbll, dense", Region(0.955, 0.035, 3.2), settings={"covariance": "dense"}, full=True),
    _check("guide, AutoMultivariateNormal", FULL, stock_guide, (PRIOR_TWICE_AS_WIDE,), full=True),
)
