"""The low-rank family: dense formulas, limits, planted faults.

The comparisons and their false-alarm rates are those of gaussian_cases. Exact recovery is T6 (battery/recovery.py).
The faults caught are those planted below.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesnet.errors import ConfigError
from bayesnet.inference import low_rank
from bayesnet.inference.base import Parts
from bayesnet.inference.gaussian_weight import GaussianWeightPosterior
from bayesnet.inference.low_rank import LowRankConfig, LowRankGuide, LowRankWeight
from bayesnet.testing import FlattenBackbone, build
from bayesnet.types import LogitGaussian
from tests.inference import gaussian_cases as cases
from tests.inference.gaussian_cases import Case

FAMILY = low_rank.FAMILY


def covariance(guide: LowRankGuide) -> Tensor:
    """Return diag(a^2) + F F^T of the module's formula."""
    ratio_nR = guide.raw.detach().flatten(0, 1) / math.sqrt(guide.loc.numel())
    scale_n = guide.log_scale.detach().exp().flatten()
    own_n = scale_n / (1 + ratio_nR.square().sum(1)).sqrt()
    factor_nR = own_n[:, None] * ratio_nR
    return own_n.square().diag() + factor_nR @ factor_nR.T


def dense(built: GaussianWeightPosterior) -> Tensor:
    assert isinstance(built.guide, LowRankGuide)
    return covariance(built.guide)


CASE = Case(FAMILY, dense)


def test_it_is_the_gaussian_of_its_covariance() -> None:
    cases.check_density(CASE)
    cases.check_kl(CASE)
    cases.check_moments(CASE)
    cases.check_draws(CASE)


def test_the_density_is_that_of_torchs_low_rank_normal() -> None:
    built = cases.posterior(FAMILY)
    weight = built.guide.distribution()
    assert isinstance(weight, LowRankWeight)
    own_n = weight.own_scale.flatten()
    factor_nR = own_n[:, None] * weight.ratio.flatten(0, 1)
    stock = torch.distributions.LowRankMultivariateNormal(weight.loc.flatten(), factor_nR, own_n.square())
    value = torch.randn(7, *weight.loc.shape).double()
    assert torch.allclose(weight.log_prob(value), stock.log_prob(value.flatten(1)), rtol=1e-9)


def test_the_estimators_agree() -> None:
    cases.check_estimators_agree(FAMILY)


def test_gradients_are_finite() -> None:
    cases.check_gradients_are_finite(FAMILY)


def test_stock_svi_trains_it() -> None:
    cases.check_stock_svi(FAMILY)


def test_a_step_costs_few_operators_and_nothing_of_an_images_weights() -> None:
    cases.check_operators(FAMILY, 175)
    num_weights = 5 * 65
    assert cases.largest_tensor(FAMILY, batch=64, num_features=64, num_classes=5) <= max(num_weights * 9, 64 * 65)
    assert cases.largest_tensor(FAMILY, batch=512, num_features=64, num_classes=5) == 512 * 65


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        low_rank.build(Parts(FlattenBackbone(2048), 10_000, 1000), LowRankConfig())
    assert str(caught.value) == (
        "rank 8 for 20,490,000 weights has 204,900,000 parameters, 782 MiB, of 256 MiB at most "
        "(inference.family = low_rank): lower inference.rank, or use mean_field"
    )
    with pytest.raises(ConfigError) as caught:
        low_rank.build(Parts(FlattenBackbone(1), 2, 1000), LowRankConfig())
    assert str(caught.value) == "more directions than the head's 4 weights (inference.rank = 8)"
    with pytest.raises(ConfigError, match=r"must be at least 1 \(inference\.rank = 0\)"):
        LowRankConfig(rank=0)
    with pytest.raises(ConfigError, match=r"must be positive and finite \(inference\.initial_scale\)"):
        LowRankConfig(initial_scale=-1.0)


def test_the_directions_do_not_start_at_their_saddle() -> None:
    built = build(FAMILY, cases.PROBLEM)
    assert isinstance(built, GaussianWeightPosterior)
    torch.autograd.backward(built.loss(cases.PROBLEM.x_NCHW, cases.PROBLEM.y_N).total)
    assert isinstance(built.guide, LowRankGuide)
    assert built.guide.raw.grad is not None
    assert float(built.guide.raw.grad.abs().max()) > 0
    assert torch.allclose(built.posterior_scale(), torch.tensor(0.2))


def test_planted_no_capacitance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The determinant of the diagonal alone."""
    original = LowRankWeight.__init__

    def wrong(self: LowRankWeight, loc_KD: Tensor, scale_KD: Tensor, ratio_KDR: Tensor) -> None:
        original(self, loc_KD, scale_KD, ratio_KDR)
        self.total_correlation = (scale_KD / self.own_scale).log().sum()

    monkeypatch.setattr(LowRankWeight, "__init__", wrong)
    for check in (cases.check_kl, cases.check_density, cases.check_draws):
        with pytest.raises(AssertionError):
            check(CASE)


def test_planted_independent_directions_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variances right, the directions another for each class: only covariances tell."""
    original = LowRankWeight.logit_moments

    def alone(self: LowRankWeight, features_BD: Tensor) -> LogitGaussian:
        mean_BK, scale_BK, factor_BKR = original(self, features_BD)
        variance_BK = scale_BK.square() + factor_BKR.square().sum(-1)
        return LogitGaussian(mean_BK, variance_BK.sqrt(), torch.zeros_like(factor_BKR))

    monkeypatch.setattr(LowRankWeight, "logit_moments", alone)
    with pytest.raises(AssertionError):
        cases.check_moments(CASE)
