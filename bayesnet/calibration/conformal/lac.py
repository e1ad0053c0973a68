"""LAC, the least ambiguous set-valued classifier: the score of a class is 1 - p, so a set holds all that is likely.

No other sets of the same coverage are smaller on average if the probabilities are right; hard images pay for it, whose
sets are too often empty or miss the label.

Reference: Sadinle, Lei & Wasserman, Least Ambiguous Set-Valued Classifiers with Bounded Error Levels, 2019.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.calibration.conformal.base import (
    ConformalMethod,
    ConformalThreshold,
    check_alpha,
    order_statistic,
    simple_threshold,
)
from bayesnet.metrics import checked, checked_probabilities

NAME = "lac"


def fit(
    probabilities: ArrayLike, labels: ArrayLike, alpha: float, uniform_N: ArrayLike | None = None
) -> ConformalThreshold:
    """Return the LAC threshold from a calibration split that nothing else was fitted on.

    Args:
        probabilities: (N, K), as they will be predicted: after calibration.
        labels: (N,), integers in 0..K-1.
        alpha: Probability of missing the label, between 0 and 1.
        uniform_N: Not used: the score is not random.

    Returns:
        The threshold; 1 (full sets) where k > N, which `ConformalThreshold.notice` says.

    Raises:
        ConfigError: alpha is not between 0 and 1.
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    check_alpha(alpha)
    p_NK, labels_N = checked(probabilities, labels)
    scores_N = 1.0 - p_NK[np.arange(len(labels_N)), labels_N]
    return ConformalThreshold(NAME, float(alpha), order_statistic(scores_N, alpha, 1.0), len(labels_N))


def sets(
    probabilities: ArrayLike, threshold: ConformalThreshold, uniform_N: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Return which classes are in the set of each image, (N, K); a set may be empty.

    The score is computed as it was for the threshold, so no class that ties with it is dropped by rounding.

    Args:
        probabilities: (N, K), as for `fit`.
        threshold: From `fit`.
        uniform_N: Not used.
    """
    return np.asarray(1.0 - checked_probabilities(probabilities) <= threshold.threshold)


METHOD = ConformalMethod(NAME, "least ambiguous sets (LAC)", False, fit, sets, simple_threshold)
