"""Split conformal prediction sets: sets of classes that hold the label with a stated probability, whatever the model.

The score of a class is 1 - p ("least ambiguous set-valued classifier", LAC). With n calibration images the threshold is
the k-th smallest score of their labels, k = ceil((n + 1)(1 - alpha)), and a set holds every class whose score is at
most that. If calibration and test images are exchangeable, a set misses the label with probability at most alpha: on
average over images and calibration splits, not for every class or kind of image.

Reference: Sadinle, Lei & Wasserman, Least Ambiguous Set-Valued Classifiers with Bounded Error Levels, 2019.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.errors import CheckpointError, ConfigError
from bayesnet.metrics import checked, checked_probabilities
from bayesnet.types import JsonObject

METHODS = ("lac",)


class ConformalThreshold(NamedTuple):
    """A fitted threshold.

    Attributes:
        method: "lac".
        alpha: Probability of missing the label that was asked for, between 0 and 1.
        threshold: Largest score of a class in a set, 0 to 1; 1 makes every set full.
        num_calibration: Number of images it was fitted on.
    """

    method: str
    alpha: float
    threshold: float
    num_calibration: int

    @property
    def notice(self) -> str | None:
        """What the user must know: that the split is too small for alpha, so that every set holds all classes."""
        if rank(self.num_calibration, self.alpha) <= self.num_calibration:
            return None
        needed = math.ceil(1 / Fraction(repr(self.alpha))) - 1
        plural = "image is" if self.num_calibration == 1 else "images are"
        return (
            f"{self.num_calibration} calibration {plural} too few for alpha {self.alpha:g} (at least {needed}): "
            "every set holds all classes"
        )

    def to_json(self) -> JsonObject:
        """Return what `threshold_from_json` reads."""
        return self._asdict()


def rank(num_calibration: int, alpha: float) -> int:
    """Return k = ceil((n + 1)(1 - alpha)), exactly: alpha is the decimal that is written, not its binary neighbour.

    Example:
        >>> rank(9, 0.7)  # in floating point (9 + 1) * (1 - 0.7) exceeds 3
        3
    """
    return math.ceil((num_calibration + 1) * (1 - Fraction(repr(float(alpha)))))


def fit_lac(probabilities: ArrayLike, labels: ArrayLike, alpha: float) -> ConformalThreshold:
    """Return the LAC threshold from a calibration split that nothing else was fitted on.

    Args:
        probabilities: (N, K), as they will be predicted: after calibration.
        labels: (N,), integers in 0..K-1.
        alpha: Probability of missing the label, between 0 and 1.

    Returns:
        The threshold; 1 (full sets) where k > N, which `ConformalThreshold.notice` says.

    Raises:
        ConfigError: alpha is not between 0 and 1.
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    _check_alpha(alpha)
    p_NK, labels_N = checked(probabilities, labels)
    num_calibration = len(labels_N)
    k = rank(num_calibration, alpha)
    scores_N = np.sort(1.0 - p_NK[np.arange(num_calibration), labels_N])
    threshold = 1.0 if k > num_calibration else float(scores_N[k - 1])
    return ConformalThreshold("lac", float(alpha), threshold, num_calibration)


def prediction_sets(probabilities: ArrayLike, threshold: ConformalThreshold) -> NDArray[np.bool_]:
    """Return which classes are in the set of each image, (N, K); a set may be empty.

    The score is computed as it was for the threshold, so no class that ties with it is dropped by rounding.

    Args:
        probabilities: (N, K), as for `fit_lac`.
        threshold: From `fit_lac`.
    """
    return np.asarray(1.0 - checked_probabilities(probabilities) <= threshold.threshold)


def coverage_band(num_calibration: int, num_test: int, alpha: float, *, level: float = 0.99) -> tuple[float, float]:
    """Return where the coverage of a test split falls with probability ``level`` if images are exchangeable.

    The number of covered images is BetaBinomial(m; k, n + 1 - k) for scores without ties; ties only raise it.

    Args:
        num_calibration: n, images behind the threshold.
        num_test: m, images that coverage is measured on.
        alpha: Probability of missing the label.
        level: Level of the central band.

    Reference: Vovk, Conditional Validity of Inductive Conformal Predictors, 2012; Angelopoulos & Bates, A Gentle
    Introduction to Conformal Prediction, 2021, section 3.2.

    Example:
        >>> [round(end, 3) for end in coverage_band(1000, 10_000, 0.1)]
        [0.873, 0.924]
    """
    from scipy.stats import betabinom  # half a second to import, and predicting needs none of it

    _check_alpha(alpha)
    k = rank(num_calibration, alpha)
    if k > num_calibration:
        return 1.0, 1.0
    tail = (1 - level) / 2
    low, high = betabinom.ppf([tail, 1 - tail], num_test, k, num_calibration + 1 - k)
    return float(low) / num_test, float(high) / num_test


def evaluate_sets(probabilities: ArrayLike, labels: ArrayLike, threshold: ConformalThreshold) -> JsonObject:
    """Return coverage and size of the sets on a test split, ready for JSON.

    Args:
        probabilities: (N, K), as for `fit_lac`.
        labels: (N,), integers in 0..K-1.
        threshold: From `fit_lac`.

    Returns:
        ``alpha``, ``method``, ``threshold``, ``coverage``, ``coverage_band`` (99 %), ``mean_set_size``, ``num_empty``,
        ``num_calibration``, ``num_test`` and ``notice`` (None, or what to know).

    Raises:
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    p_NK, labels_N = checked(probabilities, labels)
    sets_NK = prediction_sets(p_NK, threshold)
    sizes_N, num_test = sets_NK.sum(1), len(labels_N)
    return {
        "alpha": threshold.alpha,
        "method": threshold.method,
        "threshold": threshold.threshold,
        "coverage": float(sets_NK[np.arange(num_test), labels_N].mean()),
        "coverage_band": list(coverage_band(threshold.num_calibration, num_test, threshold.alpha)),
        "mean_set_size": float(sizes_N.mean()),
        "num_empty": int((sizes_N == 0).sum()),
        "num_calibration": threshold.num_calibration,
        "num_test": num_test,
        "notice": threshold.notice,
    }


def threshold_from_json(entry: object) -> ConformalThreshold:
    """Return the threshold that `ConformalThreshold.to_json` wrote.

    Raises:
        CheckpointError: Other keys, an unknown method, or a number out of range.
    """
    if not isinstance(entry, dict) or set(entry) != set(ConformalThreshold._fields):
        raise CheckpointError("conformal threshold has other keys than expected", where=repr(entry)[:80])
    method, alpha, threshold, num_calibration = (entry[key] for key in ConformalThreshold._fields)
    right = (
        method in METHODS
        and isinstance(alpha, float)
        and 0 < alpha < 1
        and type(threshold) in (int, float)
        and 0 <= threshold <= 1
        and type(num_calibration) is int
        and num_calibration >= 1
    )
    if not right:
        raise CheckpointError("conformal threshold cannot be used", where=repr(entry)[:160], hint="run calibrate again")
    return ConformalThreshold(method, alpha, float(threshold), num_calibration)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ConfigError(
            "alpha must be between 0 and 1", where=alpha, hint="0.1 asks for sets that hold 90 % of labels"
        )
