"""VBLL: the bound against quadrature, its gap against theory, its gradients, the dense guide against torch, its limits.

Everything here is deterministic but the two tests of draws, which name their false alarm and their smallest fault.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam as PyroAdam  # type: ignore[attr-defined]
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal, kl_divergence

from bayesnet.errors import ConfigError
from bayesnet.inference import deterministic, vbll
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.inference.vbll import FAMILY, VBLL, DenseGuide, VBLLConfig, bound_loss
from bayesnet.model import BayesianHead
from bayesnet.testing import (
    CHECKS,
    FlattenBackbone,
    OperatorCounter,
    build,
    check_batches_add_up,
    check_scale_is_fitted,
    loss_value,
    toy_problem,
    train_toy,
)
from bayesnet.types import LogitGaussian, Loss

COVARIANCES = ("diagonal", "dense")
NUM_DRAWS = 20_000
Z_CUT = 5.612  # 1e-6 for at most 50 quantities together


def with_covariance(covariance: str) -> Family:
    return FAMILY._replace(build=lambda parts, config: VBLL(parts, dataclasses.replace(config, covariance=covariance)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("covariance", ["dense"])
def test_conforms(covariance: str, check: Callable[[Family], None]) -> None:
    check(with_covariance(covariance))


# The bound.


def random_moments(scale: float, *, num_images: int = 20, num_classes: int = 3) -> LogitGaussian:
    """Return the logits of heads that are all different; spreads up to ``scale``. Float64."""
    generator = torch.Generator().manual_seed(0)
    mean_BK = 3 * torch.randn(num_images, num_classes, generator=generator, dtype=torch.float64)
    scale_BK = scale * torch.rand(num_images, num_classes, generator=generator, dtype=torch.float64)
    return LogitGaussian(mean_BK, scale_BK, mean_BK.new_empty((num_images, num_classes, 0)))


def expected_nll(moments: LogitGaussian, y_B: Tensor, num_points: int = 40) -> Tensor:
    """Return E[-log softmax(z)_y] of each image (B,), z independent Gaussian, by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(num_points)
    num_classes = moments.mean_BK.shape[1]
    grid_PK = torch.cartesian_prod(*[torch.from_numpy(points)] * num_classes)
    weight_P = torch.cartesian_prod(*[torch.from_numpy(weights / weights.sum())] * num_classes).prod(1)
    logits_PBK = moments.mean_BK + moments.scale_BK * grid_PK[:, None]
    nll_PB = -logits_PBK.log_softmax(-1)[:, torch.arange(len(y_B)), y_B]
    return weight_P @ nll_PB


def bounds(moments: LogitGaussian, y_B: Tensor) -> Tensor:
    """Return the bound of each image by itself (B,)."""
    one = [LogitGaussian(*(part[i : i + 1] for part in moments)) for i in range(len(y_B))]
    return torch.stack([bound_loss(m, y, torch.tensor(0.0), 10).fit for m, y in zip(one, y_B.split(1), strict=True)])


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_bound_is_never_below_the_exact_expectation(scale: float, num_classes: int) -> None:
    """Quadrature is exact to 1e-4 here at the largest spread: doubling its points changes less."""
    moments = random_moments(scale, num_classes=num_classes)
    y_B = torch.arange(20) % num_classes
    exact_B = expected_nll(moments, y_B)
    assert torch.allclose(exact_B, expected_nll(moments, y_B, 28), atol=1e-4)
    assert (bounds(moments, y_B) >= exact_B - 1e-4 * scale).all()


def test_the_gap_vanishes_with_the_spreads_as_theory_says() -> None:
    """Gap / (1/2 sum_k p_k^2 s_k^2) -> 1: any wrong factor on the variance fails it."""
    y_B = torch.zeros(20, dtype=torch.int64)
    moments = random_moments(1e-2)
    probability_BK = moments.mean_BK.softmax(-1)
    gap_B = bounds(moments, y_B) - expected_nll(moments, y_B, 12)
    theory_B = 0.5 * (probability_BK * moments.scale_BK).square().sum(-1)
    assert torch.allclose(gap_B, theory_B, rtol=1e-3, atol=1e-12)
    point = moments._replace(scale_BK=torch.zeros_like(moments.scale_BK))
    assert torch.allclose(bounds(point, y_B), -point.mean_BK.log_softmax(-1)[:, 0], rtol=1e-14)


def test_the_bound_holds_for_coupled_logits() -> None:
    """One-sided: false alarm 1e-6 for 20 images together; a bound 0.05 nat too low is caught (20,000 draws)."""
    moments = random_moments(1.0)
    generator = torch.Generator().manual_seed(1)
    factor_BKR = torch.randn(20, 3, 2, generator=generator, dtype=torch.float64)
    noise_SBK = torch.randn(NUM_DRAWS, 20, 3, generator=generator, dtype=torch.float64)
    noise_SBR = torch.randn(NUM_DRAWS, 20, 2, generator=generator, dtype=torch.float64)
    shared_SBK = torch.einsum("bkr,sbr->sbk", factor_BKR, noise_SBR)
    nll_SB = -(moments.mean_BK + moments.scale_BK * noise_SBK + shared_SBK).log_softmax(-1)[..., 0]
    error_B = nll_SB.std(0) / math.sqrt(NUM_DRAWS)
    bound_B = bounds(moments._replace(factor_BKR=factor_BKR), torch.zeros(20, dtype=torch.int64))
    assert (bound_B >= nll_SB.mean(0) - Z_CUT * error_B).all()
    assert float((Z_CUT + 2.33) * error_B.median()) < 0.1
    assert float((bound_B - nll_SB.mean(0)).max()) > 0.1, "the bound is never exact here"


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_a_wrong_variance_in_the_bound_would_be_noticed(factor: float) -> None:
    """Planted: exp(mu + factor s^2) instead of exp(mu + s^2 / 2); 0 is no bound, and the gap of the others is wrong."""
    y_B = torch.zeros(20, dtype=torch.int64)
    moments = random_moments(1e-2)
    planted = moments._replace(scale_BK=moments.scale_BK * math.sqrt(2 * factor))
    gap_B = bounds(planted, y_B) - expected_nll(moments, y_B, 12)
    theory_B = 0.5 * (moments.mean_BK.softmax(-1) * moments.scale_BK).square().sum(-1)
    assert not torch.allclose(gap_B, theory_B, rtol=1e-3, atol=1e-12)


def test_soft_labels_are_averaged_and_the_nll_is_the_most_probable_labels() -> None:
    moments = random_moments(1.0)
    y_BK = torch.rand(20, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y_BK = y_BK / y_BK.sum(-1, keepdim=True)
    loss = bound_loss(moments, y_BK, torch.tensor(2.0), 10)
    per_class_BK = torch.stack([bounds(moments, torch.full((20,), k)) for k in range(3)], 1)
    assert loss.fit == pytest.approx((y_BK * per_class_BK).sum(-1).mean().item())
    assert loss.nll == pytest.approx(bounds(moments, y_BK.argmax(1)).mean().item())
    assert loss.total == pytest.approx(float(loss.fit) + 0.2)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradients_are_right(covariance: str) -> None:
    """Autograd against central differences of the whole loss, in every parameter, float64."""
    problem = toy_problem(num_examples=8)
    posterior = build(FAMILY, problem, covariance=covariance).double()
    with torch.no_grad():
        for parameter in posterior.variational_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x_BCHW = problem.x_NCHW.double()
    torch.autograd.backward(posterior.loss(x_BCHW, problem.y_N).total)
    for parameter in posterior.variational_parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ends = []
        for step in (1e-5, -2e-5):  # from +h to -h
            parameter.data.add_(direction, alpha=step)
            ends.append(loss_value(posterior, x_BCHW, problem.y_N)[0])
        parameter.data.add_(direction, alpha=1e-5)
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-6)


def count(posterior: Posterior) -> OperatorCounter:
    """Count the operators of a loss and its gradient."""
    problem = toy_problem()
    with OperatorCounter() as counter:
        torch.autograd.backward(posterior.loss(problem.x_NCHW, problem.y_N).total)
    return counter


@pytest.mark.parametrize(("covariance", "allowed"), [("diagonal", 90), ("dense", 110)])
def test_nothing_in_the_loss_is_random_or_waits_for_the_device(covariance: str, allowed: int) -> None:
    problem = toy_problem()
    posterior = build(FAMILY, problem, covariance=covariance).train()
    counter = count(posterior)
    assert counter.num_host_syncs == 0
    assert counter.num_operators <= count(build(deterministic.FAMILY, problem).train()).num_operators + allowed
    assert posterior.loss(problem.x_NCHW, problem.y_N) == posterior.loss(problem.x_NCHW, problem.y_N)


# The dense guide.


def dense_guide() -> tuple[DenseGuide, Tensor]:
    """Return a guide away from where it starts, float64, and prior scales that differ."""
    generator = torch.Generator().manual_seed(5)
    prior_KD = 0.5 + torch.rand(3, 5, generator=generator, dtype=torch.float64)
    guide = DenseGuide(prior_KD, 0.3).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return guide, prior_KD


def test_the_dense_kl_is_torchs() -> None:
    guide, prior_KD = dense_guide()
    rows = MultivariateNormal(guide.loc, scale_tril=guide.cholesky())
    prior = MultivariateNormal(torch.zeros_like(prior_KD), torch.diag_embed(prior_KD.square()))
    assert guide.kl(prior_KD).item() == pytest.approx(kl_divergence(rows, prior).sum().item(), rel=1e-12)
    assert torch.allclose(guide.scale(), rows.stddev)


def test_the_dense_moments_are_those_of_its_covariance() -> None:
    guide, _ = dense_guide()
    features_BD = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    augmented_BD = torch.cat([features_BD, torch.ones(7, 1, dtype=torch.float64)], 1)
    covariance_KDD = guide.cholesky() @ guide.cholesky().mT
    moments = guide.logit_moments(features_BD)
    variance_BK = torch.einsum("bd,kde,be->bk", augmented_BD, covariance_KDD, augmented_BD)
    assert torch.allclose(moments.scale_BK.square(), variance_BK)
    assert torch.allclose(moments.mean_BK, augmented_BD @ guide.loc.T)


def test_dense_draws_have_the_guides_covariance() -> None:
    """Whitened draws' second moments at 20,000 draws: false alarm 1e-6; catches an entry that is off by 0.06."""
    guide, _ = dense_guide()
    torch.manual_seed(0)
    with torch.no_grad():
        draws_SKD = guide.sample(NUM_DRAWS) - guide.loc
        white_KDS = torch.linalg.solve_triangular(guide.cholesky(), draws_SKD.permute(1, 2, 0), upper=False)
    error_KDD = (white_KDS @ white_KDS.mT / NUM_DRAWS - torch.eye(5)) * math.sqrt(NUM_DRAWS / 2)
    assert error_KDD.abs().max() < Z_CUT


def test_dense_without_correlations_is_the_diagonal_guide() -> None:
    prior_KD = torch.full((3, 5), 0.7)
    torch.manual_seed(0)
    dense = DenseGuide(prior_KD, 0.2)
    torch.manual_seed(0)
    diagonal = MeanFieldGuide(prior_KD, 0.2)
    features_BD = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for one, other in zip(dense.logit_moments(features_BD), diagonal.logit_moments(features_BD), strict=True):
        assert torch.allclose(one, other)
    assert dense.kl(prior_KD).item() == pytest.approx(diagonal.kl(prior_KD).item())


def test_a_dense_posterior_ends_with_a_better_bound_on_correlated_features() -> None:
    problem = toy_problem(num_examples=100)
    x_NCHW = problem.x_NCHW + 2 * problem.x_NCHW[..., :1]  # one direction is shared by all features
    problem = problem._replace(x_NCHW=x_NCHW)
    totals = {}
    for covariance in COVARIANCES:
        posterior = build(FAMILY, problem, covariance=covariance)
        train_toy(posterior, problem, steps=400)
        totals[covariance] = loss_value(posterior, problem.x_NCHW, problem.y_N)[0]
    assert totals["dense"] < totals["diagonal"] - 0.005  # nats per example


def test_the_dense_guide_runs_under_pyros_own_svi() -> None:
    head = BayesianHead(4, 3, 20, 1.0, 1.0)
    guide = DenseGuide(head.prior_scale, 0.2)
    features_BD, y_B = torch.randn(20, 4), torch.randint(3, (20,))
    before = guide.loc.detach().clone()
    svi = SVI(head, guide, PyroAdam({"lr": 0.01}), TraceMeanField_ELBO())
    with pyro.get_param_store().scope():
        losses = [svi.step(features_BD, y_B) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(before, guide.loc)


# Errors and planted faults.


def test_a_dense_covariance_that_cannot_fit_is_refused_in_words() -> None:
    with pytest.raises(ConfigError) as caught:
        vbll.build(Parts(FlattenBackbone(2048), 1000, 100), VBLLConfig(covariance="dense"))
    assert str(caught.value) == (
        "1000 dense covariances of 2049 weights have 4,198,401,000 entries, at most 67,108,864 fit"
        ' (inference.covariance = dense): use covariance = "diagonal", or the family low_rank'
    )
    assert vbll.build(Parts(FlattenBackbone(64), 10, 100), VBLLConfig(covariance="dense")) is not None


def test_a_wrong_initial_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^must be positive and finite \(inference.initial_scale\)$"):
        VBLLConfig(initial_scale=0.0)


class NoWeightOnN(VBLL):
    """Adds the whole KL to every example's loss."""

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        loss = super().loss_from_features(features_BD, y)
        return loss._replace(total=loss.fit + loss.kl)


class FixedSpread(VBLL):
    """Takes no gradient of the scales."""

    def __init__(self, parts: Parts, config: VBLLConfig) -> None:
        super().__init__(parts, config)
        self.guide.log_scale.requires_grad_(False)


@pytest.mark.parametrize(
    ("planted", "check"), [(NoWeightOnN, check_batches_add_up), (FixedSpread, check_scale_is_fitted)]
)
def test_planted_fault_is_caught(
    planted: Callable[[Parts, VBLLConfig], Posterior], check: Callable[[Family], None]
) -> None:
    with pytest.raises(AssertionError):
        check(FAMILY._replace(build=planted))


def test_the_quadrature_of_these_tests_is_right() -> None:
    """For two classes without spread it is the NLL; for K = 2, E[-log softmax] is a one-dimensional integral."""
    moments = random_moments(0.0, num_images=4)
    y_B = torch.tensor([0, 1, 2, 0])
    assert torch.allclose(expected_nll(moments, y_B, 8), -Categorical(logits=moments.mean_BK).log_prob(y_B))
    two = random_moments(1.0, num_images=1, num_classes=2)
    mean, sd = float(two.mean_BK[0, 1] - two.mean_BK[0, 0]), float(two.scale_BK.norm())
    grid = np.linspace(mean - 10 * sd, mean + 10 * sd, 20_001)
    density = np.exp(-0.5 * ((grid - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    integral = np.trapezoid(density * np.logaddexp(0, grid), grid)
    assert expected_nll(two, torch.tensor([0])).item() == pytest.approx(integral, rel=1e-8)
