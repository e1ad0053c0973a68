"""Selective prediction: the error rate (risk) among the most confident share (coverage) of the examples.

Where confidences tie, every number is the expectation over the orders of the tie, as for `aurc`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from bayesnet.metrics.checks import Array
from bayesnet.metrics.counted import Counted, Scores, ones, value
from bayesnet.types import JsonObject

_ROUNDING = 1e-9  # so that 7 % of 100 examples are 7, not 8


def eaurc(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the excess AURC: `aurc` less that of the best order, all right answers before all errors; at least 0.

    The best order's area is the exact sum for N examples, not its limit r + (1 - r) log(1 - r).

    Reference: Geifman, Uziel & El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, 2019.

    Example:
        >>> eaurc([[0.9, 0.1], [0.6, 0.4]], [0, 1]), eaurc([[0.6, 0.4], [0.9, 0.1]], [0, 1])
        (0.0, 0.5)
    """
    return eaurc_of(Scores.of(probabilities, labels))


def risk_at_coverage(probabilities: ArrayLike, labels: ArrayLike, coverage: float) -> float:
    """Return the error rate of the most confident ceil(coverage * N) examples.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.
        coverage: Share of the examples that is answered, above 0 to 1.

    Raises:
        ValueError: The coverage is out of range, or the input is not probabilities and labels.

    Example:
        >>> risk_at_coverage([[0.9, 0.1], [0.6, 0.4]], [0, 1], 0.5)
        0.0
    """
    return risk_at_coverage_of(risk_curve(Scores.of(probabilities, labels)), coverage)


def coverage_at_risk(probabilities: ArrayLike, labels: ArrayLike, risk: float) -> float:
    """Return the largest share of the examples, most confident first, whose error rate is at most ``risk``.

    It is 0 where no share has so low a risk. It describes these examples and promises nothing for others.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.
        risk: Error rate that is allowed, 0 to 1.

    Raises:
        ValueError: The risk is out of range, or the input is not probabilities and labels.

    Example:
        >>> coverage_at_risk([[0.9, 0.1], [0.6, 0.4]], [0, 1], 0.1)
        0.5
    """
    return coverage_at_risk_of(risk_curve(Scores.of(probabilities, labels)), risk)


def risk_coverage_record(probabilities: ArrayLike, labels: ArrayLike, *, points: int = 101) -> JsonObject:
    """Return the risk-coverage curve, ready for JSON: at most ``points`` rising coverages, the last of them 1.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.
        points: Largest number of points.

    Returns:
        ``{"coverage": [...], "risk": [...]}``, of equal length.
    """
    risk_N = risk_curve(Scores.of(probabilities, labels))
    num_kept = np.unique(np.maximum(np.round(np.linspace(0, len(risk_N), points)), 1).astype(np.intp))
    return {"coverage": (num_kept / len(risk_N)).tolist(), "risk": risk_N[num_kept - 1].tolist()}


def risk_curve(scores: Scores) -> Array:
    """Return the expected error rate of the k most confident examples, k = 1 to N: (N,)."""
    counted = Counted(scores, ones(scores))
    # Within a tie the expected number of errors rises by the same share with each example.
    size_M, errors_M = counted.size_RM[0, ::-1], counted.errors_RM[0, ::-1]
    kept_N = np.arange(1, len(scores.confidence_N) + 1)
    ends, sums = (np.concatenate(([0.0], np.cumsum(each))) for each in (size_M, errors_M))
    return np.asarray(np.interp(kept_N, ends, sums) / kept_N)


def eaurc_of(scores: Scores) -> float:
    """Return `eaurc` of what is checked already."""
    num_examples, num_hits = len(scores.correct_N), int(scores.correct_N.sum())
    kept = np.arange(num_hits + 1, num_examples + 1)
    best = float(((kept - num_hits) / kept).sum()) / num_examples
    return max(value("aurc", scores) - best, 0.0)


def risk_at_coverage_of(risk_N: Array, coverage: float) -> float:
    """Return `risk_at_coverage` from the curve."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1; got {coverage:g}")
    return float(risk_N[max(math.ceil(coverage * len(risk_N) - _ROUNDING), 1) - 1])


def coverage_at_risk_of(risk_N: Array, risk: float) -> float:
    """Return `coverage_at_risk` from the curve."""
    if not 0 <= risk <= 1:
        raise ValueError(f"risk must be 0 to 1; got {risk:g}")
    allowed = np.flatnonzero(risk_N <= risk + _ROUNDING / len(risk_N))
    return float(allowed[-1] + 1) / len(risk_N) if len(allowed) else 0.0
