"""T16 and T17: the numerics of the posterior predictive, its decomposition of uncertainty, and the table of draws.

The first two are deterministic: no false alarms. T16 compares log-mean-exp with 50-digit arithmetic (1e-6 relative in
float32, 1e-12 in float64), T17 the entropies with their definitions and identities (1e-9 relative).

The table's error is compared with that of independent draws, both against the mean of 49,152: mean probabilities of
Gaussian logits may be off by a quarter as much at most. It is 0.11 times as much with seed 0 and at most 0.15
with the seeds 0 to 7; a table of independent draws has 0.9 to 1.4. The smallest fault caught is a table with 2.5 times
the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from unittest import mock

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bayesnet import predictive
from bayesnet.battery import faults
from bayesnet.battery.base import Check, Fault, Findings, Outcome, largest
from bayesnet.inference import draw_table

EXTREMES: dict[str, list[list[float]]] = {
    "confidently wrong": [[0.0, 60.0, 0.0], [0.0, 45.0, -3.0]],
    "huge": [[1e4, -1e4, 0.0], [1e4, 1e4 - 1, 0.0]],
    "ties": [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]],
    "impossible class": [[0.0, -math.inf, 1.0], [0.0, -math.inf, 3.0]],
    "one draw": [[-5.0, 3.0, 40.0]],
}
"""Logits of a few draws and three classes."""

FLOAT32_BOUND, FLOAT64_BOUND, IDENTITY_BOUND = 1e-6, 1e-12, 1e-9
TABLE_BOUND = 0.25


def exact_log_mean_softmax(logits_SK: Sequence[Sequence[float]]) -> list[float]:
    """Return log(mean over draws of softmax) with 50 digits, from the definition."""
    with localcontext() as context:
        context.prec = 50
        totals = [Decimal(0)] * len(logits_SK[0])
        for logits_K in logits_SK:
            top = Decimal(max(logits_K))
            weights = [Decimal(0) if value == -math.inf else (Decimal(value) - top).exp() for value in logits_K]
            whole = sum(weights, Decimal(0))
            totals = [total + weight / whole for total, weight in zip(totals, weights, strict=True)]
        return [-math.inf if not total else float((total / len(logits_SK)).ln()) for total in totals]


def log_mean_error(logits_SK: Tensor) -> float:
    """Return the largest error of log-mean-exp: relative above 1 nat; infinite where one is not finite."""
    expected_K = torch.tensor(exact_log_mean_softmax(logits_SK.tolist()), dtype=torch.float64)
    actual_K = predictive.log_mean_exp(logits_SK.log_softmax(-1), 0).double()
    finite_K = expected_K.isfinite()
    if not torch.equal(actual_K.isfinite(), finite_K):
        return math.inf
    error_K = (actual_K - expected_K)[finite_K].abs() / expected_K[finite_K].abs().clamp_min(1)
    return largest(error_K.tolist())


def log_mean_exp(seed: int) -> Findings:
    """T16: the log of a mean probability, at extreme logits and for 1 to 256 draws; no probability is capped."""
    outcomes = []
    for dtype, bound in ((torch.float32, FLOAT32_BOUND), (torch.float64, FLOAT64_BOUND)):
        errors = [log_mean_error(torch.tensor(logits_SK, dtype=dtype)) for logits_SK in EXTREMES.values()]
        name = str(dtype).removeprefix("torch.")
        outcomes.append(Outcome(f"log-mean-exp of extreme logits, {name}, relative", largest(errors), bound))
    generator = torch.Generator().manual_seed(seed)
    logits = [30 * torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (1, 2, 37, 256)]
    error = largest([log_mean_error(logits_SK) for logits_SK in logits])
    outcomes.append(Outcome("log-mean-exp of 1 to 256 draws, float64, relative", error, FLOAT64_BOUND))
    # Categorical(probs) would cap it at 15.94 nats, and float32 would round the probability to 0.
    log_probabilities_SBK = torch.tensor([[[0.0, 51.45]]], dtype=torch.float64).log_softmax(-1)
    probability = float(predictive.summarize(log_probabilities_SBK, 0.9).probability_BK[0, 0])
    error = abs(probability / math.exp(-51.45) - 1)
    return Findings([*outcomes, Outcome("probability of 4.5e-23, relative", error, IDENTITY_BOUND)])


def random_draws(num_draws: int, num_images: int = 20, num_classes: int = 5, *, seed: int = 0) -> Tensor:
    """Return log-probabilities (S, B, K), float64, of logits with standard deviation 3."""
    generator = torch.Generator().manual_seed(seed)
    logits_SBK = 3 * torch.randn(num_draws, num_images, num_classes, generator=generator, dtype=torch.float64)
    return logits_SBK.log_softmax(-1)


def deviation(found: ArrayLike, expected: ArrayLike) -> float:
    """Return the largest relative deviation."""
    return float(np.max(np.abs(np.asarray(found) / np.asarray(expected) - 1)))


def decomposition(seed: int) -> Findings:
    """T17: total = aleatoric + epistemic, each as defined, and 0 <= mutual information <= log K."""
    totals, expecteds, sums, ranges = [], [], [], []
    for num_draws in (1, 2, 16, 256):
        log_probabilities_SBK = random_draws(num_draws, seed=seed)
        summary = predictive.summarize(log_probabilities_SBK, 0.9)
        probabilities = log_probabilities_SBK.exp().numpy()
        mean = probabilities.mean(0)
        aleatoric = -(probabilities * np.log(probabilities)).sum(-1).mean(0)
        totals.append(deviation(summary.entropy_B, -(mean * np.log(mean)).sum(-1)))
        expecteds.append(deviation(summary.expected_entropy_B, aleatoric))
        information_B = summary.mutual_information_B
        sums.append(float(np.max(np.abs(summary.entropy_B - summary.expected_entropy_B - information_B))))
        ranges.append(float(np.max(np.maximum(-information_B, information_B - math.log(5)))))
    return Findings(
        [
            Outcome("predictive entropy, relative", largest(totals), IDENTITY_BOUND),
            Outcome("expected entropy, relative", largest(expecteds), IDENTITY_BOUND),
            Outcome("total less aleatoric less epistemic, nats", largest(sums), FLOAT64_BOUND),
            Outcome("mutual information outside [0, log K] by, nats", largest(ranges), 0),
            *_information_at_the_ends(seed),
        ]
    )


def _information_at_the_ends(seed: int) -> list[Outcome]:
    """Return what equal draws have for mutual information, and what certain draws that disagree lack of log K."""
    equal_SBK = random_draws(1, seed=seed).expand(64, -1, -1)
    information_B = predictive.summarize(equal_SBK, 0.9).mutual_information_B
    certain_SBK = torch.full((5, 1, 5), -math.inf, dtype=torch.float64)
    certain_SBK[range(5), 0, range(5)] = 0.0
    certain = predictive.summarize(certain_SBK, 0.9)
    error = abs(float(certain.mutual_information_B[0]) - math.log(5)) + abs(float(certain.expected_entropy_B[0]))
    return [
        Outcome("mutual information of equal draws, nats", float(information_B.max()), FLOAT64_BOUND),
        Outcome("mutual information of certain draws that disagree, from log K, nats", error, FLOAT64_BOUND),
    ]


def permutations(seed: int) -> Findings:
    """T17: permuting draws leaves the summary, permuting classes permutes it."""
    log_probabilities_SBK = random_draws(32, seed=seed)
    order_S = torch.randperm(32, generator=torch.Generator().manual_seed(seed + 1))
    summary = predictive.summarize(log_probabilities_SBK, 0.9)
    shuffled = predictive.summarize(log_probabilities_SBK[order_S], 0.9)
    flipped = predictive.summarize(log_probabilities_SBK.flip(-1), 0.9)
    information = np.abs(flipped.mutual_information_B - summary.mutual_information_B).max()
    intervals = (summary.lower_BK != shuffled.lower_BK).sum() + (summary.upper_BK[:, ::-1] != flipped.upper_BK).sum()
    error = deviation(shuffled.probability_BK, summary.probability_BK)
    return Findings(
        [
            Outcome("mean probability of shuffled draws, relative", error, FLOAT64_BOUND),
            Outcome("ends of intervals that a permutation moved", int(intervals), 0),
            Outcome("mutual information of flipped classes, nats", float(information), FLOAT64_BOUND),
        ]
    )


def table_error(seed: int, num_draws: int = 256) -> Findings:
    """T16: mean probabilities by the fixed table against long Monte Carlo, beside as many independent draws."""
    generator = torch.Generator().manual_seed(seed)
    mean_BK = 2 * torch.randn(50, 10, generator=generator)
    scale_BK = torch.rand(50, 10, generator=generator) + 0.5

    def mean_probability(noise_SBK: Tensor) -> Tensor:
        return (mean_BK + scale_BK * noise_SBK).softmax(-1).mean(0)

    def by_chance(size: int) -> Tensor:
        return mean_probability(torch.randn(size, 50, 10, generator=generator))

    long_BK = torch.stack([by_chance(2**12) for _ in range(12)]).mean(0)
    table_SK = draw_table.normal_table(num_draws, 10, seed=seed)
    error = (mean_probability(table_SK[:, None]) - long_BK).square().mean().sqrt()
    chance = torch.stack([by_chance(num_draws) for _ in range(20)])
    random_error = (chance - long_BK).square().mean().sqrt()
    return Findings(
        [
            Outcome(
                f"error of {num_draws} draws of the table over independent ones",
                float(error / random_error),
                TABLE_BOUND,
            )
        ]
    )


def _replaced(name: str, replacement: Callable[..., Tensor]) -> Callable[[], faults.Planted]:
    return lambda: mock.patch.object(predictive, name, replacement)


def _exponentials_in_float32(log_values: Tensor, dim: int) -> Tensor:
    return log_values.float().exp().mean(dim).clamp_min(torch.finfo(torch.float32).eps).log().to(log_values.dtype)


def _in_bits() -> faults.Planted:
    original = predictive.entropy
    return mock.patch.object(predictive, "entropy", lambda log_probabilities: original(log_probabilities) / math.log(2))


def _independent_table() -> faults.Planted:
    def table(num_draws: int, num_columns: int, *, seed: int) -> Tensor:
        return torch.randn(num_draws, num_columns, generator=torch.Generator().manual_seed(seed))

    return mock.patch.object(draw_table, "normal_table", table)


EXPONENTIALS_IN_FLOAT32 = Fault(
    "probabilities averaged in float32", _replaced("log_mean_exp", _exponentials_in_float32)
)
SUM_FOR_MEAN = Fault("sum of probabilities", _replaced("log_mean_exp", torch.logsumexp))
FIRST_DRAW = Fault("the first draw for the mean", _replaced("log_mean_exp", lambda values, dim: values.select(dim, 0)))
IN_BITS = Fault("entropies in bits", _in_bits)
INDEPENDENT_TABLE = Fault("independent draws in the table", _independent_table)

CHECKS: tuple[Check, ...] = (
    Check(
        "T16",
        "log of mean probabilities",
        log_mean_exp,
        (faults.MEAN_OF_LOGITS, EXPONENTIALS_IN_FLOAT32, SUM_FOR_MEAN),
    ),
    Check("T16", "table of draws against long Monte Carlo", table_error, (INDEPENDENT_TABLE,)),
    Check("T17", "decomposition of uncertainty", decomposition, (faults.MEAN_OF_LOGITS, IN_BITS)),
    Check("T17", "permutations of draws and classes", permutations, (FIRST_DRAW,)),
)
