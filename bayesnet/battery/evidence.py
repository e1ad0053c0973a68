"""T1 to T4: the evidence lower bound against exact answers.

T1, T3 and T4 compare equalities: no false alarm, and any fault above 1e-6 is caught. T2 compares Monte Carlo means with
the exact ELBO at |z| < 4.892, a false alarm of 1e-6 each; the smallest bias that it catches with power 0.99 is
(4.892 + 2.33) standard errors: for the whole data set 0.2 nat with the local estimator and 2.5 nats with the
weight-space one, whose KL is compared as an equality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from bayesnet.battery import faults
from bayesnet.battery.base import Z_BOUND, Check, Findings, Outcome, largest
from bayesnet.battery.linear_gaussian import regressions
from bayesnet.battery.seeding import seeded
from bayesnet.elbo import ElboTerms, PyroProgram, local_loss, trace_elbo, weight_space_loss
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.model import LABEL, WEIGHT, BayesianHead
from bayesnet.types import LogitGaussian, Loss

EQUAL = 1e-6


class Binary(NamedTuple):
    """A two-class head whose ELBO under a mean-field guide is a sum of one-dimensional Gaussian integrals.

    Attributes:
        features_ND: Features, float64.
        y_N: Labels.
        head: The generative model.
        guide: The guide, its parameters random.
    """

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

    def terms(self, features_BD: Tensor, y_B: Tensor, seed: int) -> ElboTerms:
        """Return the weight-space ELBO of a batch, from a seed."""
        with seeded(seed), torch.no_grad():
            return trace_elbo(self.head, self.guide, features_BD, y_B)

    def compared(self, estimator: str, losses: Sequence[Loss]) -> list[Outcome]:
        """Return how far the objective and its KL are from the exact ones."""
        expected = self.exact_nll() + self.exact_kl() / len(self.y_N)
        return [
            z_outcome(f"{estimator} estimator", [loss.total for loss in losses], expected),
            deviation(f"KL of the {estimator} estimator", losses[0].kl, self.exact_kl()),
        ]


def binary_problem(num_examples: int = 20, *, seed: int = 0) -> Binary:
    """Return random features of dimension 3, random labels, and a guide far from the prior."""
    generator = torch.Generator().manual_seed(2 + seed)
    features_ND = torch.randn(num_examples, 3, generator=generator, dtype=torch.float64)
    y_N = torch.randint(2, (num_examples,), generator=generator)
    with seeded(seed):
        head = BayesianHead(3, 2, num_examples, prior_scale=0.8, prior_bias_scale=1.5).double()
        guide = MeanFieldGuide(head.prior_scale, initial_scale=0.6).double()
    with torch.no_grad():
        guide.loc.copy_(torch.randn(2, 4, generator=generator, dtype=torch.float64))
    return Binary(features_ND, y_N, head, guide)


def z_outcome(name: str, values: Sequence[Tensor | float], expected: float) -> Outcome:
    """Return |z| of the mean of independent values against what it must be."""
    values_S = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
    error = values_S.std() / math.sqrt(len(values_S))
    return Outcome(f"{name}, |z|", abs(float((values_S.mean() - expected) / error)), Z_BOUND)


def deviation(name: str, found: Tensor | float, expected: Tensor | float) -> Outcome:
    """Return the largest relative deviation of what must be equal in float64."""
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    return Outcome(f"{name}, relative", float(((found - expected) / expected).abs().max()), EQUAL)


def evidence_identity(seed: int) -> Findings:
    """T1: at q = the exact posterior, log p(w, y) - log q(w) is the log evidence for every draw."""
    problem = regressions(2, seed=1 + seed)
    posterior = problem.posterior().to_event(1)

    def guide(x_RBD: Tensor, y_RB: Tensor) -> None:
        pyro.sample(WEIGHT, posterior)

    with seeded(seed):
        draws = [trace_elbo(problem.program(), guide, *problem, closed_form_kl=False) for _ in range(100)]
    weights_S = torch.stack([terms.log_likelihood - terms.kl for terms in draws])
    return Findings([deviation("log p(w, y) - log q(w) from log p(y)", weights_S, problem.log_evidence().sum())])


def linear_elbo(seed: int) -> Findings:
    """T2: linear-Gaussian regression at an arbitrary q, the KL closed form or sampled."""
    problem = regressions(1, seed=1 + seed)
    mean_RD, scale_RD = problem.posterior().mean + 0.02, torch.tensor([[0.05, 0.1, 0.08]]).double()

    def guide(x_RBD: Tensor, y_RB: Tensor) -> None:
        pyro.sample(WEIGHT, dist.Normal(mean_RD, scale_RD).to_event(2))

    kl = (-scale_RD.log() + (scale_RD**2 + mean_RD**2) / 2 - 0.5).sum()
    expected = float(problem.elbo(mean_RD, torch.diag_embed(scale_RD**2)))
    outcomes = []
    for closed_form_kl, words in ((True, "closed-form KL"), (False, "sampled KL")):
        with seeded(seed):
            draws = [trace_elbo(problem.program(), guide, *problem, closed_form_kl=closed_form_kl) for _ in range(300)]
        outcomes.append(z_outcome(f"ELBO, {words}", [terms.log_likelihood - terms.kl for terms in draws], expected))
        wrong = sum(terms.kl_is_exact != closed_form_kl for terms in draws)
        outcomes.append(Outcome(f"draws whose label as {words} is wrong", wrong, 0))
        if closed_form_kl:
            outcomes.append(deviation("closed-form KL", draws[0].kl, kl))
    return Findings(outcomes)


def local_elbo(seed: int) -> Findings:
    """T2: a two-class head by local reparameterisation."""
    problem = binary_problem(seed=seed)
    size = len(problem.y_N)
    with seeded(seed), torch.no_grad():
        moments, kl = problem.guide.logit_moments(problem.features_ND), problem.guide.kl(problem.head.prior_scale)
        # Every image 50 times: the mean of 50 draws each.
        moments = LogitGaussian(*(part.repeat(50, *[1] * (part.dim() - 1)) for part in moments))
        losses = [local_loss(moments, problem.y_N.repeat(50), kl, size) for _ in range(600)]
    return Findings(problem.compared("local", losses))


def weight_space_elbo(seed: int) -> Findings:
    """T2: a two-class head by joint draws of the weight."""
    problem = binary_problem(seed=seed)
    arguments = (problem.head, problem.guide, problem.features_ND, problem.y_N, len(problem.y_N))
    with seeded(seed), torch.no_grad():
        losses = [weight_space_loss(*arguments) for _ in range(500)]
    return Findings(problem.compared("weight-space", losses))


def elbo_of_pyro(seed: int) -> Findings:
    """T2: a two-class head by Pyro's own estimators, run on the library's program and guide."""
    problem = binary_problem(seed=seed)
    expected = len(problem.y_N) * problem.exact_nll() + problem.exact_kl()
    outcomes = []
    for stock in (Trace_ELBO, TraceMeanField_ELBO):
        estimator = stock()  # type: ignore[no-untyped-call]
        with seeded(seed), pyro.get_param_store().scope(), torch.no_grad():
            arguments = (problem.head, problem.guide, problem.features_ND, problem.y_N)
            values = [estimator.loss(*arguments) for _ in range(400)]
        outcomes.append(z_outcome(stock.__name__, values, expected))
    return Findings(outcomes)


def three_calls_give_one_kl(seed: int) -> Findings:
    """T2: the KL of a normal guide is closed form, the same in every call."""
    problem = binary_problem(seed=seed)
    values = [float(problem.terms(problem.features_ND, problem.y_N, seed + call).kl) for call in range(3)]
    return Findings([Outcome("range of the KL over three calls, nats", max(values) - min(values), 0)])


def vectorised_equals_loop(seed: int) -> Findings:
    """T3: vectorised particles have the log-likelihoods that each has alone, and those of a formula."""
    head = BayesianHead(4, 3, 100, 1.0, 1.0).double()
    generator = torch.Generator().manual_seed(3 + seed)
    features_BD = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    y_B = torch.randint(3, (10,), generator=generator)
    outcomes = []
    for num_particles in (1, 8):
        weight_PKD = torch.randn(num_particles, 3, 5, generator=generator, dtype=torch.float64)
        together_PB = _log_likelihood(_in_plate(head, weight_PKD), features_BD, y_B)
        surplus = abs(together_PB.numel() - num_particles * len(y_B))
        outcomes.append(Outcome(f"log-probabilities of {num_particles} particles too many or few", surplus, 0))
        if surplus:
            continue
        together_PB = together_PB.reshape(num_particles, -1)
        alone = [
            _log_likelihood(poutine.condition(head, {WEIGHT: weight_KD}), features_BD, y_B) for weight_KD in weight_PKD
        ]
        # A formula that shares no code with the head; a batch of 10 of 100.
        logits_PBK = torch.einsum("bd,pkd->pbk", features_BD, weight_PKD[..., :4]) + weight_PKD[:, None, :, 4]
        index_PB1 = y_B.expand(num_particles, -1)[..., None]
        expected_PB = 100 / 10 * logits_PBK.log_softmax(-1).gather(2, index_PB1)[..., 0]
        outcomes.append(deviation(f"{num_particles} vectorised particles from a loop", together_PB, torch.stack(alone)))
        outcomes.append(deviation(f"{num_particles} vectorised particles from the formula", together_PB, expected_PB))
    return Findings(outcomes)


def _in_plate(head: BayesianHead, weight_PKD: Tensor) -> PyroProgram:
    """Return the head's program at P weights at once."""

    def run(features_BD: Tensor, y_B: Tensor) -> None:
        with pyro.plate("particles", len(weight_PKD), dim=-2):
            poutine.condition(head, {WEIGHT: weight_PKD[:, None]})(features_BD, y_B)

    return run


def _log_likelihood(program: PyroProgram, features_BD: Tensor, y_B: Tensor) -> Tensor:
    """Return what the labels' site adds to the log-density, by particle and image."""
    with pyro.get_param_store().scope():
        trace = poutine.trace(program).get_trace(features_BD, y_B)
    trace.compute_log_prob()
    log_prob: Tensor = trace.nodes[LABEL]["log_prob"]
    return log_prob


def batches_add_up(seed: int) -> Findings:
    """T4: mini-batches of a regression, scaled to N and weighted by size, add up to the full data."""
    problem = regressions(1, seed=1 + seed)
    size = problem.y_RN.shape[1]

    def guide(x_RBD: Tensor, y_RB: Tensor) -> None:
        pyro.sample(WEIGHT, dist.Delta(torch.tensor([[0.3, -0.2, 0.5]]).double()).to_event(2))

    def log_likelihood(x_RBD: Tensor, y_RB: Tensor) -> float:
        return float(trace_elbo(problem.program(size), guide, x_RBD, y_RB, closed_form_kl=False).log_likelihood)

    batches = list(zip(problem.x_RND.split(8, 1), problem.y_RN.split(8, 1), strict=True))
    assert batches[-1][1].shape[1] == 6, "the last batch is meant to be ragged"
    parts = sum(y_RB.shape[1] / size * log_likelihood(x_RBD, y_RB) for x_RBD, y_RB in batches)
    return Findings([deviation("sum over batches", parts, log_likelihood(*problem))])


def batches_of_the_head_add_up(seed: int) -> Findings:
    """T4: mini-batches of a head add up, and each has the whole KL, once."""
    problem = binary_problem(num_examples=20, seed=seed)
    whole = problem.terms(problem.features_ND, problem.y_N, seed)
    batches = list(zip(problem.features_ND.split(7), problem.y_N.split(7), strict=True))
    parts = [problem.terms(*batch, seed) for batch in batches]
    shares = [len(y_B) / len(problem.y_N) * part.log_likelihood for (_, y_B), part in zip(batches, parts, strict=True)]
    kl_error = largest([abs(float(part.kl) - problem.exact_kl()) for part in parts]) / problem.exact_kl()
    return Findings(
        [
            deviation("sum over batches", torch.stack(shares).sum(), whole.log_likelihood),
            Outcome("KL of a batch, relative", kl_error, EQUAL),
        ]
    )


CHECKS: tuple[Check, ...] = (
    Check(
        "T1",
        "evidence identity at the exact posterior",
        evidence_identity,
        (faults.EXACT_SCALE_TIMES_07, faults.WITHOUT_REPLAY),
    ),
    Check("T2", "ELBO of a linear regression at any q", linear_elbo, (faults.KL_TIMES_0, faults.KL_TIMES_2)),
    Check(
        "T2",
        "ELBO of a softmax head, local estimator",
        local_elbo,
        (faults.LOCAL_KL_TIMES_2, faults.LOCAL_KL_TIMES_BATCH, faults.NOISE_TIMES_07, faults.LABELS_ROLLED),
    ),
    Check(
        "T2",
        "ELBO of a softmax head, weight-space estimator",
        weight_space_elbo,
        (faults.KL_TIMES_0, faults.PRIOR_SCALE_TIMES_2),
    ),
    Check("T2", "ELBO of a softmax head, Pyro's estimators", elbo_of_pyro, (faults.WITHOUT_BIAS,)),
    Check("T2", "one KL in three calls", three_calls_give_one_kl, (faults.SAMPLED_KL,)),
    Check("T3", "vectorised particles against a loop", vectorised_equals_loop, (faults.BROADCASTING_PRODUCT,)),
    Check("T4", "batches of a regression add up", batches_add_up, (faults.MISSING_PLATE_SCALE,)),
    Check(
        "T4", "batches of a head add up", batches_of_the_head_add_up, (faults.MISSING_PLATE_SCALE, faults.KL_TIMES_2)
    ),
)
