"""What every family that is one Gaussian over the head's weight must satisfy, against dense formulas of its covariance.

A case is a family and a function that writes its covariance out, index by index, from the parameters in its docstring.
Comparisons with `torch.distributions.MultivariateNormal` are equalities (1e-9 relative, float64). Means of draws are
compared at |z| < 4.892 for one number (false alarm 1e-6) and 6.5 for at most 300 (2.4e-8 together), seeds fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam as PyroAdam  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils._python_dispatch import TorchDispatchMode

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.battery.linear_gaussian import averaged
from bayesnet.elbo import PyroProgram, closed_form_divergence, trace_elbo
from bayesnet.engine import Engine
from bayesnet.inference import deterministic
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.full_rank import FullRank
from bayesnet.inference.gaussian_weight import GaussianWeightPosterior
from bayesnet.inference.mean_field import MeanField
from bayesnet.model import linear_logits
from bayesnet.optim import OptimizerConfig, build_optimizers
from bayesnet.testing import FlattenBackbone, OperatorCounter, ToyProblem, build, toy_problem

Z_CUT, Z_CUT_OF_MANY = 4.892, 6.5
PRIOR_SCALE, PRIOR_BIAS_SCALE = 0.6, 1.5
PROBLEM = toy_problem()

Dense = Callable[[GaussianWeightPosterior], Tensor]
"""From a posterior to the covariance (n, n) of its weight, row by row: index k (D + 1) + d."""


class Case(NamedTuple):
    """A family and its covariance, written out."""

    family: Family
    dense: Dense


def posterior(family: Family, *, estimator: str = "local", spread: float = 0.3) -> GaussianWeightPosterior:
    """Return a float64 posterior on the toy problem with all parameters moved from where they start."""
    settings: dict[str, Any] = {"prior_scale": PRIOR_SCALE, "prior_bias_scale": PRIOR_BIAS_SCALE}
    built = build(family, PROBLEM, estimator=estimator, **settings).double()
    assert isinstance(built, GaussianWeightPosterior)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in built.guide.named_parameters():
            size = 3 * spread if name.startswith("raw") else spread  # correlations that a fault would show in
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=size)
    return built


def exact(case: Case, built: GaussianWeightPosterior) -> dist.MultivariateNormal:
    """Return the posterior over the weight, row by row, as torch has it."""
    return dist.MultivariateNormal(built.guide.loc.detach().flatten(), case.dense(built))


def check_density(case: Case) -> None:
    """The log-density is torch's, whatever the leading dimensions."""
    built = posterior(case.family)
    value = torch.randn(2, 1, *built.guide.loc.shape, dtype=torch.float64)
    found = built.guide.distribution().log_prob(value)
    assert found.shape == (2, 1)
    assert torch.allclose(found, exact(case, built).log_prob(value.flatten(-2)), rtol=1e-9)


def check_kl(case: Case) -> None:
    """The KL is torch's, with another prior sd for the bias, in the loss and in the registry; heavy tails have none."""
    built = posterior(case.family)
    head = built.model.head
    covariance = head.prior_scale.flatten().square().diag()
    prior = dist.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance)
    expected = torch.distributions.kl_divergence(exact(case, built), prior)
    weight = built.guide.distribution()
    with torch.no_grad():
        calls = torch.stack([built.loss(PROBLEM.x_NCHW.double(), PROBLEM.y_N).kl for _ in range(3)])
    assert torch.allclose(calls, expected, rtol=1e-9)
    assert built.kl_is_exact
    registered = closed_form_divergence(weight.expand((4, 1)), head.prior().expand((4, 1)))
    assert registered is not None
    assert registered.shape == (4, 1)
    assert torch.allclose(registered, expected, rtol=1e-9)
    shifted = dist.Normal(head.prior_loc + 0.4, head.prior_scale).to_event(2)
    expected = torch.distributions.kl_divergence(
        exact(case, built), dist.MultivariateNormal(prior.loc + 0.4, covariance)
    )
    assert torch.allclose(torch.distributions.kl_divergence(weight, shifted), expected, rtol=1e-9)
    laplace = dist.Laplace(head.prior_loc, head.prior_scale).to_event(2)
    assert closed_form_divergence(weight, laplace) is None


def check_moments(case: Case, *, rtol: float = 1e-9) -> None:
    """The logits' mean and covariance are [f; 1] applied to those of the weight; so is the marginal sd."""
    built = posterior(case.family)
    features_BD = built.features(PROBLEM.x_NCHW.double())
    moments = built.guide.logit_moments(features_BD)
    num_classes, num_columns = built.guide.loc.shape
    columns_BD = torch.cat([features_BD, torch.ones(len(features_BD), 1).double()], 1)
    covariance = case.dense(built).reshape(num_classes, num_columns, num_classes, num_columns)
    expected_BKK = torch.einsum("bd,kdje,be->bkj", columns_BD, covariance, columns_BD)
    found_BKK = torch.diag_embed(moments.scale_BK.square()) + moments.factor_BKR @ moments.factor_BKR.mT
    assert torch.allclose(found_BKK, expected_BKK, rtol=rtol, atol=rtol)
    assert torch.allclose(moments.mean_BK, columns_BD @ built.guide.loc.T, rtol=1e-9)
    scale_KD = covariance.reshape(num_classes * num_columns, -1).diagonal().sqrt().reshape(num_classes, num_columns)
    assert torch.allclose(built.posterior_scale(), scale_KD, rtol=1e-9)
    assert torch.allclose(built.guide.distribution().variance, scale_KD.square(), rtol=1e-9)


def check_draws(case: Case, num_draws: int = 4000) -> None:
    """Mean and covariance of draws are exact, and the own KL is that of their log q - log p, with torch's q."""
    built = posterior(case.family)
    target = exact(case, built)
    torch.manual_seed(0)
    with torch.no_grad():
        weight_SKD = built.guide.sample(num_draws)
        log_ratio_S = target.log_prob(weight_SKD.flatten(1)) - built.model.head.prior().log_prob(weight_SKD)
        kl = built.kl(built.guide.distribution())
    deviation_Sn = weight_SKD.flatten(1) - target.loc
    assert float(abs(_z(deviation_Sn)).max()) < Z_CUT_OF_MANY
    products_Snn = deviation_Sn.unsqueeze(2) * deviation_Sn.unsqueeze(1)
    assert float(abs(_z(products_Snn - target.covariance_matrix)).max()) < Z_CUT_OF_MANY
    assert abs(float(_z(log_ratio_S - kl))) < Z_CUT


def _z(values_S: Tensor) -> Tensor:
    return values_S.mean(0) / (values_S.std(0) / math.sqrt(len(values_S)))


def check_estimators_agree(family: Family) -> None:
    """The local estimator has the mean of many weight draws, and varies less; the weight-space one is that of its draw.

    The smallest bias caught with power 0.99 is 7.2 standard errors, held below 0.05 nats per example.
    """
    x_BCHW, y_B = PROBLEM.x_NCHW.double(), PROBLEM.y_N
    local, weight = (posterior(family, estimator=name) for name in ("local", "weight"))
    features_BD = local.features(x_BCHW)
    with torch.no_grad():
        torch.manual_seed(1)
        local_fits = torch.stack([local.loss(x_BCHW.repeat(40, 1, 1, 1), y_B.repeat(40)).fit for _ in range(100)])
        logits_SBK = linear_logits(features_BD, weight.guide.sample(4000))
        weight_fits = nn.functional.cross_entropy(
            logits_SBK.permute(1, 2, 0), y_B[:, None].expand(-1, 4000), reduction="none"
        )
        weight_fits = weight_fits.mean(0)
        torch.manual_seed(2)
        loss = weight.loss(x_BCHW, y_B)
        torch.manual_seed(2)
        logits_BK = linear_logits(features_BD, weight.guide.sample(1)[0])
    assert torch.allclose(loss.fit, nn.functional.cross_entropy(logits_BK, y_B), rtol=1e-9)
    assert torch.allclose(loss.total, loss.fit + local.kl(local.guide.distribution()) / len(y_B), rtol=1e-9)
    error = math.sqrt(float(local_fits.var() / 100 + weight_fits.var() / 4000))
    assert 7.2 * error < 0.05
    assert abs(float(local_fits.mean() - weight_fits.mean())) < Z_CUT * error
    assert math.sqrt(40) * float(local_fits.std()) < float(weight_fits.std())


def check_gradients_are_finite(family: Family) -> None:
    """Float32 gradients of both estimators are finite at extreme scales and correlations and for a blank image."""
    for estimator in ("local", "weight"):
        for spread, features in ((0.0, 0.0), (2.0, 1.0), (2.0, 1e3), (5.0, 1.0)):
            built = posterior(family, estimator=estimator, spread=spread).float()
            loss = built.loss(features * PROBLEM.x_NCHW, PROBLEM.y_N)
            torch.autograd.backward(loss.total)
            for name, parameter in built.guide.named_parameters():
                assert parameter.grad is not None, name
                assert bool(parameter.grad.isfinite().all()), (name, spread, features)


def check_stock_svi(family: Family) -> None:
    """Pyro's own SVI trains the guide on the head's program, by either estimator, particles vectorised or not."""
    features_BD = PROBLEM.x_NCHW.flatten(1)
    for estimator in (TraceMeanField_ELBO, Trace_ELBO):
        for vectorise in (False, True):
            built = build(family, PROBLEM)
            assert isinstance(built, GaussianWeightPosterior)
            torch.manual_seed(0)
            with pyro.get_param_store().scope():
                elbo = estimator(num_particles=4, vectorize_particles=vectorise, max_plate_nesting=1)  # type: ignore[no-untyped-call]
                svi = SVI(built.model.head, built.guide, PyroAdam({"lr": 0.02}), elbo)
                losses = [svi.step(features_BD, PROBLEM.y_N) for _ in range(30)]
            assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


class SizeCounter(TorchDispatchMode):
    """Remembers the largest tensor that any operator gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: int = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        self.largest = max([self.largest, *(each.numel() for each in results if isinstance(each, Tensor))])
        return result


def largest_tensor(family: Family, *, batch: int, num_features: int, num_classes: int) -> int:
    """Return the size of the largest tensor that a loss, its gradient, and a prediction with one draw make."""
    built = family.build(Parts(FlattenBackbone(num_features), num_classes, 1000), family.config())
    assert isinstance(built, GaussianWeightPosterior)
    features_BD, y_B = torch.randn(batch, num_features, requires_grad=True), torch.randint(num_classes, (batch,))
    with SizeCounter() as counter:
        torch.autograd.backward(built.loss_from_features(features_BD, y_B).total)
        built.draws_from_features(features_BD, 1)
    largest: int = counter.largest
    return largest


def step_operators(family: Family, **settings: object) -> OperatorCounter:
    """Return the operators of a training step of a narrow network with ten classes."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=8), channels=1, height=8, width=8)
    model: Posterior = family.build(Parts(backbone, 10, 1000), family.config(**settings)).train()
    engine, optimizers = Engine(torch.device("cpu")), build_optimizers(model, OptimizerConfig())
    x_BCHW, y_B = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    engine.train_step(model, optimizers, x_BCHW, y_B)  # the first step makes the optimizers' state
    with OperatorCounter() as counter:
        engine.train_step(model, optimizers, x_BCHW, y_B)
    return counter


def check_operators(family: Family, allowed: int) -> None:
    """A training step dispatches at most so many operators more than the twin's, and never waits for the device."""
    counter = step_operators(family)
    assert counter.num_host_syncs == 0
    assert counter.num_operators <= step_operators(deterministic.FAMILY).num_operators + allowed
    assert step_operators(family, estimator="weight").num_host_syncs == 0


def fit(program: PyroProgram, guide: torch.nn.Module, *data: Tensor, num_steps: int = 1000) -> None:
    """Maximise the ELBO by Adam with 64 draws a step, its rate falling from 0.1 to 0.0001."""
    model, family = averaged(program, 64), averaged(guide, 64)
    optimizer = Adam(guide.parameters(), lr=0.1)
    schedule = ExponentialLR(optimizer, 1e-3 ** (1 / num_steps))
    torch.manual_seed(0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        terms = trace_elbo(model, family, *data)
        torch.autograd.backward(terms.kl - terms.log_likelihood)
        optimizer.step()
        schedule.step()
    assert terms.kl_is_exact


def expected_elbo(built: FullRank | MeanField, problem: ToyProblem, num_draws: int = 4096) -> float:
    """Return the ELBO, nats, from many fixed draws of the logits' Gaussian, the same for every posterior."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        moments = built.head.logit_moments(built.features(problem.x_NCHW))
        noise_SE = torch.randn(num_draws, moments.mean_BK.shape[1], generator=generator)
        factor_BKR = moments.factor_BKR if moments.factor_BKR.shape[2] else torch.diag_embed(moments.scale_BK)
        logits_SBK = moments.mean_BK + torch.einsum("sr,bkr->sbk", noise_SE, factor_BKR)
        log_likelihood_SB = logits_SBK.log_softmax(-1)[:, torch.arange(len(problem.y_N)), problem.y_N]
        kl = torch.distributions.kl_divergence(built.guide.distribution(), built.model.head.prior())
    return float(log_likelihood_SB.double().mean(0).sum() - kl)
