r"""T15: Geweke's joint distribution test of `nuts`: two ways to draw weights and labels together must agree.

    marginal-conditional:    w ~ Normal(0, I),  y ~ softmax(W [f; 1])
    successive-conditional:  y ~ softmax(W [f; 1]),  w ~ p(w | y) by our sampler,  again and again

Ten functions of weights and labels have the same mean under both if the sampler draws from the posterior of the model;
a wrong density feeds on itself, since the next labels come from its weights. Each draw of the sampler is the end of a
chain of its own, with mode, whitening and warm-up, so that all of `sample_head` is on trial. A wrong gradient alone is
not an error here: the leapfrog steps of any force leave the density alone, and only waste proposals.

Three classes, one feature, four images; four chains of 250 steps, begun at the joint distribution. Their means have
errors from effective sample sizes. False alarm 1e-6 for all ten together: |z| < 5.33 (5.3 would be 1.2e-6). Smallest
faults caught with power 0.99: a prior sd of the sampler's density 8 % too small or 10 % too large.
Reference: Geweke 2004, "Getting it right: joint distribution tests of posterior simulators", JASA 99.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import torch
from scipy import stats
from torch import Tensor

from bayesnet.battery.base import Check, Fault, Findings, Outcome
from bayesnet.battery.fitted import PRIOR_TWICE_AS_WIDE
from bayesnet.battery.seeding import seeded
from bayesnet.convergence import mcse_mean
from bayesnet.inference.nuts_sampler import HeadTarget, sample_head
from bayesnet.model import BayesianHead, linear_logits

NUM_CLASSES, NUM_EXAMPLES = 3, 4
FEATURES_ND = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]], dtype=torch.float64)
NUM_CHAINS, NUM_STEPS, NUM_WARMUP = 4, 250, 10
NUM_MARGINAL = 200_000

FUNCTIONS = (
    "slope of class 0",
    "bias of class 0",
    "its slope squared",
    "its bias squared",
    "product of two slopes",
    "sum of squared weights",
    "log-likelihood",
    "share of class 0",
    "features of class 0",
    "slope x features of class 0",
)


def functions(weight_SKD: Tensor, y_SN: Tensor) -> Tensor:
    """Return the ten functions (S, 10) of weights (S, K, D + 1) and labels (S, N)."""
    log_probability_SNK = linear_logits(FEATURES_ND, weight_SKD).log_softmax(-1)
    is_zero_SN = (y_SN == 0).double()
    slope_S, bias_S = weight_SKD[:, 0, 0], weight_SKD[:, 0, 1]
    moment_S = is_zero_SN @ FEATURES_ND[:, 0]
    columns = [
        slope_S,
        bias_S,
        slope_S.square(),
        bias_S.square(),
        slope_S * weight_SKD[:, 1, 0],
        weight_SKD.square().sum((1, 2)),
        log_probability_SNK.gather(2, y_SN.unsqueeze(2)).sum((1, 2)),
        is_zero_SN.mean(1),
        moment_S,
        slope_S * moment_S,
    ]
    return torch.stack(columns, 1)


def marginal_draws(num_draws: int) -> tuple[Tensor, Tensor]:
    """Return weights (S, K, D + 1) from the prior and labels (S, N) from them, with torch's random state."""
    weight_SKD = torch.randn(num_draws, NUM_CLASSES, 2, dtype=torch.float64)
    return weight_SKD, draw_labels(weight_SKD)


def draw_labels(weight_SKD: Tensor) -> Tensor:
    """Return labels (S, N) drawn from weights (S, K, D + 1)."""
    probability_SNK = linear_logits(FEATURES_ND, weight_SKD).softmax(-1)
    return torch.multinomial(probability_SNK.flatten(0, 1), 1).view(len(weight_SKD), -1)


def successive_draws(num_steps: int, seed: int) -> Tensor:
    """Return the functions (C, S, 10) along chains that draw labels and weights in turn."""
    head = BayesianHead(1, NUM_CLASSES, NUM_EXAMPLES, 1.0, 1.0)
    weight_CKD, y_CN = marginal_draws(NUM_CHAINS)
    steps = []
    for step in range(num_steps):
        for chain, y_N in enumerate(y_CN):
            run = (seed * num_steps + step) * NUM_CHAINS + chain
            target = HeadTarget(head, FEATURES_ND, y_N)
            zero_KD = torch.zeros(NUM_CLASSES, 2)
            found = sample_head(target, zero_KD, chains=1, warmup=NUM_WARMUP, draws=1, seed=run)
            weight_CKD[chain] = found.draws_CSP[0, -1].view_as(zero_KD)
        steps.append(functions(weight_CKD, y_CN))  # with the labels that the weights were drawn for
        y_CN = draw_labels(weight_CKD)
    return torch.stack(steps, 1)


def z_scores(successive_CSF: Tensor, marginal_SF: Tensor) -> Tensor:
    """Return the difference of the means in standard errors (10,)."""
    errors = [mcse_mean(draws_CS) for draws_CS in successive_CSF.permute(2, 0, 1).numpy()]
    variance_F = torch.tensor(errors).square() + marginal_SF.var(0) / len(marginal_SF)
    return (successive_CSF.mean((0, 1)) - marginal_SF.mean(0)) / variance_F.sqrt()


def cut() -> float:
    """Return what the largest |z| of ten exceeds once in a million times."""
    return float(stats.norm.isf(1e-6 / 2 / len(FUNCTIONS)))


def check_joint_distribution(seed: int) -> Findings:
    """Compare the means of ten functions under both simulators."""
    with seeded(seed):
        marginal_SF = functions(*marginal_draws(NUM_MARGINAL))
        z_F = z_scores(successive_draws(NUM_STEPS, seed), marginal_SF).abs()
    worst = int(z_F.nan_to_num(torch.inf).argmax())
    return Findings([Outcome(f"largest |z| of ten functions ({FUNCTIONS[worst]})", float(z_F[worst]), cut())])


def _likelihood_twice() -> AbstractContextManager[object]:
    """Value and gradient agree, and both are of the wrong density."""
    original = HeadTarget.__init__

    def twice(self: HeadTarget, head: BayesianHead, features_ND: Tensor, y_N: Tensor) -> None:
        original(self, head, features_ND, y_N)
        self.likelihood_scale *= 2

    return mock.patch.object(HeadTarget, "__init__", twice)


def _labels_rolled() -> AbstractContextManager[object]:
    original = HeadTarget.__init__
    return mock.patch.object(
        HeadTarget, "__init__", lambda self, head, features_ND, y_N: original(self, head, features_ND, y_N.roll(1))
    )


CHECKS: tuple[Check, ...] = (
    Check(
        "T15",
        "nuts, joint distribution of weights and labels (Geweke)",
        check_joint_distribution,
        (
            PRIOR_TWICE_AS_WIDE,
            Fault("likelihood counted twice", _likelihood_twice),
            Fault("labels permuted for the sampler", _labels_rolled),
        ),
        full=True,
    ),
)
