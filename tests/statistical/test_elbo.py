"""What the docstring of `bayesnet.battery.evidence` says of its power; the label of a sampled KL."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesnet.battery.base import Z_BOUND
from bayesnet.battery.evidence import binary_problem
from bayesnet.elbo import local_loss, trace_elbo, weight_space_loss


def test_the_stated_power_is_the_real_one() -> None:
    """The docstring's smallest faults, from the spread of the very estimates that T2 averages."""
    problem = binary_problem()
    num_examples = len(problem.y_N)
    torch.manual_seed(1)
    with torch.no_grad():
        moments, kl = problem.guide.logit_moments(problem.features_ND), problem.guide.kl(problem.head.prior_scale)
        local = [local_loss(moments, problem.y_N, kl, num_examples).nll for _ in range(400)]
        arguments = (problem.head, problem.guide, problem.features_ND, problem.y_N, num_examples)
        weight = [weight_space_loss(*arguments).nll for _ in range(400)]
    for losses, num_draws, stated in ((local, 600 * 50, 0.2), (weight, 500, 2.5)):
        error = num_examples * float(torch.stack(losses).std()) / math.sqrt(num_draws)
        assert (Z_BOUND + 2.33) * error == pytest.approx(stated, rel=0.25)


def test_an_unregistered_kl_is_labelled_as_sampled() -> None:
    def program() -> None:
        pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    terms = [trace_elbo(program, guide) for _ in range(2)]
    assert not terms[0].kl_is_exact
    assert float(terms[0].kl) != float(terms[1].kl)
