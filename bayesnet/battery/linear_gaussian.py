"""Linear-Gaussian regressions, whose posterior and evidence are known: one Pyro program for many data sets.

    w ~ N(0, I),    y ~ N(X w, 0.5^2 I);    posterior: precision I + X^T X / 0.5^2, mean covariance @ X^T y / 0.5^2

R data sets that share their features are one regression with R outputs. Its posterior is matrix normal: the weights of
all outputs have the same covariance and are independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bayesnet.model import LABEL, WEIGHT

NOISE_SCALE = 0.5

Program = Callable[[Tensor, Tensor], object]


class Regressions(NamedTuple):
    """R data sets of N examples with D features each: w ~ N(0, I), y ~ N(X w, 0.5^2).

    Attributes:
        x_RND: Features, float64.
        y_RN: Targets.
    """

    x_RND: Tensor
    y_RN: Tensor

    def program(self, num_examples: int | None = None) -> Program:
        """Return the program over batches (R, B, D) and (R, B); its one latent site has event shape (R, D).

        Args:
            num_examples: What the likelihood is scaled to; N by default.
        """
        size = num_examples or self.y_RN.shape[1]

        def run(x_RBD: Tensor, y_RB: Tensor) -> None:
            prior = dist.Normal(torch.zeros(x_RBD.shape[0], x_RBD.shape[2]).double(), 1.0).to_event(2)
            w_RD = pyro.sample(WEIGHT, prior)
            if w_RD.dim() > 2:  # (P, 1, R, D): vectorised particles, the 1 in the place of the plate
                w_RD = w_RD.squeeze(-3)
            mean_BR = torch.einsum("rbd,...rd->...br", x_RBD, w_RD)
            with pyro.plate("data", size, subsample=torch.arange(y_RB.shape[1])):
                pyro.sample(LABEL, dist.Normal(mean_BR, NOISE_SCALE).to_event(1), obs=y_RB.T)

        return run

    def posterior(self) -> dist.MultivariateNormal:
        """Return the exact posterior, batch shape (R,), event shape (D,)."""
        precision = torch.eye(self.x_RND.shape[2]).double() + self.x_RND.mT @ self.x_RND / NOISE_SCALE**2
        mean = torch.linalg.solve(precision, (self.x_RND.mT @ self.y_RN[..., None])[..., 0] / NOISE_SCALE**2)
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def log_evidence(self) -> Tensor:
        """Return log p(y) of each data set (R,), nats, from the marginal of y."""
        num_examples = self.y_RN.shape[1]
        covariance = self.x_RND @ self.x_RND.mT + NOISE_SCALE**2 * torch.eye(num_examples).double()
        evidence: Tensor = dist.MultivariateNormal(torch.zeros(num_examples).double(), covariance).log_prob(self.y_RN)
        return evidence

    def elbo(self, mean_RD: Tensor, covariance_RDD: Tensor) -> Tensor:
        """Return the exact ELBO (R,) of Gaussians: the expected log-likelihood, less the divergence from the prior."""
        num_examples, dimension = self.x_RND.shape[1:]
        residual_RN = self.y_RN - (self.x_RND @ mean_RD[..., None])[..., 0]
        spread_R = torch.einsum("rnd,rde,rne->r", self.x_RND, covariance_RDD, self.x_RND)
        squares_R = residual_RN.square().sum(1) + spread_R
        fit_R = -squares_R / (2 * NOISE_SCALE**2) - num_examples / 2 * math.log(2 * math.pi * NOISE_SCALE**2)
        trace_R = covariance_RDD.diagonal(dim1=1, dim2=2).sum(1)
        return fit_R - 0.5 * (trace_R + mean_RD.square().sum(1) - dimension - torch.logdet(covariance_RDD))


def averaged(program: Program, num_particles: int) -> Program:
    """Return the program run on P draws at once and scaled by 1 / P: the ELBO becomes a mean over the draws."""

    def run(x_RBD: Tensor, y_RB: Tensor) -> None:
        with pyro.plate("particles", num_particles, dim=-2), poutine.scale(scale=1 / num_particles):
            program(x_RBD, y_RB)

    return run


def regressions(
    num_sets: int, num_examples: int = 30, dimension: int = 3, *, seed: int = 1, shared_features: bool = False
) -> Regressions:
    """Return data sets drawn from the model, with features that are correlated to different degrees.

    Args:
        num_sets: R.
        num_examples: N.
        dimension: D.
        seed: Of all that is drawn.
        shared_features: Whether all have the features of the first.
    """
    generator = torch.Generator().manual_seed(seed)
    x_RND = torch.randn(num_sets, num_examples, dimension, generator=generator, dtype=torch.float64)
    mixing_RDD = torch.eye(dimension).double() + 0.15 * torch.randn(
        num_sets, dimension, dimension, generator=generator, dtype=torch.float64
    )
    x_RND = x_RND @ mixing_RDD
    if shared_features:
        x_RND = x_RND[:1].expand(num_sets, -1, -1)
    w_RD = torch.randn(num_sets, dimension, generator=generator, dtype=torch.float64)
    noise_RN = torch.randn(num_sets, num_examples, generator=generator, dtype=torch.float64)
    return Regressions(x_RND, (x_RND @ w_RD[..., None])[..., 0] + NOISE_SCALE * noise_RN)
