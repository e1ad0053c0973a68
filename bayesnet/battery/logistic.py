"""A logistic head of two parameters, slope and bias, whose posterior and evidence a grid gives exactly.

A softmax head of two classes and one feature has four weights, but its likelihood sees only the two differences between
classes, d = w_1 - w_0 ~ N(0, 2 I) a priori; the sums keep their prior. So a grid over d gives the evidence, and mean
and covariance of d and of all four weights, exactly (801 x 801 points from -8 to 8; 401 x 401 give the same to 1e-7).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesnet.testing import ToyProblem, toy_problem

PRIOR_VARIANCE = 2.0
DIFFERENCES = torch.tensor([[-1.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 1.0]]).double()
"""From the weights (slope and bias of class 0, then of class 1) to d."""


class Moments(NamedTuple):
    """A distribution of d = (slope, bias).

    Attributes:
        evidence: Log evidence or ELBO in nats.
        mean_d: Means (2,), float64.
        covariance_dd: Covariance (2, 2), float64.
    """

    evidence: float
    mean_d: Tensor
    covariance_dd: Tensor


def problem() -> ToyProblem:
    """Return 60 images of one feature and two classes."""
    return toy_problem(60, 1, 2)


@functools.cache
def truth(num_points: int = 801, half_width: float = 8.0) -> Moments:
    """Return the exact posterior of d, from a square grid of this many points a side.

    Args:
        num_points: Of each of the two coordinates.
        half_width: Of the square, in the unit of d.
    """
    data = problem()
    grid = torch.linspace(-half_width, half_width, num_points, dtype=torch.float64)
    slope, bias = grid[:, None], grid[None]
    log_joint = -(slope**2 + bias**2) / (2 * PRIOR_VARIANCE) - math.log(2 * math.pi * PRIOR_VARIANCE)
    for x, y in zip(data.x_NCHW.flatten().double(), data.y_N, strict=True):
        log_joint = log_joint + torch.nn.functional.logsigmoid((2 * y - 1) * (slope * x + bias))
    log_cell = 2 * math.log(float(grid[1] - grid[0]))
    evidence = float(log_joint.flatten().logsumexp(0)) + log_cell
    mass = (log_joint - evidence + log_cell).exp()
    mean_d = torch.stack([(mass * slope).sum(), (mass * bias).sum()])
    slope, bias = slope - mean_d[0], bias - mean_d[1]
    cross = (mass * slope * bias).sum()
    covariance_dd = torch.stack([(mass * slope**2).sum(), cross, cross, (mass * bias**2).sum()]).view(2, 2)
    return Moments(evidence, mean_d, covariance_dd)


def elbo(mean_d: Tensor, covariance_dd: Tensor, kl: float) -> float:
    """Return the exact ELBO, nats, of a Gaussian of d whose weights are ``kl`` nats from their prior."""
    data = problem()
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    x_N = data.x_NCHW.flatten().double()
    columns_N2 = torch.stack([x_N, torch.ones_like(x_N)], 1)
    scale_N = ((columns_N2 @ covariance_dd) * columns_N2).sum(1).sqrt()
    logits_NG = (columns_N2 @ mean_d)[:, None] + scale_N[:, None] * torch.tensor(nodes)
    log_likelihood_NG = torch.nn.functional.logsigmoid((2 * data.y_N - 1)[:, None] * logits_NG)
    return float((log_likelihood_NG * torch.tensor(weights / weights.sum())).sum()) - kl


def of_weights(mean_4: Tensor, covariance_44: Tensor, kl: float | None = None) -> Moments:
    """Return the distribution of d for Gaussian weights, and its exact ELBO.

    Args:
        mean_4: Means of the weights.
        covariance_44: Their covariance.
        kl: Their divergence from the prior, Normal(0, I), in nats; computed from the two unless given.
    """
    if kl is None:
        squares = float(covariance_44.trace() + mean_4.square().sum())
        kl = 0.5 * (squares - 4 - float(torch.logdet(covariance_44)))
    mean_d, covariance_dd = DIFFERENCES @ mean_4, DIFFERENCES @ covariance_44 @ DIFFERENCES.T
    return Moments(elbo(mean_d, covariance_dd, kl), mean_d, covariance_dd)
