"""The matrix-normal family: dense formulas, exact recovery of Kronecker posteriors, limits, planted faults.

The comparisons and their false-alarm rates are those of gaussian_cases. Recovery has no test of noise: the seed is
fixed, and its bounds are 0.1 sd of a mean, 3 % of an sd, 0.03 of a correlation.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesnet import elbo
from bayesnet.battery.linear_gaussian import NOISE_SCALE
from bayesnet.errors import ConfigError
from bayesnet.inference import matrix_normal
from bayesnet.inference.base import GaussianHeadPosterior, Parts
from bayesnet.inference.gaussian_weight import GaussianWeightPosterior
from bayesnet.inference.matrix_normal import MatrixNormal, MatrixNormalConfig, MatrixNormalGuide, MatrixNormalWeight
from bayesnet.model import LABEL, WEIGHT
from bayesnet.testing import FlattenBackbone
from tests.inference import gaussian_cases as cases
from tests.inference.gaussian_cases import Case

FAMILY = matrix_normal.FAMILY


def one_covariance(raw: Tensor, log_scale: Tensor) -> Tensor:
    lower = raw.detach().tril(-1) / math.sqrt(len(raw)) + torch.eye(len(raw)).double()
    correlation = lower @ lower.T
    sd = correlation.diagonal().sqrt() / log_scale.detach().exp()
    return correlation / sd / sd[:, None]


def covariance(guide: MatrixNormalGuide) -> Tensor:
    """Return the Kronecker product of U and V."""
    product: Tensor = torch.kron(
        one_covariance(guide.raw_class, guide.log_class_scale),
        one_covariance(guide.raw_column, guide.log_column_scale),
    )
    return product


def dense(built: GaussianWeightPosterior) -> Tensor:
    assert isinstance(built.guide, MatrixNormalGuide)
    return covariance(built.guide)


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


def test_predictions_are_those_of_the_moments() -> None:
    """The table mixed once by A gives what the base class makes of a factor per image."""
    built = cases.posterior(FAMILY)
    features_BD = built.features(cases.PROBLEM.x_NCHW.double())
    for num_samples in (1, 4, 256):
        expected_SBK = GaussianHeadPosterior.draws_from_features(built, features_BD, num_samples)
        assert torch.allclose(built.draws_from_features(features_BD, num_samples), expected_SBK, rtol=1e-9)


def check_local_loss() -> None:
    """For the same noise the local estimator is that of a factor per image."""
    built = cases.posterior(FAMILY)
    x_BCHW, y_B = cases.PROBLEM.x_NCHW.double(), cases.PROBLEM.y_N
    noise_BK = torch.randn(len(y_B), 3).double()
    with mock.patch.object(elbo, "standard_normal", return_value=noise_BK):
        found = built.loss(x_BCHW, y_B)
        expected = GaussianWeightPosterior.local_loss(built, built.features(x_BCHW), y_B)
    assert torch.allclose(torch.stack([*found]), torch.stack([*expected]), rtol=1e-9)


def test_the_local_loss_is_that_of_the_moments() -> None:
    check_local_loss()


def test_a_step_costs_few_operators_and_nothing_of_an_images_weights() -> None:
    cases.check_operators(FAMILY, 150)
    assert cases.largest_tensor(FAMILY, batch=64, num_features=64, num_classes=5) == 65**2
    assert cases.largest_tensor(FAMILY, batch=512, num_features=64, num_classes=40) == 512 * 65


def test_only_the_product_of_the_scales_is_used() -> None:
    built = cases.posterior(FAMILY)
    guide = built.guide
    assert isinstance(guide, MatrixNormalGuide)
    losses = []
    for shift in (0.0, 0.7):
        with torch.no_grad():
            guide.log_class_scale.add_(shift)
            guide.log_column_scale.sub_(shift)
        torch.manual_seed(0)
        built.zero_grad()
        loss = built.loss(cases.PROBLEM.x_NCHW.double(), cases.PROBLEM.y_N).total
        torch.autograd.backward(loss)
        assert guide.log_class_scale.grad is not None
        assert guide.log_column_scale.grad is not None
        along = guide.log_class_scale.grad.sum() - guide.log_column_scale.grad.sum()
        assert abs(float(along)) < 1e-9
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


class Regression(NamedTuple):
    """Targets (N, K) of features (N, D): W ~ N(0, I), y_n ~ N(W x_n, S). Where the posterior is matrix normal.

    Precision of vec(W), class by class: kron(S^-1, X^T X) + I, which is a Kronecker product if S or X^T X is c I.
    """

    x_ND: Tensor
    y_NK: Tensor
    noise_KK: Tensor

    def program(self, x_ND: Tensor, y_NK: Tensor) -> None:
        num_classes = len(self.noise_KK)
        prior = dist.Normal(torch.zeros(num_classes, x_ND.shape[1]).double(), 1.0).to_event(2)
        weight = pyro.sample(WEIGHT, prior)
        weight = weight.squeeze(-3) if weight.dim() > 2 else weight  # the place of the plate
        mean = torch.einsum("nd,...kd->...nk", x_ND, weight)
        with pyro.plate("data", len(y_NK)):
            pyro.sample(LABEL, dist.MultivariateNormal(mean, self.noise_KK), obs=y_NK)

    def posterior(self) -> dist.MultivariateNormal:
        precision = torch.kron(self.noise_KK.inverse().contiguous(), self.x_ND.T @ self.x_ND)
        precision = precision + torch.eye(len(precision)).double()
        linear = (self.noise_KK.inverse() @ self.y_NK.T @ self.x_ND).flatten()
        return dist.MultivariateNormal(torch.linalg.solve(precision, linear), precision_matrix=precision)


def regression(*, correlated: str) -> Regression:
    """Return 40 examples of 4 features and 3 targets, with correlated features or correlated noise."""
    torch.manual_seed(5)
    x_ND = torch.randn(40, 4).double()
    noise_KK = NOISE_SCALE**2 * torch.eye(3).double()
    if correlated == "features":
        x_ND = x_ND @ (torch.eye(4) + 0.3 * torch.randn(4, 4)).double()
    else:
        x_ND = 3 * torch.linalg.qr(x_ND)[0]
        noise_KK = noise_KK + torch.tensor([[1.0, 0.8, -0.5]]).double().T @ torch.tensor([[1.0, 0.8, -0.5]]).double()
    y_NK = x_ND @ torch.randn(3, 4).double().T + dist.MultivariateNormal(torch.zeros(3).double(), noise_KK).sample(
        (40,)
    )
    return Regression(x_ND, y_NK, noise_KK)


def is_recovered(target: dist.MultivariateNormal, loc_n: Tensor, covariance_nn: Tensor) -> bool:
    sd_n, target_n = covariance_nn.diagonal().sqrt(), target.variance.sqrt()
    correlation = covariance_nn / sd_n / sd_n[:, None] - target.covariance_matrix / target_n / target_n[:, None]
    return bool(
        ((loc_n - target.mean).abs() < 0.1 * target_n).all()
        and ((sd_n / target_n - 1).abs() < 0.03).all()
        and (correlation.abs() < 0.03).all()
    )


def test_it_recovers_an_exact_posterior() -> None:
    """Worst of 12 weights: a mean by 0.01 sd, an sd by 0.9 %, a correlation by 0.008."""
    problem = regression(correlated="noise")
    torch.manual_seed(0)
    guide = MatrixNormalGuide(torch.ones(3, 4).double(), 0.2).double()
    cases.fit(problem.program, guide, problem.x_ND, problem.y_NK, num_steps=400)
    target, loc_n, found = problem.posterior(), guide.loc.detach().flatten(), covariance(guide)
    assert is_recovered(target, loc_n, found)
    assert not is_recovered(target, loc_n, found.diagonal().diag()), "the problem does not tell correlations"
    assert not is_recovered(target, loc_n + 0.15 * found.diagonal().sqrt(), found)
    assert not is_recovered(target, loc_n, 0.9 * found)


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        matrix_normal.build(Parts(FlattenBackbone(20_000), 10, 1000), MatrixNormalConfig())
    assert str(caught.value) == (
        "one covariance of 20,001 features and one of 10 classes has 400,240,111 parameters, 1,527 MiB, of 256 MiB at "
        "most (inference.family = matrix_normal): use low_rank or mean_field"
    )
    with pytest.raises(ConfigError, match=r"must be positive and finite \(inference\.initial_scale\)"):
        MatrixNormalConfig(initial_scale=float("inf"))


def test_it_takes_a_thousand_classes() -> None:
    """2,048 features and 1,000 classes, where nothing of 64 x 1,000 x 1,000 may be made."""
    assert cases.largest_tensor(FAMILY, batch=64, num_features=256, num_classes=1000) == 1000**2


def test_planted_determinants_of_the_other_factor_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """K log det U + (D + 1) log det V."""
    original = MatrixNormalWeight.__init__

    def swapped(self: MatrixNormalWeight, *args: Tensor) -> None:
        original(self, *args)
        num_classes, num_columns = self.loc.shape
        totals = [
            (length.log() - factor.diagonal().log()).sum()
            for factor, length in (
                (factor, factor.square().sum(1).sqrt()) for factor in (self.class_factor, self.column_factor)
            )
        ]
        self.total_correlation = num_classes * totals[0] + num_columns * totals[1]

    monkeypatch.setattr(MatrixNormalWeight, "__init__", swapped)
    for check in (cases.check_kl, cases.check_density, cases.check_draws):
        with pytest.raises(AssertionError):
            check(CASE)


def test_planted_independent_classes_in_the_local_estimator_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = MatrixNormal.local_loss

    def independent(self: MatrixNormal, features_BD: Tensor, y: Tensor) -> object:
        weight = self.guide.distribution()
        length_K1 = weight.class_factor.square().sum(1, keepdim=True).sqrt()
        weight.class_factor = torch.diag(length_K1.squeeze(1))
        with monkeypatch.context() as patch:
            patch.setattr(self.guide, "distribution", lambda: weight)
            return original(self, features_BD, y)

    monkeypatch.setattr(MatrixNormal, "local_loss", independent)
    with pytest.raises(AssertionError):
        check_local_loss()


def test_planted_a_transposed_factor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A^T A for A A^T."""
    original = MatrixNormalWeight.__init__

    def transposed(self: MatrixNormalWeight, *args: Tensor) -> None:
        original(self, *args)
        self.class_factor = self.class_factor.T

    monkeypatch.setattr(MatrixNormalWeight, "__init__", transposed)
    for check in (cases.check_moments, cases.check_draws):
        with pytest.raises(AssertionError):
            check(CASE)
