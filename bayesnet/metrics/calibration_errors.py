"""How far stated probabilities are from what was true: null band, debiased, class-wise and diagram; Brier's parts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from bayesnet.metrics.checks import Array, checked, checked_probabilities
from bayesnet.metrics.counted import NUM_BINS, Scores, bin_index
from bayesnet.metrics.resampling import calibrated_draws, central, null_values
from bayesnet.types import JsonObject


class NullBand(NamedTuple):
    """Where the ECE of a perfectly calibrated model with the same confidences falls: central interval and mean."""

    low: float
    high: float
    mean: float


class ReliabilityBins(NamedTuple):
    """The equal-width bins of a reliability diagram; an empty bin has count 0 and NaN elsewhere.

    Attributes:
        count_B: Number of examples.
        confidence_B: Mean confidence.
        accuracy_B: Share that is right.
        low_B: Lower end of the accuracies that a calibrated model would show in this bin.
        high_B: Upper end.
    """

    count_B: NDArray[np.intp]
    confidence_B: Array
    accuracy_B: Array
    low_B: Array
    high_B: Array


class BrierDecomposition(NamedTuple):
    """Parts of the Brier score, which is reliability - resolution + uncertainty + within_bin.

    Attributes:
        reliability: Squared distance of the bins' mean probability from the share that was true; 0 if calibrated.
        resolution: Squared distance of that share from the share in all; the more the better.
        uncertainty: The score of always stating the share in all: a property of the labels alone.
        within_bin: What probabilities differ within a bin; may be negative.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


def ece_null_band(
    probabilities: ArrayLike, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> NullBand:
    """Return where ECE falls if the model is perfectly calibrated: its labels drawn from its own probabilities.

    Args:
        probabilities: (N, K), rows sum to 1.
        level: Share of the draws inside the band.
        num_resamples: Number of sets of labels drawn.
        seed: Seed of the draws.

    Reference: Bröcker & Smith, Increasing the Reliability of Reliability Diagrams, 2007 (consistency resampling).
    """
    predicted_N = checked_probabilities(probabilities).argmax(1)  # any labels will do: others are drawn
    null_R = null_values(Scores.of(probabilities, predicted_N), ("ece",), num_resamples, seed)["ece"]
    return NullBand(*central(null_R, level), float(null_R.mean()))


def ece_debiased(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Return ECE less the part that sampling noise adds to it; a value below 0 means no error beyond noise.

    With the gap g of a bin and its standard deviation s under calibration, m^2 = max(g^2 - s^2, 0) estimates the true
    gap, and E\|N(m, s^2)\| - m is subtracted. Under calibration the bias becomes smaller, not zero. With a true
    error it can overshoot: with 1,000 examples, confidence uniform on .3 to 1 and a true error of .05 it is -.012.
    """
    p_NK, labels_N = checked(probabilities, labels)
    confidence_N = p_NK.max(1)
    index_N = bin_index(confidence_N)
    gap_B = np.abs(np.bincount(index_N, confidence_N - (p_NK.argmax(1) == labels_N), NUM_BINS))
    variance_B = np.bincount(index_N, np.maximum(confidence_N * (1 - confidence_N), 0), NUM_BINS)
    noisy = variance_B > 0
    sd_B = np.sqrt(variance_B[noisy])
    true_B = np.sqrt(np.maximum(gap_B[noisy] ** 2 - variance_B[noisy], 0))
    ratio_B = true_B / sd_B
    folded_B = sd_B * math.sqrt(2 / math.pi) * np.exp(-(ratio_B**2) / 2) + true_B * (1 - 2 * ndtr(-ratio_B))
    return float(gap_B.sum() - (folded_B - true_B).sum()) / len(labels_N)


def ece_classwise(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the class-wise ECE: the mean over classes of the ECE of p(class), in the 15 bins of `ece`.

    It sees what is said of every class, not of the predicted one alone; with many classes nearly all of it rests on
    probabilities near 0, so compare it only between models of the same classes.

    Reference: Kull et al., Beyond temperature scaling: Obtaining well-calibrated multi-class probabilities, 2019.

    Example:
        >>> ece_classwise([[0.75, 0.25], [0.75, 0.25]], [0, 1])
        0.25
    """
    p_NK, labels_N = checked(probabilities, labels)
    # Class by class, so that no second (N, K) array is held.
    gaps = [_class_gap(p_NK[:, label], labels_N == label) for label in range(p_NK.shape[1])]
    return float(np.mean(gaps))


def brier_decomposition(probabilities: ArrayLike, labels: ArrayLike) -> BrierDecomposition:
    """Return the parts of `brier`, summed over classes, in the 15 bins of `ece` of each class's probability.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.

    Reference: Murphy, A New Vector Partition of the Probability Score, 1973; the remainder that makes it exact for
    bins of unequal probabilities is of Stephenson, Coelho & Jolliffe, 2008.

    Example:
        >>> brier_decomposition([[0.75, 0.25], [0.75, 0.25]], [0, 1])
        BrierDecomposition(reliability=0.125, resolution=0.0, uncertainty=0.5, within_bin=0.0)
    """
    p_NK, labels_N = checked(probabilities, labels)
    parts = np.zeros(4)
    for label in range(p_NK.shape[1]):
        parts += _class_parts(p_NK[:, label], labels_N == label)
    return BrierDecomposition(*parts.tolist())


def reliability_bins(
    probabilities: ArrayLike, labels: ArrayLike, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> ReliabilityBins:
    """Return the bins of a reliability diagram, each with the band of accuracies that a calibrated model would show."""
    scores = Scores.of(probabilities, labels)
    index_N = bin_index(scores.confidence_N)
    filled_B = index_N[scores.bin_starts]
    count_B = np.bincount(index_N, minlength=NUM_BINS)
    size_B = np.where(count_B > 0, count_B, np.nan)
    draws = calibrated_draws(scores.confidence_N, num_resamples, seed)
    hits_RB = np.concatenate([np.add.reduceat(correct_RN, scores.bin_starts, axis=1) for correct_RN in draws])
    ends_B2 = np.full((NUM_BINS, 2), np.nan)
    ends_B2[filled_B] = [central(hits_R, level) for hits_R in hits_RB.T]
    return ReliabilityBins(
        count_B,
        np.bincount(index_N, scores.confidence_N, NUM_BINS) / size_B,
        np.bincount(index_N, scores.correct_N, NUM_BINS) / size_B,
        ends_B2[:, 0] / size_B,
        ends_B2[:, 1] / size_B,
    )


def reliability_record(
    probabilities: ArrayLike, labels: ArrayLike, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> JsonObject:
    """Return `reliability_bins` ready for JSON: five lists of 15, None in empty bins but for their count."""
    bins = reliability_bins(probabilities, labels, level=level, num_resamples=num_resamples, seed=seed)
    record: JsonObject = {"count": bins.count_B.tolist()}
    for name, values_B in zip(("confidence", "accuracy", "low", "high"), bins[1:], strict=True):
        record[name] = [None if math.isnan(value) else value for value in values_B.tolist()]
    return record


def _class_gap(p_N: Array, true_N: NDArray[np.bool_]) -> float:
    """Return the ECE of the probability of one class."""
    return float(np.abs(np.bincount(bin_index(p_N), p_N - true_N, NUM_BINS)).sum() / len(p_N))


def _class_parts(p_N: Array, true_N: NDArray[np.bool_]) -> Array:
    """Return reliability, resolution, uncertainty and remainder of the probability of one class, (4,)."""
    index_N, share = bin_index(p_N), true_N.mean()
    size_B = np.bincount(index_N, minlength=NUM_BINS)
    mean_B, true_B = (
        np.bincount(index_N, each, NUM_BINS) / np.maximum(size_B, 1)  # an empty bin weighs nothing below
        for each in (p_N, true_N)
    )
    inner_N, rest_N = p_N - mean_B[index_N], true_N - true_B[index_N]
    sums = (
        size_B @ (mean_B - true_B) ** 2,
        size_B @ (true_B - share) ** 2,
        len(p_N) * share * (1 - share),
        inner_N @ (inner_N - 2 * rest_N),
    )
    return np.array(sums) / len(p_N)
