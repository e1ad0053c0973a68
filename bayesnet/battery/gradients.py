"""T5: gradients of both ELBO estimators of a softmax head, draw by draw against formulas, on average against the truth.

(a) For one draw, autograd equals the formula (1e-6 relative) and central differences (1e-4) in float64: no false alarm.
(b) The mean of 4,096 gradients equals the gradient of the exact ELBO, which is known by 32^3-point quadrature, at
|z| < 5.612 in each of 18 coordinates, of at most 50 allowed: a false alarm below 1e-6. With power 0.99 it catches a
bias of (5.612 + 2.33) standard errors in a coordinate: 4.2 % of the gradient's norm with the local estimator, 4.0 %
with the weight-space one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bayesnet.battery import faults
from bayesnet.battery.base import Check, Findings, Outcome, largest
from bayesnet.battery.seeding import seeded
from bayesnet.elbo import local_loss, weight_space_loss
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.model import BayesianHead

Z_BOUND_OF_50 = 5.612
FORMULA_BOUND, DIFFERENCES_BOUND, STEP = 1e-6, 1e-4, 1e-5
NUM_GRADIENTS = 4096

Estimator = Literal["local", "weight"]


class SoftmaxBatch(NamedTuple):
    """A batch of 4 of 10 examples under a three-class head with a mean-field guide; everything float64.

    Attributes:
        head: The generative model.
        guide: The guide, its parameters random.
        features_BD: Features, which are differentiated by, as for a backbone.
        y_B: Labels.
    """

    head: BayesianHead
    guide: MeanFieldGuide
    features_BD: Tensor
    y_B: Tensor

    def parameters(self) -> dict[str, Tensor]:
        """Return what the loss is differentiated by."""
        return {"means": self.guide.loc, "log scales": self.guide.log_scale, "features": self.features_BD}

    def augmented(self) -> Tensor:
        """Return the features with a last column of ones."""
        return torch.cat([self.features_BD.detach(), torch.ones(len(self.y_B), 1).double()], 1)

    def one_hot(self) -> Tensor:
        """Return the labels (B, K)."""
        return nn.functional.one_hot(self.y_B, 3).double()

    def kl_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradient of KL / N by means and log scales."""
        prior, scale, size = self.head.prior_scale, self.guide.log_scale.detach().exp(), self.head.num_examples
        return self.guide.loc.detach() / prior**2 / size, (scale**2 / prior**2 - 1) / size

    def loss(self, estimator: Estimator) -> Tensor:
        """Return the training objective; the one place where the library is called."""
        size = self.head.num_examples
        if estimator == "weight":
            return weight_space_loss(self.head, self.guide, self.features_BD, self.y_B, size).total
        moments = self.guide.logit_moments(self.features_BD)
        return local_loss(moments, self.y_B, self.guide.kl(self.head.prior_scale), size).total

    def gradients(self, estimator: Estimator, seed: int) -> tuple[Tensor, ...]:
        """Return the gradients of a draw by all parameters, zeros where the loss does not depend on one."""
        with seeded(seed):
            loss = self.loss(estimator)
        return torch.autograd.grad(loss, tuple(self.parameters().values()), materialize_grads=True)


def softmax_batch(*, seed: int = 0) -> SoftmaxBatch:
    """Return random features and a guide away from its start."""
    generator = torch.Generator().manual_seed(7 + seed)
    features_BD = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    with seeded(seed):
        head = BayesianHead(2, 3, 10, prior_scale=0.8, prior_bias_scale=1.5).double()
        guide = MeanFieldGuide(head.prior_scale, 0.6).double()
    with torch.no_grad():
        guide.loc.copy_(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        guide.log_scale.add_(0.2 * torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return SoftmaxBatch(head, guide, features_BD, torch.tensor([0, 2, 1, 2]))


def deviations(
    names: Sequence[str], found: Sequence[Tensor], right: Sequence[Tensor], bound: float = FORMULA_BOUND
) -> list[Outcome]:
    """Return each gradient's largest deviation, relative to its largest entry."""
    return [
        Outcome(f"gradient by {name}, relative", float((actual - expected).abs().max() / expected.abs().max()), bound)
        for name, actual, expected in zip(names, found, right, strict=True)
    ]


@contextlib.contextmanager
def recorded(guide: nn.Module) -> Iterator[list[Tensor]]:
    """Give the list of weights that the guide draws."""
    drawn: list[Tensor] = []
    handle = guide.register_forward_hook(lambda module, inputs, weight: drawn.append(weight.detach()))
    try:
        yield drawn
    finally:
        handle.remove()


def local_gradient_of_a_draw(seed: int) -> Findings:
    """T5: d NLL / d logits = (softmax - one-hot) / B, and logits = mean + scale e with scale^2 = s^2 [f^2; 1]."""
    batch = softmax_batch(seed=seed)
    actual = batch.gradients("local", seed)
    with seeded(seed):
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
    return Findings(deviations(list(batch.parameters()), actual, expected))


def weight_gradient_of_a_draw(seed: int) -> Findings:
    """T5: with w = m + s e, d/dm is the gradient by w, d/dlog s is that times s e, both plus the KL's."""
    batch = softmax_batch(seed=seed)
    with recorded(batch.guide) as drawn:
        actual = batch.gradients("weight", seed)
    [weight_KD], (kl_mean, kl_scale) = drawn, batch.kl_gradients()
    augmented_BD = batch.augmented()
    slope_BK = ((augmented_BD @ weight_KD.T).softmax(1) - batch.one_hot()) / 4
    by_weight_KD = slope_BK.T @ augmented_BD
    expected = (
        by_weight_KD + kl_mean,
        by_weight_KD * (weight_KD - batch.guide.loc.detach()) + kl_scale,
        slope_BK @ weight_KD[:, :2],
    )
    return Findings(deviations(list(batch.parameters()), actual, expected))


def gradient_by_differences(estimator: Estimator, seed: int) -> Findings:
    """T5: central differences of the same draw, every parameter moved by 1e-5."""
    batch = softmax_batch(seed=seed)
    actual, expected = batch.gradients(estimator, seed), []

    @torch.no_grad()
    def slope(entries_n: Tensor, index: int) -> float:
        ends, start = [], float(entries_n[index])
        for moved in (start + STEP, start - STEP):
            entries_n[index] = moved
            with seeded(seed):
                ends.append(float(batch.loss(estimator)))
        entries_n[index] = start
        return (ends[0] - ends[1]) / (2 * STEP)

    for parameter in batch.parameters().values():
        entries_n = parameter.detach().view(-1)
        slopes = [slope(entries_n, index) for index in range(len(entries_n))]
        expected.append(torch.tensor(slopes, dtype=torch.float64).view_as(parameter))
    return Findings(deviations(list(batch.parameters()), actual, expected, DIFFERENCES_BOUND))


def largest_z(gradients_SP: Tensor, expected_P: Tensor) -> float:
    """Return the largest |z| of the mean gradient's coordinates, at most 50."""
    assert len(expected_P) <= 50
    error_P = gradients_SP.std(0) / math.sqrt(len(gradients_SP))
    return largest(((gradients_SP.mean(0) - expected_P) / error_P).abs().tolist())


class LocalObjective(nn.Module):
    """The local estimator's loss as a module, for torch.func.

    Args:
        batch: What it is the loss of.
    """

    def __init__(self, batch: SoftmaxBatch) -> None:
        super().__init__()
        self.batch, self.guide = batch._replace(features_BD=batch.features_BD.detach()), batch.guide

    def forward(self) -> Tensor:
        """Return the objective."""
        return self.batch.loss("local")


def softmax_gradients(estimator: Estimator, batch: SoftmaxBatch, seed: int) -> Tensor:
    """Return 4,096 gradients (S, P) by means and log scales.

    Those in weight space come from vectorised particles of the head's own program: copies of the parameters, one draw
    for each, so that the gradient by a copy is the gradient of a draw.
    """
    if estimator == "weight":
        for name in ("loc", "log_scale"):
            copies = getattr(batch.guide, name).detach().expand(NUM_GRADIENTS, 1, 3, 3).clone()
            setattr(batch.guide, name, nn.Parameter(copies))
        parts = batch.gradients("weight", seed)[:2]
        return torch.cat([part.flatten(1) for part in parts], 1)
    objective = LocalObjective(batch)
    parameters = {name: value.detach() for name, value in objective.named_parameters()}

    def gradient(_: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = grad(lambda values: functional_call(objective, values, ()))(parameters)
        return found

    with seeded(seed):
        found = vmap(gradient, randomness="different")(torch.arange(NUM_GRADIENTS))
    return torch.cat([found[name].flatten(1) for name in ("guide.loc", "guide.log_scale")], 1)


def exact_softmax_gradient(batch: SoftmaxBatch) -> Tensor:
    """Return the gradient (P,) of E[NLL] + KL / N: 32 Gauss-Hermite nodes in each of three logits."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(32))
    grid_QK = torch.cartesian_prod(nodes, nodes, nodes)
    weight_Q = torch.cartesian_prod(weights, weights, weights).prod(1) / (2 * math.pi) ** 1.5
    augmented_BD = batch.augmented()
    mean_BK = augmented_BD @ batch.guide.loc.T
    scale_BK = (augmented_BD.square() @ (2 * batch.guide.log_scale).exp().T).sqrt()
    logits_QBK = mean_BK + scale_BK * grid_QK[:, None]
    chosen_QB = logits_QBK.log_softmax(2).gather(2, batch.y_B.expand(len(grid_QK), -1)[..., None])[..., 0]
    nll = -(weight_Q @ chosen_QB).mean()
    by_mean, by_scale = torch.autograd.grad(nll, (batch.guide.loc, batch.guide.log_scale))
    kl_mean, kl_scale = batch.kl_gradients()
    return torch.cat([(by_mean + kl_mean).flatten(), (by_scale + kl_scale).flatten()])


def mean_softmax_gradient(estimator: Estimator, seed: int) -> Findings:
    """T5: the mean of 4,096 gradients of a softmax head against quadrature."""
    batch = softmax_batch(seed=seed)
    expected_P = exact_softmax_gradient(batch)
    z = largest_z(softmax_gradients(estimator, batch, seed), expected_P)
    return Findings([Outcome(f"largest |z| of {len(expected_P)} coordinates", z, Z_BOUND_OF_50)])


CHECKS: tuple[Check, ...] = (
    Check(
        "T5",
        "gradient of a draw, local estimator",
        local_gradient_of_a_draw,
        (
            faults.LOCAL_KL_TIMES_0,
            faults.LOCAL_KL_TIMES_2,
            faults.NOISE_TIMES_07,
            faults.SCALE_DETACHED,
            faults.LABELS_ROLLED,
        ),
    ),
    Check(
        "T5",
        "gradient of a draw, weight-space estimator",
        weight_gradient_of_a_draw,
        (faults.KL_TIMES_0, faults.MISSING_PLATE_SCALE, faults.PRIOR_SCALE_TIMES_2),
    ),
    Check(
        "T5",
        "gradient by differences, local estimator",
        partial(gradient_by_differences, "local"),
        (faults.SCALE_DETACHED,),
    ),
    Check(
        "T5",
        "gradient by differences, weight-space estimator",
        partial(gradient_by_differences, "weight"),
        (faults.FEATURES_DETACHED,),
    ),
    Check(
        "T5",
        "mean gradient, local estimator",
        partial(mean_softmax_gradient, "local"),
        (faults.LOCAL_KL_TIMES_0, faults.LOCAL_KL_TIMES_BATCH, faults.NOISE_TIMES_07, faults.SCALE_DETACHED),
    ),
    Check(
        "T5",
        "mean gradient, weight-space estimator",
        partial(mean_softmax_gradient, "weight"),
        (faults.KL_TIMES_2, faults.PRIOR_SCALE_TIMES_2),
    ),
)
