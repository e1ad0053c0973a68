"""RAPS, regularised adaptive prediction sets: the APS score plus a penalty on classes that are far down the ranking.

    score(y) = APS score(y) + PENALTY * max(0, rank of y - NUM_UNPENALISED)

where the most probable class has rank 1. The penalty keeps the noise in the long tail of unlikely classes from blowing
up the sets of hard images, so these are smaller than those of APS; in return coverage is less even over hard and easy
images. Both constants are fixed, and stored with the threshold: choosing them by the size of sets on the images that
set the threshold would make these images special, and cost the guarantee.

Reference: Angelopoulos, Bates, Malik & Jordan, Uncertainty Sets for Image Classifiers using Conformal Prediction, 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.calibration.conformal.aps import Score, cumulative, label_scores, sets_below
from bayesnet.calibration.conformal.base import (
    Array,
    ConformalMethod,
    ConformalThreshold,
    check_alpha,
    check_entry,
    checked_uniforms,
    is_number,
    order_statistic,
    unusable,
)
from bayesnet.metrics import checked, checked_probabilities
from bayesnet.types import JsonObject

NAME = "raps"
PENALTY = 0.1
"""Lambda: what each rank beyond the free ones adds to the score; a tenth of the whole range of the APS score."""

NUM_UNPENALISED = 2
"""k_reg: so many of the most probable classes are free of it; a set of two is no sign of a blown-up tail."""


@dataclass(frozen=True)
class RapsThreshold(ConformalThreshold):
    """A fitted RAPS threshold.

    Attributes:
        penalty: Lambda of the score.
        num_unpenalised: k_reg of the score.
    """

    penalty: float
    num_unpenalised: int

    def details(self, covered_N: NDArray[np.bool_], labels_N: NDArray[np.int64]) -> JsonObject:
        """Return the constants of the score."""
        return {"penalty": self.penalty, "num_unpenalised": self.num_unpenalised}


def penalised(penalty: float, num_unpenalised: int) -> Score:
    """Return the RAPS score with these constants.

    Args:
        penalty: Lambda, at least 0.
        num_unpenalised: k_reg, at least 0.
    """

    def score(p_BK: Array, uniform_B: Array) -> Array:
        scores_BK, more_probable_BK = cumulative(p_BK, uniform_B)
        scores_BK += penalty * np.maximum(more_probable_BK + 1 - num_unpenalised, 0)
        return scores_BK

    return score


def fit(probabilities: ArrayLike, labels: ArrayLike, alpha: float, uniform_N: ArrayLike | None = None) -> RapsThreshold:
    """Return the RAPS threshold from a calibration split that nothing else was fitted on.

    Args:
        probabilities: (N, K), as they will be predicted: after calibration.
        labels: (N,), integers in 0..K-1.
        alpha: Probability of missing the label, between 0 and 1.
        uniform_N: `image_uniforms` of the images.

    Raises:
        ConfigError: alpha is not between 0 and 1.
        ValueError: The input is not probabilities, labels and uniforms; names the first bad row.
    """
    check_alpha(alpha)
    p_NK, labels_N = checked(probabilities, labels)
    score = penalised(PENALTY, NUM_UNPENALISED)
    scores_N = label_scores(p_NK, labels_N, checked_uniforms(uniform_N, len(p_NK)), score)
    largest = 1.0 + PENALTY * max(p_NK.shape[1] - NUM_UNPENALISED, 0)
    threshold = order_statistic(scores_N, alpha, largest)
    return RapsThreshold(NAME, float(alpha), threshold, len(labels_N), PENALTY, NUM_UNPENALISED)


def sets(
    probabilities: ArrayLike, threshold: ConformalThreshold, uniform_N: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Return which classes are in the set of each image, (N, K); a set may be empty.

    Args:
        probabilities: (N, K), as for `fit`.
        threshold: From `fit`.
        uniform_N: `image_uniforms` of the images.
    """
    assert isinstance(threshold, RapsThreshold)
    p_NK = checked_probabilities(probabilities)
    score = penalised(threshold.penalty, threshold.num_unpenalised)
    return sets_below(p_NK, checked_uniforms(uniform_N, len(p_NK)), threshold.threshold, score)


def from_json(entry: JsonObject) -> RapsThreshold:
    """Return the threshold that `RapsThreshold.to_json` wrote.

    Raises:
        CheckpointError: Other keys, or a number out of range.
    """
    check_entry(entry, RapsThreshold, largest=math.inf)
    penalty, num_unpenalised = entry["penalty"], entry["num_unpenalised"]
    if not (
        math.isfinite(entry["threshold"])
        and is_number(penalty, 0, 1e6)
        and type(num_unpenalised) is int
        and num_unpenalised >= 0
    ):
        raise unusable(entry)
    threshold, num_calibration = float(entry["threshold"]), entry["num_calibration"]
    return RapsThreshold(NAME, entry["alpha"], threshold, num_calibration, float(penalty), num_unpenalised)


METHOD = ConformalMethod(NAME, "regularised adaptive sets (RAPS)", True, fit, sets, from_json)
