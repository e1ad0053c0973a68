"""Metrics that are one number: pure functions of (probabilities_NK, labels_N)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from bayesnet.metrics.checks import checked
from bayesnet.metrics.counted import Scores, value

TOP = 5


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of examples whose most probable class is the label."""
    return value("accuracy", Scores.of(probabilities, labels))


def top5(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of examples whose label is among the five most probable classes, the first of equals first.

    NaN for fewer than six classes, where it says nothing.
    """
    p_NK, labels_N = checked(probabilities, labels)
    num_classes = p_NK.shape[1]
    if num_classes <= TOP:
        return math.nan
    label_N1 = p_NK[np.arange(len(labels_N)), labels_N][:, None]
    first_NK = np.arange(num_classes) < labels_N[:, None]
    ahead_N = (p_NK > label_N1).sum(1) + ((p_NK == label_N1) & first_NK).sum(1)
    return float((ahead_N < TOP).mean())


def nll(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean of -log p(label), in nats; infinite if one label has probability 0 (see `count_infinite`)."""
    return value("nll", Scores.of(probabilities, labels))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the squared distance to the one-hot label, summed over classes, averaged over examples: 0 to 2."""
    return value("brier", Scores.of(probabilities, labels))


def ece(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the expected calibration error: mean over examples of |accuracy - mean confidence| of their bin.

    The 15 bins have equal width and are closed on the right: a confidence on an edge belongs to the bin below, 0 to
    the first bin and 1 to the last. ECE is biased upwards: read it beside `ece_null_band`.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.

    Raises:
        ValueError: The input is not probabilities and labels; names the first bad row. So for every metric.

    Reference: Guo, Pleiss, Sun & Weinberger, On Calibration of Modern Neural Networks, 2017.

    Example:
        >>> ece([[0.75, 0.25], [0.75, 0.25]], [0, 1])
        0.25
    """
    return value("ece", Scores.of(probabilities, labels))


def ace(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the adaptive calibration error: as `ece`, with 15 bins that hold equal numbers of examples.

    Bin b holds the ranks floor(b N / 15) to floor((b + 1) N / 15); fewer than 15 examples have a bin each. Examples
    of equal confidence share their mean correctness.
    """
    return value("ace", Scores.of(probabilities, labels))


def mce(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the maximum calibration error: the largest |accuracy - mean confidence| of a bin of `ece`."""
    return value("mce", Scores.of(probabilities, labels))


def aurc(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the risk-coverage curve: the mean over k of the error rate of the k most confident.

    Where confidences tie, it is the expectation over the orders of the tie.

    Reference: Geifman, Uziel & El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, 2019.
    """
    return value("aurc", Scores.of(probabilities, labels))


def auroc_error(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the chance that an error is less confident than a hit, ties counting half; NaN without errors or hits."""
    return value("auroc_error", Scores.of(probabilities, labels))


def count_infinite(probabilities: ArrayLike, labels: ArrayLike) -> int:
    """Return the number of examples whose label was given probability 0, each of which makes the NLL infinite."""
    return int(np.isinf(Scores.of(probabilities, labels).nll_N).sum())
