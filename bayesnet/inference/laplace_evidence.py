"""The Laplace approximation of the log evidence, and the prior precision that maximises it.

Mode and curvature are held: all is a function of |v|^2 of the mode and of the curvature's eigenvalues, both in units of
the prior's standard deviations.

Reference: MacKay 1992, "Bayesian interpolation".
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

LOWEST_LOG_PRECISION = -12 * math.log(10)


class PriorFit(NamedTuple):
    """What `finalize` found.

    Attributes:
        initial_scale: Prior standard deviation of the weights as configured.
        final_scale: The one used for the posterior.
        floor: The lowest that could be chosen.
        initial_log_evidence: Laplace's log evidence under the configured prior, nats.
        final_log_evidence: Under the one used.
        num_effective: How many of the K (D + 1) weights the data determine under the one used.
    """

    initial_scale: float
    final_scale: float
    floor: float
    initial_log_evidence: float
    final_log_evidence: float
    num_effective: float


def log_evidence(log_likelihood: float, squared_norm: float, eigenvalues: Tensor, precision: float) -> float:
    """Return the Laplace approximation of the log evidence, nats; exact where the likelihood is Gaussian in w.

        log p(y | w) - precision * |v|^2 / 2 - 1/2 sum_i log(1 + h_i / precision)

    Args:
        log_likelihood: At the mode, nats.
        squared_norm: |v|^2 of the mode in units of the prior's standard deviations.
        eigenvalues: h, float64, any shape.
        precision: Of the prior, in its own units: 1 as configured.
    """
    return log_likelihood - 0.5 * (precision * squared_norm + float((eigenvalues / precision).log1p().sum()))


def best_precision(squared_norm: float, eigenvalues: Tensor, highest: float) -> float:
    """Return the precision of highest `log_evidence` with mode and curvature held, at most ``highest``.

    The evidence is concave in log precision, and its maximum is where precision * |v|^2 equals the effective number of
    weights, sum_i h_i / (h_i + precision). The left side rises and the right side falls: bisection finds it.
    """
    low, high = LOWEST_LOG_PRECISION, math.log(highest)
    for _ in range(80):
        middle = 0.5 * (low + high)
        if math.exp(middle) * squared_norm < num_effective(eigenvalues, math.exp(middle)):
            low = middle
        else:
            high = middle
    return math.exp(high)


def num_effective(eigenvalues: Tensor, precision: float) -> float:
    """Return how many weights the data determine: sum_i h_i / (h_i + precision)."""
    return float((eigenvalues / (eigenvalues + precision)).sum())
