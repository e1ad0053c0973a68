"""Smooth calibration error: a calibration error without bins."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import dct

from bayesnet.metrics.checks import Array
from bayesnet.metrics.counted import Scores

MIN_BANDWIDTH = 1e-3
_NUM_MODES = 2600  # the kernel of least width passes less than 1e-14 of the next
_BLOCK = 50  # modes computed at once
_NUM_POINTS = 8192  # at which the smoothed residual is integrated: eight to the least bandwidth


def ece_smooth(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Return the smooth ECE: the area under the residual correct - confidence, smoothed over confidence.

    With K the Gaussian kernel of standard deviation s, reflected at 0 and 1, it is the s for which

        \int_0^1 | 1/N \sum_i K(t, confidence_i) (correct_i - confidence_i) | dt = s

    so the width of the kernel is no choice: it is as wide as the error is large. The left side falls with s, so there
    is one such s. Below .001 the kernel is not narrowed further, and the area at .001 is returned. Unlike `ece` it
    changes smoothly with the probabilities; it too is above 0 for a calibrated model.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.

    Reference: Błasiok & Nakkiran, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing, 2023.

    Example:
        >>> round(ece_smooth([[0.75, 0.25]] * 4, [0, 1, 1, 1]), 3)
        0.5
    """
    return ece_smooth_of(Scores.of(probabilities, labels))


def ece_smooth_of(scores: Scores) -> float:
    """Return `ece_smooth` of what is checked already."""
    from scipy.optimize import brentq  # a quarter of a second to import, and predicting needs none of it

    coefficients_M = _cosine_coefficients(scores.confidence_N, scores.correct_N - scores.confidence_N)

    def excess(bandwidth: float) -> float:
        return _area(coefficients_M, bandwidth) - bandwidth

    at_least = excess(MIN_BANDWIDTH)
    if at_least <= 0:
        return at_least + MIN_BANDWIDTH
    return float(brentq(excess, MIN_BANDWIDTH, 1.0, xtol=1e-12))


def _cosine_coefficients(confidence_N: Array, residual_N: Array) -> Array:
    """Return 1/N sum_i residual_i cos(m pi confidence_i) for m = 0, 1, ...: the residual in the cosine basis.

    In it the reflected kernel is diagonal: mode m is damped by exp(-(m pi s)^2 / 2).
    """
    # A row may sum to a little more than 1; the kernel knows no confidence above it.
    angle_N1 = np.pi * np.minimum(confidence_N, 1.0)[:, None]
    block_NB = np.exp(1j * angle_N1 * np.arange(_BLOCK))
    turn_N = np.exp(1j * _BLOCK * angle_N1[:, 0])
    phase_N = residual_N / len(residual_N) + 0j
    blocks = []
    for _ in range(_NUM_MODES // _BLOCK):
        blocks.append((phase_N @ block_NB).real)
        phase_N *= turn_N
    return np.concatenate(blocks)


def _area(coefficients_M: Array, bandwidth: float) -> float:
    """Return the integral over [0, 1] of the size of the residual, smoothed."""
    damped_M = coefficients_M * np.exp(-((np.arange(_NUM_MODES) * np.pi * bandwidth) ** 2) / 2)
    return float(np.abs(dct(damped_M, type=3, n=_NUM_POINTS)).mean())
