"""The Laplace family's objective, its evidence, its scales against quadrature (T7), and its predictives without draws.

Everything is deterministic. What is an equality holds to its tolerance; what is an approximation has a bound frozen
from the first measurement, stated where it is asserted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from bayesnet.battery.linear_gaussian import NOISE_SCALE, regressions
from bayesnet.inference import deterministic, laplace
from bayesnet.inference.base import Parts
from bayesnet.inference.laplace import Laplace, LaplaceConfig, finalize
from bayesnet.inference.laplace_evidence import best_precision, log_evidence, num_effective
from bayesnet.inference.laplace_predictive import bridge, probit
from bayesnet.inference.laplace_structures import STRUCTURES, StructureName
from bayesnet.model import linear_logits
from bayesnet.testing import FlattenBackbone, OperatorCounter, ToyProblem, build, train_toy
from bayesnet.types import LogitGaussian
from tests.inference.laplace_cases import (
    PRIOR_BIAS_SCALE,
    PRIOR_SCALE,
    PROBLEM,
    batches,
    doubled,
    find_mode,
    fitted,
    prior_fit,
    trained,
)

# The objective.


def test_the_kl_slot_is_minus_the_log_prior() -> None:
    posterior = trained()
    assert posterior.kl_is_exact
    loc_KD, scale_KD = posterior.last_layer.loc.detach(), posterior.model.head.prior_scale
    prior = Normal(torch.zeros_like(scale_KD), scale_KD)
    constant = float((scale_KD.log() + 0.5 * math.log(2 * math.pi)).sum())
    with torch.no_grad():
        loss = posterior.loss(PROBLEM.x_NCHW.double(), PROBLEM.y_N)
    negative_log_prior = -float(prior.log_prob(loc_KD).sum())
    assert float(loss.kl) == pytest.approx(negative_log_prior - constant, rel=1e-9)
    assert float(loss.total) == pytest.approx(float(loss.fit + loss.kl / 60), rel=1e-12)
    assert posterior.variational_parameters() == (posterior.last_layer.loc,), "weight decay would be a second prior"


def test_soft_labels_are_aimed_at_and_hard_ones_reported() -> None:
    posterior = trained()
    soft_NK = 0.9 * nn.functional.one_hot(PROBLEM.y_N, 3).double() + 0.1 / 3
    x = PROBLEM.x_NCHW.double()
    with torch.no_grad():
        logits_NK = linear_logits(x.flatten(1), posterior.last_layer.loc)
        hard, soft = posterior.loss(x, PROBLEM.y_N), posterior.loss(x, soft_NK)
    assert float(soft.nll) == pytest.approx(float(hard.nll))
    assert float(soft.fit) == pytest.approx(float(nn.functional.cross_entropy(logits_NK, soft_NK)))
    finalize(posterior, [(x, soft_NK)])  # the curvature does not depend on labels
    first = prior_fit(posterior).num_effective
    finalize(posterior, [(x, PROBLEM.y_N)])
    assert prior_fit(posterior).num_effective == first


def test_a_training_step_costs_what_the_twins_does() -> None:
    counts = {}
    for family in (deterministic.FAMILY, laplace.FAMILY):
        posterior = build(family, PROBLEM)
        with OperatorCounter() as counter:
            torch.autograd.backward(posterior.loss(PROBLEM.x_NCHW, PROBLEM.y_N).total)
        assert counter.num_host_syncs == 0
        counts[family.name] = counter.num_operators
    assert counts["laplace"] <= counts["deterministic"] + 30, counts


def test_training_ends_at_the_mode() -> None:
    """Within 0.005 nat of the lowest total, from 0.78 above it; that of a prior 0.8 times as wide is 0.007 above."""
    posterior = build(laplace.FAMILY, PROBLEM, prior_scale=PRIOR_SCALE, prior_bias_scale=PRIOR_BIAS_SCALE)
    train_toy(posterior, PROBLEM, steps=300)
    x, y = PROBLEM.x_NCHW, PROBLEM.y_N
    with torch.no_grad():
        best, found = trained().loss(x.double(), y).total, posterior.loss(x, y).total
    assert float(found) == pytest.approx(float(best), abs=5e-3)


# The evidence.


def test_the_evidence_of_a_gaussian_likelihood_is_exact() -> None:
    """Linear-Gaussian regressions, whose evidence is known under every prior scale (1e-9 relative)."""
    problem = regressions(5)
    for precision in (0.25, 1.0, 9.0):
        widened = problem._replace(x_RND=problem.x_RND / precision**0.5)  # w ~ N(0, I / precision)
        for x_ND, y_N, exact in zip(problem.x_RND, problem.y_RN, widened.log_evidence(), strict=True):
            hessian = x_ND.T @ x_ND / NOISE_SCALE**2
            mode = torch.linalg.solve(hessian + precision * torch.eye(3).double(), x_ND.T @ y_N / NOISE_SCALE**2)
            log_likelihood = float(Normal(x_ND @ mode, NOISE_SCALE).log_prob(y_N).sum())
            values = torch.linalg.eigvalsh(hessian)
            found = log_evidence(log_likelihood, float(mode.square().sum()), values, precision)
            assert found == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(("squared_norm", "size"), [(3.0, 1.0), (50.0, 100.0), (0.01, 10.0)])
def test_the_best_precision_is_the_maximum(squared_norm: float, size: float) -> None:
    values = size * torch.rand(40, generator=torch.Generator().manual_seed(0)).double().square()
    best = best_precision(squared_norm, values, highest=1e6)
    assert best * squared_norm == pytest.approx(num_effective(values, best), rel=1e-9)
    grid = torch.logspace(-8, 6, 2001, dtype=torch.float64).tolist()
    highest = max(log_evidence(0.0, squared_norm, values, precision) for precision in grid)
    assert log_evidence(0.0, squared_norm, values, best) >= highest
    assert log_evidence(0.0, squared_norm, values, best) == pytest.approx(highest, abs=1e-3)


def test_the_prior_stops_at_its_floor() -> None:
    posterior = trained(prior="marginal_likelihood", prior_scale_floor=0.2)
    posterior.last_layer.loc.data.zero_()
    finalize(posterior, doubled(batches()))
    fit = prior_fit(posterior)
    assert (fit.initial_scale, fit.floor) == (PRIOR_SCALE, 0.2)
    assert fit.final_scale == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_the_marginal_likelihood_moves_the_prior_towards_the_true_one(structure: StructureName) -> None:
    """Weights of standard deviation 0.3, a prior of 2: the final one is nearer in ratio, its evidence higher."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(400, 8, generator=generator)
    weight_KD = 0.3 * torch.randn(5, 9, generator=generator)
    probability_NK = (x_ND @ weight_KD[:, :-1].T + weight_KD[:, -1]).softmax(1)
    y_N = torch.multinomial(probability_NK, 1, generator=generator).squeeze(1)
    problem = ToyProblem(x_ND[:, None, None], y_N, weight_KD)
    config = LaplaceConfig(structure=structure, prior="marginal_likelihood", prior_scale=2.0, prior_bias_scale=2.0)
    posterior = Laplace(problem.parts(), config).eval()
    find_mode(posterior, problem.x_NCHW, y_N)
    finalize(posterior, batches(problem, 64))
    fit = prior_fit(posterior)
    assert 0.2 < fit.final_scale < 0.5
    assert fit.final_log_evidence > fit.initial_log_evidence + 20
    assert 0 < fit.num_effective < 45


# T7: quadrature.


class Exact:
    """The posterior of two-class logistic regression with one feature, on an 801 x 801 grid.

    Softmax weights enter the likelihood by their differences (slope, intercept), Normal with the prior's standard
    deviations times sqrt(2); their sums stay at the prior and integrate to 1.
    """

    def __init__(self, x_N: Tensor, y_N: Tensor) -> None:
        prior = math.sqrt(2) * torch.tensor([PRIOR_SCALE, PRIOR_BIAS_SCALE]).double()
        slopes, intercepts = (torch.linspace(-8, 8, 801).double() * scale for scale in prior)
        log_joint = Normal(0.0, prior[0]).log_prob(slopes)[:, None] + Normal(0.0, prior[1]).log_prob(intercepts)
        for x, y in zip(x_N.tolist(), y_N.tolist(), strict=True):
            log_joint = log_joint + nn.functional.logsigmoid((1 if y else -1) * (x * slopes[:, None] + intercepts))
        cell = float((slopes[1] - slopes[0]) * (intercepts[1] - intercepts[0]))
        self.log_evidence = float(log_joint.flatten().logsumexp(0)) + math.log(cell)
        weights = (log_joint - log_joint.flatten().logsumexp(0)).exp()
        self.scales = [_spread(slopes, weights.sum(1)), _spread(intercepts, weights.sum(0))]


def _spread(values: Tensor, weights: Tensor) -> float:
    mean = (weights * values).sum()
    return float((weights * (values - mean).square()).sum().sqrt())


def logistic_data() -> tuple[Tensor, Tensor]:
    """Return 60 images of one pixel, and labels of two classes."""
    generator = torch.Generator().manual_seed(5)
    x_N = torch.randn(60, generator=generator).double()
    return x_N[:, None, None, None], torch.bernoulli((1.2 * x_N - 0.5).sigmoid(), generator=generator).long()


def logistic_posterior(num_examples: int = 60) -> Laplace:
    """Return the full Laplace approximation at the mode, its curvature that of ``num_examples`` such images."""
    x_NCHW, y_N = logistic_data()
    config = LaplaceConfig(structure="full", prior_scale=PRIOR_SCALE, prior_bias_scale=PRIOR_BIAS_SCALE)
    posterior = Laplace(Parts(FlattenBackbone(1), 2, 60), config).double().eval()
    find_mode(posterior, x_NCHW, y_N)
    posterior.num_examples = num_examples
    finalize(posterior, [(x_NCHW, y_N)])
    return posterior


def scale_ratios(posterior: Laplace, exact: Exact) -> list[float]:
    """Return Laplace's standard deviations of slope and intercept by the exact ones."""
    root_KDM = posterior.last_layer.covariance.get_buffer("root_KDM")
    scales = (root_KDM[1] - root_KDM[0]).norm(dim=1).tolist()
    return [scale / other for scale, other in zip(scales, exact.scales, strict=True)]


def test_t7_laplace_is_near_quadrature() -> None:
    """Frozen from the first measurement: sd ratios 0.976 and 0.982, evidence 0.017 nat too low.

    Laplace is narrower by some percent at N = 60, since the posterior has heavier tails than its curvature at the mode.
    A curvature that misses a tenth of the images makes ratios of 1.021 and 1.034: caught.
    """
    x_NCHW, y_N = logistic_data()
    posterior, exact = logistic_posterior(), Exact(x_NCHW.flatten(), y_N)
    ratios = scale_ratios(posterior, exact)
    assert all(0.96 <= ratio <= 1.0 for ratio in ratios), ratios
    gap = exact.log_evidence - prior_fit(posterior).final_log_evidence
    assert abs(gap) <= 0.03, gap


def test_planted_fault_of_the_curvature_is_seen_by_quadrature() -> None:
    """The curvature of nine tenths of the images."""
    x_NCHW, y_N = logistic_data()
    ratios = scale_ratios(logistic_posterior(num_examples=54), Exact(x_NCHW.flatten(), y_N))
    assert all(ratio > 1.01 for ratio in ratios), ratios


# Predictives without draws.


def test_probit_of_two_classes_is_near_the_integral() -> None:
    """Logits of equal variance v and mean difference m: the exact integral is that of sigmoid over Normal(m, 2 v)."""
    for m, v in [(0.5, 0.3), (2.0, 1.0), (4.0, 0.5)]:
        nodes = torch.linspace(-12, 12, 20_001).double()
        exact = float(
            (Normal(0.0, 1.0).log_prob(nodes).exp() * (m + math.sqrt(2 * v) * nodes).sigmoid()).sum() * 24e-4 / 2
        )
        scale = torch.full((1, 2), v**0.5).double()
        found = probit(LogitGaussian(torch.tensor([[m, 0.0]]).double(), scale, torch.zeros(1, 2, 0).double())).exp()
        assert float(found[0, 0]) == pytest.approx(exact, abs=0.04)


def test_the_bridge_is_invariant_to_what_all_classes_share() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, scale = torch.randn(6, 4, generator=generator), torch.full((6, 4), 0.8)
    alone = bridge(LogitGaussian(mean, scale, torch.zeros(6, 4, 0)))
    shared = bridge(LogitGaussian(mean + 3.0, scale, torch.full((6, 4, 1), 300.0)))
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("predictive", [probit, bridge])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_predictives_are_finite_at_any_logits(predictive: Callable[[LogitGaussian], Tensor], size: float) -> None:
    for num_classes in (2, 10):
        mean = size * torch.randn(8, num_classes, generator=torch.Generator().manual_seed(0))
        found = predictive(LogitGaussian(mean, torch.full_like(mean, 0.5), torch.zeros(8, num_classes, 0)))
        assert found.isfinite().all()
        torch.testing.assert_close(found.exp().sum(1), torch.ones(8))


@pytest.mark.parametrize("predictive", ["probit", "bridge"])
def test_without_draws_there_is_one(predictive: str) -> None:
    posterior = fitted(predictive=predictive).float()
    assert posterior.max_draws == 1
    draws = posterior.predict_draws(PROBLEM.x_NCHW, 256)
    assert draws.shape == (1, 60, 3)
    torch.testing.assert_close(draws, draws.log_softmax(-1))
    assert torch.equal(posterior.logits(PROBLEM.x_NCHW, 4), draws)
