"""T1 to T4: the evidence lower bound against exact answers, and planted bugs that each test must reject.

T1, T3 and T4 compare equalities: no false alarm, and any fault above 1e-6 is caught. T2 compares a Monte Carlo mean
with the exact ELBO at |z| < 4.892 (false alarm 1e-6, fixed seeds); the smallest bias that it catches with power 0.99
is (4.892 + 2.33) standard errors: for the whole data set 0.2 nat with the local estimator and 2.5 nats with the
weight-space one, whose KL is compared as an equality (`test_the_stated_power_is_the_real_one` holds both numbers).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from bayesnet import elbo, model
from bayesnet.elbo import local_loss, trace_elbo, weight_space_loss
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.model import LABEL, WEIGHT, BayesianHead
from bayesnet.types import LogitGaussian

Z_CUT = 4.892
NOISE_SCALE = 0.5


class Linear(NamedTuple):
    """A linear-Gaussian regression, whose posterior and evidence are known: w ~ N(0, I), y ~ N(X w, 0.5^2)."""

    x_ND: Tensor
    y_N: Tensor

    def program(self, *, num_examples: int | None = None) -> Callable[[Tensor, Tensor], None]:
        """Return the Pyro program over batches of a data set of N examples."""
        size, dimension = num_examples or len(self.y_N), self.x_ND.shape[1]

        def run(x_BD: Tensor, y_B: Tensor) -> None:
            w_D = pyro.sample(WEIGHT, dist.Normal(torch.zeros(dimension).double(), 1.0).to_event(1))
            with pyro.plate("data", size, subsample=x_BD):
                pyro.sample(LABEL, dist.Normal(x_BD @ w_D, NOISE_SCALE), obs=y_B)

        return run

    def posterior(self) -> dist.MultivariateNormal:
        precision = torch.eye(self.x_ND.shape[1]).double() + self.x_ND.T @ self.x_ND / NOISE_SCALE**2
        mean = torch.linalg.solve(precision, self.x_ND.T @ self.y_N / NOISE_SCALE**2)
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def log_evidence(self) -> float:
        covariance = self.x_ND @ self.x_ND.T + NOISE_SCALE**2 * torch.eye(len(self.y_N)).double()
        return float(dist.MultivariateNormal(torch.zeros(len(self.y_N)).double(), covariance).log_prob(self.y_N))


def linear_problem(num_examples: int = 30, dimension: int = 3) -> Linear:
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(num_examples, dimension, generator=generator, dtype=torch.float64)
    w_D = torch.randn(dimension, generator=generator, dtype=torch.float64)
    noise_N = torch.randn(num_examples, generator=generator, dtype=torch.float64)
    return Linear(x_ND, x_ND @ w_D + NOISE_SCALE * noise_N)


class Binary(NamedTuple):
    """A two-class head whose ELBO under a mean-field guide is a sum of one-dimensional Gaussian integrals."""

    features_ND: Tensor
    y_N: Tensor
    head: BayesianHead
    guide: MeanFieldGuide

    def exact_nll(self) -> float:
        """Return the mean expected NLL: -E log sigmoid of a Gaussian margin, by 64-point Gauss-Hermite quadrature."""
        weight, scale = self.guide.loc.detach(), self.guide.log_scale.detach().exp()
        augmented_ND = torch.cat([self.features_ND, torch.ones(len(self.y_N), 1).double()], 1)
        sign_N = 2.0 * self.y_N.double() - 1
        margin_N = sign_N * (augmented_ND @ (weight[1] - weight[0]))
        spread_N = (augmented_ND.square() @ (scale[0].square() + scale[1].square())).sqrt()
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        points = margin_N[:, None] + spread_N[:, None] * torch.from_numpy(nodes)
        losses = torch.nn.functional.softplus(-points) @ torch.from_numpy(weights) / math.sqrt(2 * math.pi)
        return float(losses.mean())

    def exact_kl(self) -> float:
        """Return KL(q || p) by the formula of two Gaussians, written out here a second time on purpose."""
        mean, sd, prior = self.guide.loc.detach(), self.guide.log_scale.detach().exp(), self.head.prior_scale
        return float((torch.log(prior / sd) + (sd**2 + mean**2) / (2 * prior**2) - 0.5).sum())


def binary_problem(num_examples: int = 20) -> Binary:
    generator = torch.Generator().manual_seed(2)
    features_ND = torch.randn(num_examples, 3, generator=generator, dtype=torch.float64)
    y_N = torch.randint(2, (num_examples,), generator=generator)
    head = BayesianHead(3, 2, num_examples, prior_scale=0.8, prior_bias_scale=1.5).double()
    guide = MeanFieldGuide(head.prior_scale, initial_scale=0.6).double()
    with torch.no_grad():
        guide.loc.copy_(torch.randn(2, 4, generator=generator, dtype=torch.float64))
    return Binary(features_ND, y_N, head, guide)


def z_score(values: Tensor, expected: float) -> float:
    return float((values.mean() - expected) / (values.std() / math.sqrt(len(values))))


# T1: at q = the exact posterior, log p(w, y) - log q(w) is the log evidence for every draw.


def check_evidence_identity() -> None:
    problem = linear_problem()
    posterior = problem.posterior()

    def guide(x_BD: Tensor, y_B: Tensor) -> None:
        pyro.sample(WEIGHT, posterior)

    torch.manual_seed(0)
    draws = [trace_elbo(problem.program(), guide, *problem, closed_form_kl=False) for _ in range(100)]
    weights = torch.stack([terms.log_likelihood - terms.kl for terms in draws])
    evidence = problem.log_evidence()
    assert float((weights - evidence).abs().max()) <= 1e-6 * abs(evidence)


def test_t1_evidence_identity() -> None:
    check_evidence_identity()


# T2: the ELBO at an arbitrary q.


def check_linear_elbo() -> None:
    problem = linear_problem()
    mean, scale = problem.posterior().mean + 0.02, torch.tensor([0.05, 0.1, 0.08]).double()

    def guide(x_BD: Tensor, y_B: Tensor) -> None:
        pyro.sample(WEIGHT, dist.Normal(mean, scale).to_event(1))

    kl = float((-scale.log() + (scale**2 + mean**2) / 2 - 0.5).sum())
    residual = (problem.y_N - problem.x_ND @ mean).square() + problem.x_ND.square() @ scale.square()
    constant = 0.5 * len(problem.y_N) * math.log(2 * math.pi * NOISE_SCALE**2)
    expected = float(-residual.sum() / (2 * NOISE_SCALE**2)) - constant - kl
    torch.manual_seed(0)
    for closed_form_kl in (True, False):
        draws = [trace_elbo(problem.program(), guide, *problem, closed_form_kl=closed_form_kl) for _ in range(600)]
        values = torch.stack([terms.log_likelihood - terms.kl for terms in draws])
        assert abs(z_score(values, expected)) < Z_CUT
        assert {terms.kl_is_exact for terms in draws} == {closed_form_kl}


def check_softmax_elbo() -> None:
    problem = binary_problem()
    num_examples = len(problem.y_N)
    torch.manual_seed(0)
    with torch.no_grad():
        moments, kl = problem.guide.logit_moments(problem.features_ND), problem.guide.kl(problem.head.prior_scale)
        # Every image 50 times: the mean of 50 draws each.
        moments = LogitGaussian(*(part.repeat(50, *[1] * (part.dim() - 1)) for part in moments))
        local = [local_loss(moments, problem.y_N.repeat(50), kl, num_examples) for _ in range(600)]
        arguments = (problem.head, problem.guide, problem.features_ND, problem.y_N, num_examples)
        weight = [weight_space_loss(*arguments) for _ in range(500)]
    expected = problem.exact_nll() + problem.exact_kl() / num_examples
    for losses in (local, weight):
        assert abs(z_score(torch.stack([loss.total for loss in losses]), expected)) < Z_CUT
        assert abs(float(losses[0].kl) - problem.exact_kl()) <= 1e-6 * problem.exact_kl()


def check_three_calls_give_one_kl() -> None:
    problem = binary_problem()
    with torch.no_grad():
        values = {float(trace_elbo(problem.head, problem.guide, problem.features_ND, problem.y_N).kl) for _ in range(3)}
    assert len(values) == 1, "the KL is sampled"


def test_t2_linear_elbo() -> None:
    check_linear_elbo()


def test_t2_softmax_elbo_of_both_estimators() -> None:
    check_softmax_elbo()


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
        assert (Z_CUT + 2.33) * error == pytest.approx(stated, rel=0.25)


def test_t2_kl_is_closed_form() -> None:
    check_three_calls_give_one_kl()


@pytest.mark.parametrize("stock", [Trace_ELBO, TraceMeanField_ELBO])
def test_t2_agrees_with_pyros_estimators(stock: type[Trace_ELBO]) -> None:
    problem = binary_problem()
    torch.manual_seed(0)
    with pyro.get_param_store().scope(), torch.no_grad():
        estimator = stock()
        losses = [estimator.loss(problem.head, problem.guide, problem.features_ND, problem.y_N) for _ in range(400)]
    expected = len(problem.y_N) * problem.exact_nll() + problem.exact_kl()
    assert abs(z_score(torch.tensor(losses).double(), expected)) < Z_CUT


def test_an_unregistered_kl_is_labelled_as_sampled() -> None:
    def program() -> None:
        pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    terms = [trace_elbo(program, guide) for _ in range(2)]
    assert not terms[0].kl_is_exact
    assert float(terms[0].kl) != float(terms[1].kl)


# T3: vectorised particles give what a loop over particles gives.


def check_vectorised_equals_loop(num_particles: int = 8) -> None:
    head = BayesianHead(4, 3, 100, 1.0, 1.0).double()
    generator = torch.Generator().manual_seed(3)
    features_BD = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    y_B = torch.randint(3, (10,), generator=generator)
    weight_PKD = torch.randn(num_particles, 3, 5, generator=generator, dtype=torch.float64)

    def vectorised() -> None:
        with pyro.plate("particles", num_particles, dim=-2):
            poutine.condition(head, {WEIGHT: weight_PKD[:, None]})(features_BD, y_B)

    trace = poutine.trace(vectorised).get_trace()
    trace.compute_log_prob()
    together_PB = trace.nodes[LABEL]["log_prob"]
    assert together_PB.numel() == num_particles * len(y_B), f"log_prob has shape {tuple(together_PB.shape)}"
    for weight_KD, together_B in zip(weight_PKD, together_PB.reshape(num_particles, -1), strict=True):
        alone = poutine.trace(poutine.condition(head, {WEIGHT: weight_KD})).get_trace(features_BD, y_B)
        alone.compute_log_prob()
        alone_B = alone.nodes[LABEL]["log_prob"]
        assert torch.allclose(together_B, alone_B, rtol=1e-6)
        # Against a formula that shares no code with the head.
        logits_BK = features_BD @ weight_KD[:, :4].T + weight_KD[:, 4]
        expected_B = logits_BK.log_softmax(-1).gather(1, y_B[:, None]).squeeze(1)
        assert torch.allclose(alone_B, 100 / 10 * expected_B, rtol=1e-6), "not scaled by N / B"


@pytest.mark.parametrize("num_particles", [1, 8])
def test_t3_vectorised_equals_loop(num_particles: int) -> None:
    check_vectorised_equals_loop(num_particles)


# T4: mini-batches, scaled, add up to the full data; the KL is counted once.


def check_minibatch_scaling() -> None:
    problem = linear_problem(num_examples=30)
    whole = _log_likelihood(problem, problem.x_ND, problem.y_N)
    batches = list(zip(problem.x_ND.split(8), problem.y_N.split(8), strict=True))
    assert len(batches[-1][1]) == 6, "the last batch is meant to be ragged"
    parts = [len(y_B) / len(problem.y_N) * _log_likelihood(problem, x_BD, y_B) for x_BD, y_B in batches]
    assert abs(sum(parts) - whole) <= 1e-6 * abs(whole)


def check_minibatch_scaling_of_the_head() -> None:
    problem = binary_problem(num_examples=20)
    arguments = (problem.head, problem.guide)
    whole = _seeded_terms(*arguments, problem.features_ND, problem.y_N)
    parts, kls = 0.0, []
    for features_BD, y_B in zip(problem.features_ND.split(7), problem.y_N.split(7), strict=True):
        log_likelihood, kl = _seeded_terms(*arguments, features_BD, y_B)
        parts += len(y_B) / len(problem.y_N) * log_likelihood
        kls.append(kl)
    assert abs(parts - whole[0]) <= 1e-6 * abs(whole[0])
    assert max(kls) - min(kls) <= 1e-9, "the KL depends on the batch"


def _log_likelihood(problem: Linear, x_BD: Tensor, y_B: Tensor) -> float:
    weight = torch.tensor([0.3, -0.2, 0.5]).double()

    def guide(x_BD: Tensor, y_B: Tensor) -> None:
        pyro.sample(WEIGHT, dist.Delta(weight).to_event(1))

    program = problem.program(num_examples=len(problem.y_N))
    return float(trace_elbo(program, guide, x_BD, y_B, closed_form_kl=False).log_likelihood)


def _seeded_terms(head: BayesianHead, guide: MeanFieldGuide, features_BD: Tensor, y_B: Tensor) -> tuple[float, float]:
    torch.manual_seed(0)
    with torch.no_grad():
        terms = trace_elbo(head, guide, features_BD, y_B)
    return float(terms.log_likelihood), float(terms.kl)


def test_t4_minibatch_scaling() -> None:
    check_minibatch_scaling()


def test_t4_minibatch_scaling_of_the_head() -> None:
    check_minibatch_scaling_of_the_head()


# Negative controls: bugs of the field, each rejected by a test above.


def kl_times(factor: float) -> contextlib.AbstractContextManager[object]:
    original = elbo._closed_form_kl

    def scaled(guide_site: object, model_site: object) -> Tensor | None:
        divergence = original(guide_site, model_site)  # type: ignore[arg-type]
        return None if divergence is None else factor * divergence

    return mock.patch.object(elbo, "_closed_form_kl", scaled)


def own_kl_times(factor: float) -> contextlib.AbstractContextManager[object]:
    original = MeanFieldGuide.kl
    return mock.patch.object(MeanFieldGuide, "kl", lambda self, prior: factor * original(self, prior))


def sampled_kl() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(elbo, "_closed_form_kl", return_value=None)


def broadcasting_product() -> contextlib.AbstractContextManager[object]:
    def wrong(features_BD: Tensor, weight_KD: Tensor) -> Tensor:
        return features_BD @ weight_KD[..., :-1].mT + weight_KD[..., -1].unsqueeze(-2)

    return mock.patch.object(model, "linear_logits", wrong)


def missing_plate_scale() -> contextlib.AbstractContextManager[object]:
    """The plate takes the batch for the whole data set."""
    original = pyro.plate

    def unscaled(name: str, size: int, *, subsample: Tensor) -> object:
        return original(name, len(subsample), subsample=subsample)

    return mock.patch.object(pyro, "plate", unscaled)


def noise_times(factor: float) -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(elbo, "standard_normal", lambda like: factor * torch.randn_like(like))


def prior_scale_times(factor: float) -> contextlib.AbstractContextManager[object]:
    """The program's prior is not the one that the closed form is told of."""
    return mock.patch.object(
        BayesianHead, "prior", lambda self: dist.Normal(self.prior_loc, factor * self.prior_scale).to_event(2)
    )


def posterior_scale_times(factor: float) -> contextlib.AbstractContextManager[object]:
    original = Linear.posterior

    def narrow(self: Linear) -> dist.MultivariateNormal:
        exact = original(self)
        return dist.MultivariateNormal(exact.mean, covariance_matrix=factor**2 * exact.covariance_matrix)

    return mock.patch.object(Linear, "posterior", narrow)


def permuted_labels() -> contextlib.AbstractContextManager[object]:
    original = local_loss
    return mock.patch(f"{__name__}.local_loss", lambda moments, y, kl, n: original(moments, y.roll(1), kl, n))


PLANTED: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[object]], Callable[[], None]]] = {
    "KL x 0": (lambda: kl_times(0.0), check_softmax_elbo),
    "KL x 2": (lambda: kl_times(2.0), check_linear_elbo),
    "KL x batch": (lambda: own_kl_times(20.0), check_softmax_elbo),
    "KL sampled in silence": (sampled_kl, check_three_calls_give_one_kl),
    "likelihood not scaled to N": (missing_plate_scale, check_minibatch_scaling),
    "likelihood of the head not scaled to N": (missing_plate_scale, check_minibatch_scaling_of_the_head),
    "X @ w.mT broadcasts over particles": (broadcasting_product, check_vectorised_equals_loop),
    "posterior sd x 0.7": (lambda: posterior_scale_times(0.7), check_evidence_identity),
    "noise sd x 0.7": (lambda: noise_times(0.7), check_softmax_elbo),
    "prior sd x 2": (lambda: prior_scale_times(2.0), check_softmax_elbo),
    "labels permuted": (permuted_labels, check_softmax_elbo),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_planted_bug_is_rejected(name: str) -> None:
    plant, check = PLANTED[name]
    with plant(), pytest.raises(AssertionError):
        check()
