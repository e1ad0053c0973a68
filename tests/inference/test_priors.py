"""Priors of the head: the KL from each against quadrature, closed form or sampled, and labelled as what it is.

Closed forms are equalities (1e-5). The sampled KL is a mean of 1,000 draws at |z| < 4.892 (false alarm 1e-6, fixed
seeds); the smallest bias that it catches with power 0.99 is (4.892 + 2.33) standard errors, held below 0.7 nat here.
"""

from __future__ import annotations

import math
from typing import get_args
from unittest import mock

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesnet import model
from bayesnet.errors import ConfigError
from bayesnet.inference import build_inference_config, build_posterior
from bayesnet.inference.base import Parts
from bayesnet.inference.mean_field import MeanField
from bayesnet.model import PRIORS, BayesianClassifier, BayesianHead, PriorName
from bayesnet.registry import Registry
from bayesnet.testing import FlattenBackbone, OperatorCounter, toy_problem

PROBLEM = toy_problem()
Z_CUT = 4.892
PRIOR_SCALE, PRIOR_BIAS_SCALE = 0.6, 1.5


def posterior(prior: str, estimator: str = "local") -> MeanField:
    torch.manual_seed(0)
    config = build_inference_config(
        {
            "family": "mean_field",
            "prior": prior,
            "prior_scale": PRIOR_SCALE,
            "prior_bias_scale": PRIOR_BIAS_SCALE,
            "initial_scale": 0.5,
            "estimator": estimator,
        }
    )
    built = build_posterior(Parts(FlattenBackbone(4), 3, 60), config)
    assert isinstance(built, MeanField)
    return built.double()


def exact_kl(built: MeanField, prior: str) -> float:
    """Return the divergence by the trapezoid rule over 14 standard deviations, densities written out once more."""
    loc, scale = built.guide.loc.detach()[..., None], built.guide.log_scale.detach().exp()[..., None]
    spread = torch.full((3, 5, 1), PRIOR_SCALE).double()
    spread[:, -1] = PRIOR_BIAS_SCALE
    nodes = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    w = loc + scale * nodes
    log_q = -0.5 * nodes.square() - scale.log() - 0.5 * math.log(2 * math.pi)
    u = w / spread
    log_p = {
        "normal": -0.5 * u.square() - 0.5 * math.log(2 * math.pi),
        "laplace": -u.abs() - math.log(2),
        "student_t": math.log(3 / 8) - 2.5 * torch.log1p(u.square() / 4),
    }[prior] - spread.log()
    return float((torch.trapezoid(log_q.exp() * (log_q - log_p), nodes, dim=-1) * scale[..., 0]).sum())


def kl_draws(built: MeanField, num_draws: int) -> Tensor:
    with torch.no_grad():
        return torch.stack([built.loss(PROBLEM.x_NCHW.double(), PROBLEM.y_N).kl for _ in range(num_draws)])


@pytest.mark.parametrize("estimator", ["local", "weight"])
@pytest.mark.parametrize("prior", ["normal", "laplace"])
def test_closed_forms_equal_quadrature(prior: str, estimator: str) -> None:
    built = posterior(prior, estimator)
    draws = kl_draws(built, 3)
    assert built.kl_is_exact
    assert torch.allclose(draws, torch.tensor(exact_kl(built, prior)).double(), rtol=1e-5)
    assert len(set(draws.tolist())) == 1


def check_sampled_kl(estimator: str, num_draws: int = 1000) -> None:
    built = posterior("student_t", estimator)
    assert not built.kl_is_exact
    torch.manual_seed(1)
    draws = kl_draws(built, num_draws)
    error = float(draws.std()) / math.sqrt(num_draws)
    assert 0 < (Z_CUT + 2.33) * error < 0.7
    assert abs(float(draws.mean()) - exact_kl(built, "student_t")) < Z_CUT * error


@pytest.mark.parametrize("estimator", ["local", "weight"])
def test_the_sampled_kl_has_the_mean_of_quadrature(estimator: str) -> None:
    check_sampled_kl(estimator)


def test_planted_a_prior_of_another_tail_or_scale_is_caught() -> None:
    for df, factor in ((4.0, 1.2), (1.0, 1.0)):
        wrong = Registry(
            "prior",
            {"student_t": lambda loc, scale, df=df, factor=factor: dist.StudentT(df, loc, factor * scale)},
        )
        with mock.patch.object(model, "PRIORS", wrong), pytest.raises(AssertionError):
            check_sampled_kl("local")


def test_a_normal_priors_step_is_as_cheap_as_ever() -> None:
    counts = {}
    for prior in get_args(PriorName):
        built = posterior(prior).float()
        built.loss(PROBLEM.x_NCHW, PROBLEM.y_N)  # the first makes the prior for the type and device
        with OperatorCounter() as counter:
            built.loss(PROBLEM.x_NCHW, PROBLEM.y_N)
        counts[prior] = counter
    assert counts["normal"].num_operators < counts["laplace"].num_operators < counts["student_t"].num_operators
    assert all(counter.num_host_syncs == 0 for counter in counts.values())


def test_the_names_of_the_table_are_those_of_the_configuration() -> None:
    assert set(get_args(PriorName)) == set(PRIORS)
    with pytest.raises(ConfigError, match=r"unknown value of inference\.prior \(laplas\): did you mean 'laplace'"):
        build_inference_config({"family": "mean_field", "prior": "laplas"})
    with pytest.raises(ConfigError, match="unknown prior \\(cauchy\\)"):
        BayesianHead(4, 3, 60, 1.0, 1.0, "cauchy")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prior",
    [
        lambda loc, scale: dist.Cauchy(loc, scale),
        lambda loc, scale: dist.MultivariateNormal(loc, scale_tril=torch.eye(5)),
        lambda loc, scale: dist.Laplace(loc, scale).to_event(2),
    ],
    ids=["independent", "rows", "whole"],
)
def test_any_distribution_of_the_weights_shape_is_a_prior(prior: model.PriorFactory) -> None:
    classifier = BayesianClassifier(FlattenBackbone(4), 3, 60, prior=prior)
    assert classifier.head.prior().event_shape == (3, 5)
    assert classifier(PROBLEM.x_NCHW, PROBLEM.y_N).shape == (60, 3)


def test_a_prior_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="the prior has another shape than the weight \\(prior \\(3,\\)\\)"):
        BayesianHead(4, 3, 60, 1.0, 1.0, lambda loc, scale: dist.Normal(torch.zeros(3), 1.0))


def test_the_prior_follows_its_scale_across_types() -> None:
    head = BayesianHead(4, 3, 60, 0.5, 1.0, "student_t")
    assert head.prior() is head.prior()
    head.double()
    with torch.inference_mode():
        doubled = head.prior()
    weight = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    assert doubled.log_prob(weight).dtype == torch.float64
    torch.autograd.backward(doubled.log_prob(weight))
    head.load_state_dict({"prior_scale": torch.ones(3, 5), "prior_loc": torch.zeros(3, 5)})
    expected = 15 * dist.StudentT(torch.tensor(4.0).double()).log_prob(torch.tensor(0.0).double())
    assert float(head.prior().log_prob(weight.detach())) == pytest.approx(float(expected))
