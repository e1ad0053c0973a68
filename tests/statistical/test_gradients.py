"""T5: gradients of both ELBO estimators, draw by draw against hand-derived formulas, and on average against the truth.

(a) For one draw, autograd equals the formula (1e-6 relative) and central differences (1e-4) in float64: no false alarm.
(b) The mean of 4,096 gradients equals the gradient of the exact ELBO at |z| < 5.612 in each of at most 50 coordinates:
false alarm 1e-6 for each test. A linear-Gaussian model has it in closed form, a softmax head of three classes by
32^3-point quadrature. With power 0.99 they catch a bias of (5.612 + 2.33) standard errors in a coordinate, which is
`SMALLEST_FAULT` of the gradient's norm (`test_the_stated_power_is_the_real_one`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bayesnet.elbo import local_loss, trace_elbo, weight_space_loss
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.model import WEIGHT, BayesianHead
from tests.statistical.linear_gaussian import NOISE_SCALE, Regressions, regressions

Z_CUT = 5.612
NUM_GRADIENTS = 4096
# Estimator -> (norm of the mean gradient / its standard deviation, for one draw; smallest fault / that norm).
SNR = {"local": 1.80, "weight": 1.43}
SMALLEST_FAULT = {"local": 0.042, "weight": 0.040}


class SoftmaxBatch(NamedTuple):
    """A batch of 4 of 10 examples under a three-class head with a mean-field guide; everything float64."""

    head: BayesianHead
    guide: MeanFieldGuide
    features_BD: Tensor
    y_B: Tensor

    def parameters(self) -> tuple[Tensor, ...]:
        """Return what the loss is differentiated by: posterior means, log scales, and features, for the backbone."""
        return self.guide.loc, self.guide.log_scale, self.features_BD

    def augmented(self) -> Tensor:
        return torch.cat([self.features_BD.detach(), torch.ones(len(self.y_B), 1).double()], 1)

    def one_hot(self) -> Tensor:
        return nn.functional.one_hot(self.y_B, 3).double()

    def kl_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradient of KL / N by means and log scales."""
        prior, scale, size = self.head.prior_scale, self.guide.log_scale.detach().exp(), self.head.num_examples
        return self.guide.loc.detach() / prior**2 / size, (scale**2 / prior**2 - 1) / size

    def loss(self, estimator: str) -> Tensor:
        """Return the training objective by "local" or "weight"; the one place where the library is called."""
        size = self.head.num_examples
        if estimator == "weight":
            return weight_space_loss(self.head, self.guide, self.features_BD, self.y_B, size).total
        moments = self.guide.logit_moments(self.features_BD)
        return local_loss(moments, self.y_B, self.guide.kl(self.head.prior_scale), size).total


def softmax_batch() -> SoftmaxBatch:
    generator = torch.Generator().manual_seed(7)
    features_BD = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    head = BayesianHead(2, 3, 10, prior_scale=0.8, prior_bias_scale=1.5).double()
    guide = MeanFieldGuide(head.prior_scale, 0.6).double()
    with torch.no_grad():
        guide.loc.copy_(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        guide.log_scale.add_(0.2 * torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return SoftmaxBatch(head, guide, features_BD, torch.tensor([0, 2, 1, 2]))


def assert_gradients(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for index, (found, right) in enumerate(zip(actual, expected, strict=True)):
        error = float((found - right).abs().max() / right.abs().max())
        assert error <= 1e-6, f"gradient {index} is off by {error:.1e}"


# (a) One draw.


@contextlib.contextmanager
def recorded(guide: nn.Module) -> Iterator[list[Tensor]]:
    """Give the list of weights that the guide draws, with a fixed seed."""
    drawn: list[Tensor] = []
    handle = guide.register_forward_hook(lambda module, inputs, weight: drawn.append(weight.detach()))
    torch.manual_seed(0)
    yield drawn
    handle.remove()


def check_local_gradient_of_a_draw() -> None:
    """d NLL / d logits = (softmax - one-hot) / B, and logits = mean + scale e with scale^2 = s^2 [f^2; 1]."""
    batch = softmax_batch()
    torch.manual_seed(0)
    actual = torch.autograd.grad(batch.loss("local"), batch.parameters())
    torch.manual_seed(0)
    noise_BK = torch.randn(4, 3, dtype=torch.float64)
    mean_KD, variance_KD = batch.guide.loc.detach(), (2 * batch.guide.log_scale.detach()).exp()
    augmented_BD, kl_mean, kl_scale = batch.augmented(), *batch.kl_gradients()
    scale_BK = (augmented_BD**2 @ variance_KD.T).sqrt()
    slope_BK = ((augmented_BD @ mean_KD.T + scale_BK * noise_BK).softmax(1) - batch.one_hot()) / 4
    spread_BK = slope_BK * noise_BK / scale_BK
    by_features_BD = slope_BK @ mean_KD + augmented_BD * (spread_BK @ variance_KD)
    expected = (
        slope_BK.T @ augmented_BD + kl_mean,
        (spread_BK.T @ augmented_BD**2) * variance_KD + kl_scale,
        by_features_BD[:, :2],
    )
    assert_gradients(actual, expected)


def check_weight_gradient_of_a_draw() -> None:
    """With w = m + s e: d/dm is the gradient by w, d/dlog s is that times s e, both plus the KL's."""
    batch = softmax_batch()
    with recorded(batch.guide) as drawn:
        actual = torch.autograd.grad(batch.loss("weight"), batch.parameters())
    [weight_KD], (kl_mean, kl_scale) = drawn, batch.kl_gradients()
    augmented_BD = batch.augmented()
    slope_BK = ((augmented_BD @ weight_KD.T).softmax(1) - batch.one_hot()) / 4
    by_weight_KD = slope_BK.T @ augmented_BD
    expected = (
        by_weight_KD + kl_mean,
        by_weight_KD * (weight_KD - batch.guide.loc.detach()) + kl_scale,
        slope_BK @ weight_KD[:, :2],
    )
    assert_gradients(actual, expected)


def check_gradient_against_differences(estimator: str) -> None:
    batch = softmax_batch()

    def loss(*parameters: Tensor) -> Tensor:  # gradcheck moves the parameters in place
        torch.manual_seed(0)
        return batch.loss(estimator)

    right = torch.autograd.gradcheck(
        loss, batch.parameters(), eps=1e-5, rtol=1e-4, atol=1e-9, nondet_tol=0.0, raise_exception=False
    )
    assert right, "autograd differs from finite differences"


class FullRankGuide(nn.Module):
    """A multivariate normal guide, whose KL torch has no closed form for: the sampled one is used."""

    def __init__(self, loc_RD: Tensor, tril_RDD: Tensor) -> None:
        super().__init__()
        self.loc, self.tril = nn.Parameter(loc_RD), nn.Parameter(tril_RDD)

    def forward(self, x_RBD: Tensor, y_RB: Tensor) -> Tensor:
        posterior = dist.MultivariateNormal(self.loc, scale_tril=self.tril.tril())
        weight_RD: Tensor = pyro.sample(WEIGHT, posterior.to_event(1))
        return weight_RD


def guides(problem: Regressions, num_copies: int = 1) -> tuple[MeanFieldGuide, FullRankGuide]:
    """Return a mean-field and a full-rank guide near, not at, the posterior; the copies are equal."""
    exact = problem.posterior()
    loc_RD = (exact.mean + 0.5 * exact.stddev).expand(num_copies, -1).clone()
    mean_field = MeanFieldGuide(torch.ones_like(loc_RD), 1.0).double()
    with torch.no_grad():
        mean_field.loc.copy_(loc_RD)
        mean_field.log_scale.copy_((1.3 * exact.stddev).log().expand_as(loc_RD))
    return mean_field, FullRankGuide(loc_RD, (0.8 * exact.scale_tril).expand(num_copies, -1, -1).clone())


def linear_loss(problem: Regressions, guide: nn.Module, num_copies: int, *, closed_form_kl: bool) -> Tensor:
    """Return minus the ELBO, summed over copies, from the first 10 of 30 examples."""
    x_RBD, y_RB = (part[:, :10].expand(num_copies, *[-1] * (part.dim() - 1)) for part in problem)
    terms = trace_elbo(problem.program(30), guide, x_RBD, y_RB, closed_form_kl=closed_form_kl)
    return terms.kl - terms.log_likelihood


def check_linear_gradient_of_a_draw() -> None:
    """-log p(y | w) has gradient -N/B X' (y - X w) / sigma^2; the sampled KL adds w, the closed form its own."""
    problem = regressions(1)
    x_BD, y_B = problem.x_RND[0, :10], problem.y_RN[0, :10]
    for guide in guides(problem):
        for closed_form_kl in {isinstance(guide, MeanFieldGuide), False}:
            with recorded(guide) as drawn:
                loss = linear_loss(problem, guide, 1, closed_form_kl=closed_form_kl)
            actual = torch.autograd.grad(loss, tuple(guide.parameters()))
            [[w_D]], mean_D = drawn, guide.loc[0].detach()
            slope_D = -(30 / 10) * x_BD.T @ (y_B - x_BD @ w_D) / NOISE_SCALE**2
            by_mean_D = slope_D + (mean_D if closed_form_kl else w_D)
            if isinstance(guide, MeanFieldGuide):
                scale_D = guide.log_scale[0].detach().exp()
                by_kl_D = scale_D**2 if closed_form_kl else w_D * (w_D - mean_D)
                by_scale = slope_D * (w_D - mean_D) + by_kl_D - 1
            else:
                tril_DD = guide.tril[0].detach()
                noise_D = torch.linalg.solve_triangular(tril_DD, (w_D - mean_D)[:, None], upper=False)[:, 0]
                by_scale = torch.outer(slope_D + w_D, noise_D).tril() - torch.diag(1 / tril_DD.diagonal())
            assert_gradients(actual, (by_mean_D[None], by_scale[None]))


@pytest.mark.parametrize(
    "check", [check_local_gradient_of_a_draw, check_weight_gradient_of_a_draw, check_linear_gradient_of_a_draw]
)
def test_t5_same_draw_against_the_formula(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("estimator", ["local", "weight"])
def test_t5_same_draw_against_differences(estimator: str) -> None:
    check_gradient_against_differences(estimator)


# (b) The mean of many draws.


def largest_z(gradients_SP: Tensor, expected_P: Tensor) -> float:
    error_P = gradients_SP.std(0) / math.sqrt(len(gradients_SP))
    return float(((gradients_SP.mean(0) - expected_P) / error_P).abs().max())


def softmax_gradients(estimator: str, *, seed: int = 0) -> Tensor:
    """Return 4,096 gradients (S, P) by means and log scales.

    Those in weight space come from vectorised particles of the head's own program: copies of the parameters, one draw
    for each, so that the gradient by a copy is the gradient of a draw.
    """
    batch = softmax_batch()
    torch.manual_seed(seed)
    if estimator == "weight":
        for name in ("loc", "log_scale"):
            copies = getattr(batch.guide, name).detach().expand(NUM_GRADIENTS, 1, 3, 3).clone()
            setattr(batch.guide, name, nn.Parameter(copies))
        parts = torch.autograd.grad(batch.loss("weight"), batch.parameters()[:2])
        return torch.cat([part.flatten(1) for part in parts], 1)
    objective = LocalObjective(batch)
    parameters = {name: value.detach() for name, value in objective.named_parameters()}

    def gradient(_: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = grad(lambda values: functional_call(objective, values, ()))(parameters)
        return found

    found = vmap(gradient, randomness="different")(torch.arange(NUM_GRADIENTS))
    return torch.cat([found[name].flatten(1) for name in ("guide.loc", "guide.log_scale")], 1)


class LocalObjective(nn.Module):
    """The local estimator's loss as a module, for torch.func."""

    def __init__(self, batch: SoftmaxBatch) -> None:
        super().__init__()
        self.batch, self.guide = batch._replace(features_BD=batch.features_BD.detach()), batch.guide

    def forward(self) -> Tensor:
        return self.batch.loss("local")


def exact_softmax_gradient() -> Tensor:
    """Return the gradient (P,) of E[NLL] + KL / N: 32 Gauss-Hermite nodes in each of three logits."""
    batch = softmax_batch()
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(32))
    grid_QK = torch.cartesian_prod(nodes, nodes, nodes)
    weight_Q = torch.cartesian_prod(weights, weights, weights).prod(1) / (2 * math.pi) ** 1.5
    ones_B1 = torch.ones(4, 1).double()
    augmented_BD = torch.cat([batch.features_BD, ones_B1], 1)
    mean_BK = augmented_BD @ batch.guide.loc.T
    scale_BK = (augmented_BD.square() @ (2 * batch.guide.log_scale).exp().T).sqrt()
    logits_QBK = mean_BK + scale_BK * grid_QK[:, None]
    chosen_QB = logits_QBK.log_softmax(2).gather(2, batch.y_B.expand(len(grid_QK), -1)[..., None])[..., 0]
    nll = -(weight_Q @ chosen_QB).mean()
    by_mean, by_scale = torch.autograd.grad(nll, batch.parameters()[:2])
    kl_mean, kl_scale = batch.kl_gradients()
    return torch.cat([(by_mean + kl_mean).flatten(), (by_scale + kl_scale).flatten()])


def check_mean_softmax_gradient(estimator: str) -> None:
    """False alarm 1e-6; the smallest fault caught with power 0.99 is `SMALLEST_FAULT` of the gradient's norm."""
    expected_P = exact_softmax_gradient()
    assert len(expected_P) <= 50
    z = largest_z(softmax_gradients(estimator), expected_P)
    assert z < Z_CUT, f"|z| = {z:.2f}"


def check_mean_linear_gradient() -> None:
    """By the mean: A (m - posterior mean); by the scale: A S - 1 / S; A the precision. False alarm 1e-6 each.

    The smallest fault caught with power 0.99 is 12 % of the gradient's norm in one coordinate.
    """
    problem = regressions(1)
    x_BD, y_B = problem.x_RND[0, :10], problem.y_RN[0, :10]
    precision_DD = torch.eye(3).double() + 30 / 10 * x_BD.T @ x_BD / NOISE_SCALE**2
    target_D = 30 / 10 * x_BD.T @ y_B / NOISE_SCALE**2
    for guide in guides(problem, NUM_GRADIENTS):
        for closed_form_kl in {isinstance(guide, MeanFieldGuide), False}:
            torch.manual_seed(0)
            loss = linear_loss(problem, guide, NUM_GRADIENTS, closed_form_kl=closed_form_kl)
            found = torch.autograd.grad(loss, tuple(guide.parameters()))
            by_mean_D = precision_DD @ guide.loc[0].detach() - target_D
            if isinstance(guide, MeanFieldGuide):
                by_scale = precision_DD.diagonal() * (2 * guide.log_scale[0].detach()).exp() - 1
            else:
                tril_DD = guide.tril[0].detach()
                rows, columns = torch.tril_indices(3, 3)
                whole_DD = (precision_DD @ tril_DD).tril() - torch.diag(1 / tril_DD.diagonal())
                by_scale, found = whole_DD[rows, columns], (found[0], found[1][:, rows, columns])
            gradients_SP, expected_P = torch.cat(found, 1), torch.cat([by_mean_D, by_scale])
            assert float(gradients_SP.std(0).max()) * (Z_CUT + 2.33) / 64 < 0.12 * float(expected_P.norm())
            z = largest_z(gradients_SP, expected_P)
            assert z < Z_CUT, f"{type(guide).__name__}, closed form {closed_form_kl}: |z| = {z:.2f}"


@pytest.mark.parametrize("estimator", ["local", "weight"])
def test_t5_mean_softmax_gradient(estimator: str) -> None:
    check_mean_softmax_gradient(estimator)


def test_t5_mean_linear_gradient() -> None:
    check_mean_linear_gradient()


@pytest.mark.parametrize("estimator", ["local", "weight"])
def test_the_stated_power_is_the_real_one(estimator: str, figures: dict[str, list[str]]) -> None:
    """And the signal-to-noise ratio, from gradients that the check did not see."""
    gradients_SP, norm = softmax_gradients(estimator, seed=1), float(exact_softmax_gradient().norm())
    snr = norm / float(gradients_SP.var(0).sum().sqrt())
    figures.setdefault("T5 gradients", []).append(f"{estimator}: signal-to-noise ratio of one draw {snr:.2f}")
    assert snr == pytest.approx(SNR[estimator], rel=0.05)
    worst = (Z_CUT + 2.33) * float(gradients_SP.std(0).max()) / math.sqrt(NUM_GRADIENTS)
    assert worst / norm == pytest.approx(SMALLEST_FAULT[estimator], rel=0.1)


def test_local_gradients_have_less_noise() -> None:
    assert SNR["local"] > SNR["weight"]
