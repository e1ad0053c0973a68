"""The prior that is learned with the posterior: its fixed point, its evidence, its floor, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES
from bayesnet.inference.base import GaussianHeadPosterior
from bayesnet.inference.learned_prior import LearnedPrior
from bayesnet.model import BayesianHead
from bayesnet.step import StepPlan, take_step
from bayesnet.testing import OperatorCounter, build, toy_problem, train_toy

LEARNING = ("mean_field", "matrix_normal", "low_rank", "full_rank", "vbll")


def fitted(family: str, *, steps: int = 400, labels: str = "true", **settings: Any) -> GaussianHeadPosterior:  # noqa: ANN401 - fields of the config
    problem = toy_problem(num_examples=100)
    if labels == "random":
        problem = problem._replace(y_N=torch.arange(100) % 3)
    posterior = build(FAMILIES[family], problem, learn_prior=True, **settings)
    assert isinstance(posterior, GaussianHeadPosterior)
    train_toy(posterior, problem, steps=steps)
    return posterior


def prior_over_optimum(posterior: GaussianHeadPosterior) -> float:
    scale_KD = posterior.posterior_scale()
    assert scale_KD is not None
    mean_square = (posterior.head.loc.detach().square() + scale_KD.square())[:, :-1].mean()
    return float(posterior.model.head.prior_scale[0, 0] / mean_square.sqrt())


@pytest.mark.parametrize("family", LEARNING)
def test_it_ends_where_the_closed_form_says(family: str) -> None:
    posterior = fitted(family)
    assert prior_over_optimum(posterior) == pytest.approx(1, abs=0.02)
    assert posterior.facts() == {
        "prior_scale": {
            "initial": 1.0,
            "final": pytest.approx(float(posterior.model.head.prior_scale[0, 0])),
            "floor": 0.01,
        }
    }
    assert (posterior.model.head.prior_scale[:, -1] == 1).all()


def test_planted_a_prior_that_forgets_the_spread_is_noticed() -> None:
    original = LearnedPrior.update

    def forgetful(self: LearnedPrior, head: BayesianHead, loc_KD: Tensor, scale_KD: Tensor) -> None:
        original(self, head, loc_KD, torch.zeros_like(scale_KD))

    with mock.patch.object(LearnedPrior, "update", forgetful):
        assert abs(prior_over_optimum(fitted("mean_field")) - 1) > 0.05


@pytest.mark.parametrize(("initial", "noise"), [(1.0, 1.0), (0.05, 0.3), (5.0, 2.0)])
def test_with_the_exact_posterior_it_is_the_maximum_of_the_evidence(initial: float, noise: float) -> None:
    """EM: the E step is exact in a linear-Gaussian model, whose evidence is maximised by Brent's method."""
    torch.manual_seed(0)
    x_ND = torch.randn(40, 6, dtype=torch.float64)
    y_N = x_ND @ (0.7 * torch.randn(6, dtype=torch.float64)) + noise * torch.randn(40, dtype=torch.float64)

    def negative_log_evidence(log_scale: float) -> float:
        covariance = math.exp(2 * log_scale) * x_ND @ x_ND.T + noise**2 * torch.eye(40, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance)
        return -float(normal.log_prob(y_N))

    best = math.exp(minimize_scalar(negative_log_evidence, bounds=(-6, 4), method="bounded").x)
    head, prior = BayesianHead(6, 1, 40, initial, 1.0).double(), LearnedPrior(initial, 0.01)
    for _ in range(1000):
        precision = x_ND.T @ x_ND / noise**2 + torch.eye(6, dtype=torch.float64) / head.prior_scale[0, 0] ** 2
        covariance = torch.linalg.inv(precision)
        loc_1D = (covariance @ x_ND.T @ y_N / noise**2)[None]
        bias = torch.zeros(1, 1, dtype=torch.float64)
        prior.update(head, torch.cat([loc_1D, bias], 1), torch.cat([covariance.diagonal().sqrt()[None], bias], 1))
    assert float(head.prior_scale[0, 0]) == pytest.approx(best, rel=1e-4)


def test_the_bound_gains_from_it() -> None:
    """Its ELBO is above that of the fixed prior that it began with; 2 nats is more than both fits are off."""
    problem = toy_problem(num_examples=100)
    ends = []
    for learn in (False, True):
        posterior = build(FAMILIES["vbll"], problem, learn_prior=learn, prior_scale=10.0)
        train_toy(posterior, problem, steps=600)
        ends.append(float(posterior.loss(problem.x_NCHW, problem.y_N).total.detach()) * 100)
    assert ends[1] < ends[0] - 2


def test_a_head_that_explains_nothing_ends_at_the_floor() -> None:
    posterior = fitted("mean_field", labels="random", steps=800, prior_scale_floor=0.3)
    assert float(posterior.model.head.prior_scale[:, :-1].max()) == pytest.approx(0.3)


def test_a_loss_leaves_it_alone() -> None:
    """So two losses can be added and differentiated, and validation moves nothing."""
    posterior, problem = fitted("mean_field", steps=20).train(), toy_problem(num_examples=100)
    before = posterior.model.head.prior_scale.clone()
    first, second = (posterior.loss(problem.x_NCHW, problem.y_N).total for _ in range(2))
    torch.autograd.backward(first + second)
    assert torch.equal(posterior.model.head.prior_scale, before)


def test_a_step_in_parts_moves_it_once() -> None:
    problem, moved = toy_problem(num_examples=100), []
    for accumulation in (1, 4):
        posterior = build(FAMILIES["mean_field"], problem, learn_prior=True).train()
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.0)
        take_step(posterior, (optimizer,), problem.x_NCHW, problem.y_N, plan=StepPlan(accumulation))
        moved.append(posterior.facts()["prior_scale"]["final"])
    assert moved[0] == moved[1] != 1.0


def test_it_is_saved_with_the_posterior() -> None:
    posterior = fitted("full_rank", steps=20)
    other = build(FAMILIES["full_rank"], toy_problem(num_examples=100), learn_prior=True, seed=1)
    other.load_state_dict(posterior.state_dict())
    assert other.facts() == posterior.facts()
    assert other.facts()["prior_scale"]["final"] != 1.0


def test_learning_does_not_wait_for_the_device() -> None:
    problem = toy_problem()
    posterior = build(FAMILIES["mean_field"], problem, learn_prior=True).train()
    posterior.after_step()
    with OperatorCounter() as counter:
        posterior.after_step()
    assert counter.num_operators > 0
    assert counter.num_host_syncs == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_scale_floor": 0.0}, r"must be positive and finite \(inference.prior_scale_floor = 0.0\)"),
        ({"prior_scale_floor": 2.0}, r"exceeds inference.prior_scale = 1.0 \(inference.prior_scale_floor = 2.0\)"),
        ({"prior": "laplace"}, r"only the normal prior can be learned \(inference.learn_prior\)"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(FAMILIES["mean_field"], toy_problem(), learn_prior=True, **settings)


@pytest.mark.parametrize("check", [prior_over_optimum])
def test_without_it_the_prior_stays(check: Callable[[GaussianHeadPosterior], float]) -> None:
    problem = toy_problem(num_examples=100)
    posterior = build(FAMILIES["mean_field"], problem)
    assert isinstance(posterior, GaussianHeadPosterior)
    train_toy(posterior, problem, steps=50)
    assert (posterior.model.head.prior_scale == 1).all()
    assert posterior.facts() == {}
    assert check(posterior) != pytest.approx(1, abs=0.02)
