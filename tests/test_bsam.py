"""bSAM: step by step as the paper's algorithm in NumPy, and its precision at rest.

The precision at rest is a z-test at |z| < 4.892 (false alarm 1e-6, fixed seed) over 4,000 independent weights; the
smallest relative error of s that it catches with power 0.99 is below 4 %. All else are equalities.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bayesnet.bsam import BSAM, PRECISION
from bayesnet.inference.base import Posterior
from bayesnet.step import take_step
from bayesnet.types import Loss

Array = NDArray[np.float64]

NUM_CLASSES, NUM_FEATURES, NUM_EXAMPLES = 3, 4, 50
RATE, RHO, BETA1, BETA2, DAMPING, DELTA = 0.3, 0.2, 0.8, 0.9, 0.05, 0.01
NUM_STEPS, BATCH = 25, 8
Z_CUT, POWER_99 = 4.892, 2.33


class Linear(Posterior):
    """A softmax regression: a weight matrix with weight decay and a bias without."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(NUM_CLASSES, generator=generator, dtype=torch.float64))

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        fit = nn.functional.cross_entropy(x_BCHW.flatten(1) @ self.weight.T + self.bias, y)
        return Loss(fit, fit, torch.zeros_like(fit), fit)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError


class Run(NamedTuple):
    """Weight and bias, one below the other, after each step."""

    mean_TKD: Array
    precision_TKD: Array


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_EXAMPLES, 1, 2, 2, generator=generator, dtype=torch.float64)
    return x, torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=generator)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(NUM_EXAMPLES, (BATCH,), generator=generator) for _ in range(NUM_STEPS)]


def run_ours(optimizer_class: type[BSAM] = BSAM) -> Run:
    posterior = Linear()
    groups = [{"params": [posterior.weight], "weight_decay": DELTA}, {"params": [posterior.bias], "weight_decay": 0.0}]
    optimizer = optimizer_class(
        groups, lr=RATE, num_examples=NUM_EXAMPLES, rho=RHO, beta1=BETA1, beta2=BETA2, damping=DAMPING
    )
    x, y = data()
    means, precisions = [], []
    torch.manual_seed(3)
    for index in batches():
        take_step(posterior, [optimizer], x[index], y[index])
        states = [optimizer.state[p][PRECISION] for p in (posterior.weight, posterior.bias)]
        means.append(torch.cat([posterior.weight.detach(), posterior.bias.detach()[:, None]], 1).numpy())
        precisions.append(torch.cat([states[0], states[1][:, None]], 1).numpy().copy())
    return Run(np.array(means), np.array(precisions))


def gradient(mean_KD: Array, x_BD: Array, y_B: NDArray[np.int64]) -> Array:
    """Return the gradient of the mean cross-entropy of softmax regression, bias last."""
    rows_BD = np.concatenate([x_BD, np.ones((len(x_BD), 1))], 1)
    logits_BK = rows_BD @ mean_KD.T
    odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    error_BK = odds_BK / odds_BK.sum(1, keepdims=True) - np.eye(NUM_CLASSES)[y_B]
    result: Array = error_BK.T @ rows_BD / len(x_BD)
    return result


def run_paper() -> Run:
    """Run algorithm 1 of the paper, line by line and entry by entry."""
    start = Linear()
    mean = torch.cat([start.weight.detach(), start.bias.detach()[:, None]], 1).numpy()
    delta = np.full_like(mean, DELTA)
    delta[:, -1] = 0.0
    precision, momentum = np.ones_like(mean), np.zeros_like(mean)
    x, y = data()
    means, precisions = [], []
    torch.manual_seed(3)
    for index in batches():
        x_BD, y_B = x[index].flatten(1).numpy(), y[index].numpy()
        noise = np.zeros_like(mean)
        noise[:, :-1] = torch.randn(NUM_CLASSES, NUM_FEATURES, dtype=torch.float64).numpy()
        noise[:, -1] = torch.randn(NUM_CLASSES, dtype=torch.float64).numpy()
        at_draw = gradient(mean + noise * np.sqrt(1 / (NUM_EXAMPLES * precision)), x_BD, y_B)
        uphill = gradient(mean + RHO * at_draw / precision, x_BD, y_B)
        momentum = BETA1 * momentum + (1 - BETA1) * (uphill + delta * mean)
        target = np.sqrt(precision) * np.abs(at_draw) + delta + DAMPING
        precision = BETA2 * precision + (1 - BETA2) * target
        mean = mean - RATE * momentum / precision
        means.append(mean)
        precisions.append(precision)
    return Run(np.array(means), np.array(precisions))


def distance(left: Run, right: Run) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def test_it_is_the_papers_algorithm() -> None:
    """After 25 steps."""
    assert distance(run_ours(), run_paper()) < 1e-10


class NoNoise(BSAM):
    """Takes its first gradient at the mean."""

    def add_noise(self) -> None:
        for parameter in self.parameters():
            torch.randn_like(parameter)


class NoiseOfOneExample(BSAM):
    """Draws as if N were 1."""

    def add_noise(self) -> None:
        for group in self.param_groups:
            group["num_examples"] = 1
        super().add_noise()


class NoAscent(BSAM):
    """Takes its second gradient at the mean."""

    def ascend(self) -> None:
        for group in self.param_groups:
            group["rho"] = 0.0
        super().ascend()


class PrecisionOfSecondGradient(BSAM):
    """Learns the precision from the gradient uphill, as Adam under SAM would."""

    def ascend(self) -> None:
        before = [self.state[p][PRECISION].clone() for p in self.parameters()]
        super().ascend()
        for parameter, precision in zip(self.parameters(), before, strict=True):
            self.state[parameter][PRECISION].copy_(precision)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        means = [parameter.detach().clone() for parameter in self.parameters()]
        super().ascend()
        with torch.no_grad():
            for parameter, mean in zip(self.parameters(), means, strict=True):
                parameter.copy_(mean)
        super().step()


class NoDecay(BSAM):
    """Leaves the prior out of the mean's gradient."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        kept = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, kept, strict=True):
            group["weight_decay"] = decay


@pytest.mark.parametrize("planted", [NoNoise, NoiseOfOneExample, NoAscent, PrecisionOfSecondGradient, NoDecay])
def test_planted_faults_are_not_the_papers_algorithm(planted: type[BSAM]) -> None:
    assert distance(run_ours(planted), run_paper()) > 1e-4


class Quadratic(Posterior):
    """The loss sum_j h_j w_j^2 / 2; its posterior under Normal(0, 1 / (N delta)) is Normal(0, 1 / (N (h + delta)))."""

    def __init__(self, curvature_D: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(curvature_D))
        self.curvature_D = curvature_D

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        fit = 0.5 * (self.curvature_D * self.weight.square()).sum()
        return Loss(fit, fit, torch.zeros_like(fit), fit)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError


def precision_at_rest(
    curvature: float, *, num_examples: int = 50, damping: float = 0.0, optimizer_class: type[BSAM] = BSAM
) -> Tensor:
    """Return s of 4,000 weights of one curvature after it has forgotten its start; the means stay at the mode, 0."""
    posterior = Quadratic(torch.full((4_000,), curvature, dtype=torch.float64))
    optimizer = optimizer_class(
        [{"params": [posterior.weight]}],
        lr=0.0,
        num_examples=num_examples,
        beta2=BETA2,
        damping=damping,
        weight_decay=DELTA,
    )
    torch.manual_seed(4)
    for _ in range(300):  # 0.9^300 = 2e-14
        take_step(posterior, [optimizer], torch.zeros(1), torch.zeros(1))
    precision: Tensor = optimizer.state[posterior.weight][PRECISION]
    return precision


@pytest.mark.parametrize("curvature", [0.2, 3.0])
@pytest.mark.parametrize("num_examples", [1, 50])
def test_the_precision_at_rest(curvature: float, num_examples: int) -> None:
    """sqrt(s) |g| = h |e| / sqrt(N) whatever s is, so that s has the mean that the module states."""
    precision = precision_at_rest(curvature, num_examples=num_examples, damping=DAMPING)
    expected = math.sqrt(2 / (math.pi * num_examples)) * curvature + DELTA + DAMPING
    error = precision.std().item() / math.sqrt(len(precision))
    assert (Z_CUT + POWER_99) * error < 0.04 * expected
    assert abs(precision.mean().item() - expected) < Z_CUT * error


def test_a_missing_root_is_seen_at_rest() -> None:
    """The control: |g| in place of sqrt(s) |g|."""

    class NoRoot(BSAM):
        def ascend(self) -> None:
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.grad /= self.state[parameter][PRECISION].sqrt()
            super().ascend()

    precision = precision_at_rest(3.0, damping=DAMPING, optimizer_class=NoRoot)
    expected = math.sqrt(2 / (math.pi * 50)) * 3.0 + DELTA + DAMPING
    assert abs(precision.mean().item() - expected) > Z_CUT * precision.std().item() / math.sqrt(len(precision))


def test_the_variance_at_rest_is_the_posteriors_only_where_the_loss_says_nothing() -> None:
    """Exact to 1e-12 without curvature; 8.6 times the posterior's at h = 3 and N = 50.

    On a Gaussian posterior it is too large by (h + delta) / (sqrt(2 / (pi N)) h + delta), which grows with sqrt(N).
    """
    assert torch.allclose(precision_at_rest(0.0), torch.full((4_000,), DELTA).double(), rtol=1e-12)
    excess = (3.0 + DELTA) / precision_at_rest(3.0).mean().item()
    expected = (3.0 + DELTA) / (math.sqrt(2 / (math.pi * 50)) * 3.0 + DELTA)
    assert excess == pytest.approx(expected, rel=0.04)
    assert round(expected, 1) == 8.6
