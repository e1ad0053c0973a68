"""The full-rank family: dense formulas, the start at mean-field, limits, planted faults.

The comparisons and their false-alarm rates are those of gaussian_cases. Exact recovery is T6 (battery/recovery.py).
The faults caught are those planted below, of 10 % and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnet.errors import ConfigError
from bayesnet.inference import full_rank, gaussian_weight, mean_field
from bayesnet.inference.base import Parts
from bayesnet.inference.full_rank import FullRank, FullRankGuide, FullRankWeight, start_at
from bayesnet.inference.gaussian_weight import GaussianWeightPosterior, covariance_factor
from bayesnet.inference.mean_field import MeanField
from bayesnet.testing import FlattenBackbone, build, check_draws_match_moments, toy_problem, train_toy
from bayesnet.types import LogitGaussian
from tests.inference import gaussian_cases as cases
from tests.inference.gaussian_cases import Case

FAMILY = full_rank.FAMILY


def dense(built: GaussianWeightPosterior) -> Tensor:
    """Return L L^T, from columns to rows, its rows scaled by hand."""
    guide = built.guide
    assert isinstance(guide, FullRankGuide)
    num_classes, num_columns = guide.loc.shape
    num_weights = num_classes * num_columns
    lower = guide.raw.detach().tril(-1) / math.sqrt(num_weights) + torch.eye(num_weights).double()
    correlation = lower @ lower.T
    sd = correlation.diagonal().sqrt()
    scale = guide.log_scale.detach().exp().T.flatten()
    covariance = correlation / sd / sd[:, None] * scale * scale[:, None]
    by_column = covariance.reshape(num_columns, num_classes, num_columns, num_classes)
    return by_column.permute(1, 0, 3, 2).reshape(num_classes * num_columns, -1)


CASE = Case(FAMILY, dense)


def test_it_is_the_gaussian_of_its_covariance() -> None:
    cases.check_density(CASE)
    cases.check_kl(CASE)
    cases.check_moments(CASE)
    cases.check_draws(CASE)


def test_the_estimators_agree() -> None:
    cases.check_estimators_agree(FAMILY)


def test_gradients_are_finite() -> None:
    cases.check_gradients_are_finite(FAMILY)


def test_stock_svi_trains_it() -> None:
    cases.check_stock_svi(FAMILY)


def test_the_gradient_by_hand_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    raw_nn, scale_n = torch.randn(5, 5).double(), torch.rand(5).double() + 0.1
    assert torch.autograd.gradcheck(covariance_factor, (raw_nn.requires_grad_(), scale_n.requires_grad_()))


def test_a_step_costs_few_operators_and_its_images_no_more_than_their_factor() -> None:
    cases.check_operators(FAMILY, 145)
    num_weights = 3 * 21
    assert cases.largest_tensor(FAMILY, batch=8, num_features=20, num_classes=3) == num_weights**2
    assert cases.largest_tensor(FAMILY, batch=64, num_features=20, num_classes=3) == 64 * 3 * num_weights


def test_it_starts_at_the_mean_field_optimum_and_ends_with_a_higher_bound() -> None:
    problem = toy_problem(num_examples=100)
    mean_field_posterior, posterior = build(mean_field.FAMILY, problem, seed=1), build(FAMILY, problem, seed=2)
    assert isinstance(mean_field_posterior, MeanField)
    assert isinstance(posterior, FullRank)
    train_toy(mean_field_posterior, problem, steps=400)
    start_at(posterior, mean_field_posterior)
    optimum = cases.expected_elbo(mean_field_posterior, problem)
    assert cases.expected_elbo(posterior, problem) == pytest.approx(optimum, abs=2e-3)
    train_toy(posterior, problem, steps=400)
    assert cases.expected_elbo(posterior, problem) > optimum + 0.5
    assert float(mean_field_posterior.guide.loc.detach().sub(posterior.guide.loc.detach()).abs().max()) > 0, "shared"


def test_a_start_elsewhere_is_refused() -> None:
    posterior = build(FAMILY, toy_problem())
    assert isinstance(posterior, FullRank)
    other_head = build(mean_field.FAMILY, toy_problem(num_features=5))
    other_prior = build(mean_field.FAMILY, toy_problem(), prior_scale=2.0)
    heavy_tails = build(mean_field.FAMILY, toy_problem(), prior="laplace")
    assert isinstance(other_head, MeanField)
    assert isinstance(other_prior, MeanField)
    assert isinstance(heavy_tails, MeanField)
    with pytest.raises(ConfigError, match=r"is over another head \(weights \(3, 5\) and \(3, 6\)\)$"):
        start_at(posterior, other_head)
    for other in (other_prior, heavy_tails):
        with pytest.raises(ConfigError, match=r"has another prior \(inference\.prior\): give both families the same"):
            start_at(posterior, other)


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        full_rank.build(Parts(FlattenBackbone(2048), 100, 1000), full_rank.FullRankConfig())
    assert str(caught.value) == (
        "a covariance of 204,900 weights has 41,984,010,000 parameters, 160,156 MiB, of 256 MiB at most "
        "(inference.family = full_rank): use matrix_normal or low_rank"
    )
    with pytest.raises(ConfigError) as caught:
        full_rank.build(Parts(FlattenBackbone(2), 101, 1000), full_rank.FullRankConfig())
    assert str(caught.value) == (
        "a covariance per image of 101 logits, of 100 at most (inference.family = full_rank): "
        "use matrix_normal or low_rank"
    )
    with pytest.raises(ConfigError, match=r"must be positive and finite \(inference\.initial_scale\)"):
        full_rank.FullRankConfig(initial_scale=0.0)


def test_nearly_dependent_logits_have_a_factor() -> None:
    """All classes move together but for a millionth: rounding alone must not make the covariance indefinite."""
    built = cases.posterior(FAMILY).float()
    guide = built.guide
    assert isinstance(guide, FullRankGuide)
    with torch.no_grad():
        guide.raw.zero_()
        guide.raw[1:, 0] = 1e4
    moments = guide.logit_moments(100 * torch.rand(50, 4))
    assert bool(moments.factor_BKR.isfinite().all())
    assert bool((moments.factor_BKR.diagonal(dim1=1, dim2=2) > 0).all())


def test_planted_no_total_correlation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(raw_nn: Tensor, scale_n: Tensor) -> tuple[Tensor, Tensor]:
        factor_nn, total_correlation = covariance_factor(raw_nn, scale_n)
        return factor_nn, 0 * total_correlation

    monkeypatch.setattr(full_rank, "covariance_factor", without)
    for check in (cases.check_kl, cases.check_density):
        with pytest.raises(AssertionError):
            check(CASE)


def test_planted_rows_of_another_length_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(raw_nn: Tensor, scale_n: Tensor) -> tuple[Tensor, Tensor]:
        lower_nn = raw_nn.tril(-1) / math.sqrt(len(raw_nn)) + torch.eye(len(raw_nn)).to(raw_nn)
        return scale_n.unsqueeze(1) * lower_nn, 0.5 * lower_nn.square().sum(1).log().sum()

    monkeypatch.setattr(full_rank, "covariance_factor", unscaled)
    for check in (cases.check_moments, cases.check_draws, cases.check_density):
        with pytest.raises(AssertionError):
            check(CASE)


def test_planted_a_factor_of_the_diagonal_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FullRankWeight.logit_moments

    def diagonal(self: FullRankWeight, features_BD: Tensor) -> LogitGaussian:
        mean_BK, scale_BK, factor_BKK = original(self, features_BD)
        return LogitGaussian(mean_BK, scale_BK, torch.diag_embed(factor_BKK.square().sum(-1).sqrt()))

    monkeypatch.setattr(FullRankWeight, "logit_moments", diagonal)
    with pytest.raises(AssertionError):
        cases.check_moments(CASE)


def test_planted_narrow_predictions_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FullRank.draws_from_features

    def narrow(self: FullRank, features_BD: Tensor, num_samples: int) -> Tensor:
        draws_SBK = original(self, features_BD, num_samples)
        return draws_SBK.mean(0) + 0.9 * (draws_SBK - draws_SBK.mean(0))

    monkeypatch.setattr(FullRank, "draws_from_features", narrow)
    with pytest.raises(AssertionError, match="scales differ"):
        check_draws_match_moments(FAMILY)


def test_planted_a_wrong_gradient_by_hand_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = gaussian_weight._CovarianceFactor.backward

    def wrong(ctx: Any, slope_nn: Tensor, slope_of_total: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        gradients: tuple[Tensor, Tensor] = original(ctx, slope_nn, 0.9 * slope_of_total)
        return gradients

    monkeypatch.setattr(gaussian_weight._CovarianceFactor, "backward", staticmethod(wrong))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_the_gradient_by_hand_is_that_of_finite_differences()
