"""Class-conditional sets: LAC with a threshold of its own for each class, so that each class is covered.

LAC may miss one class always and still hold 90 % of all labels. Here a class is in a set if its score is at most the
order statistic of the calibration images *of that class*: whatever the true class, its images are missed with
probability at most alpha. The price are larger sets, and classes with too few calibration images are in every set.

Reference: Vovk, Conditional Validity of Inductive Conformal Predictors, 2012 ("Mondrian" predictors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.calibration.conformal.base import (
    BAND_LEVEL,
    ConformalMethod,
    ConformalThreshold,
    check_alpha,
    check_entry,
    coverage_band,
    is_number,
    num_needed,
    order_statistic,
    rank,
    unusable,
)
from bayesnet.metrics import checked, checked_probabilities
from bayesnet.types import JsonObject

NAME = "class_conditional"
_NAMED = 10  # classes that a notice names before it says how many more there are


@dataclass(frozen=True)
class ClassConditionalThreshold(ConformalThreshold):
    """The fitted thresholds of all classes; ``threshold`` is the largest of them.

    Attributes:
        class_thresholds: Largest score, 1 - p, with which each class is in a set; 1 for a class that is in every set.
        class_counts: Calibration images of each class.
    """

    class_thresholds: tuple[float, ...]
    class_counts: tuple[int, ...]

    @property
    def notice(self) -> str | None:
        """Which classes, by index, are in every set because they have too few calibration images."""
        return self.named_notice([f"class {index}" for index in range(len(self.class_counts))])

    def named_notice(self, classes: Sequence[str]) -> str | None:
        """Return which classes are in every set because they have too few calibration images, or None.

        Args:
            classes: Names in index order.
        """
        pairs = zip(classes, self.class_counts, strict=True)
        few = [f"{name} ({count})" for name, count in pairs if rank(count, self.alpha) > count]
        if not few:
            return None
        named = ", ".join(few[:_NAMED]) + (f" and {len(few) - _NAMED} more" if len(few) > _NAMED else "")
        return (
            f"too few calibration images for alpha {self.alpha:g} (at least {num_needed(self.alpha)} of each class): "
            f"every set holds {named}"
        )

    def coverage_band(self, labels_N: NDArray[np.int64]) -> tuple[float, float]:
        """Return where the coverage over all classes falls: the law of the sum of a beta-binomial for each class."""
        from scipy.stats import betabinom  # half a second to import, and predicting needs none of it

        law, certain = np.ones(1), 0
        for count, num_test in zip(self.class_counts, self._num_test(labels_N), strict=True):
            k = rank(count, self.alpha)
            if k > count:
                certain += num_test
            elif num_test:
                law = np.convolve(law, betabinom.pmf(np.arange(num_test + 1), num_test, k, count + 1 - k))
        tail = (1 - BAND_LEVEL) / 2
        ends = np.searchsorted(np.cumsum(law), [tail, 1 - tail])
        low, high = (np.minimum(ends, len(law) - 1) + certain) / len(labels_N)
        return float(low), float(high)

    def details(self, covered_N: NDArray[np.bool_], labels_N: NDArray[np.int64]) -> JsonObject:
        """Return ``by_class``: coverage and band of each class, None where it has no test image."""
        rows = []
        for label, (count, num_test) in enumerate(zip(self.class_counts, self._num_test(labels_N), strict=True)):
            coverage = float(covered_N[labels_N == label].mean()) if num_test else None
            band = list(coverage_band(count, num_test, self.alpha)) if num_test else [None, None]
            rows.append({"coverage": coverage, "band": band, "num_test": num_test, "num_calibration": count})
        return {"by_class": rows}

    def _num_test(self, labels_N: NDArray[np.int64]) -> list[int]:
        return [int(count) for count in np.bincount(labels_N, minlength=len(self.class_counts))]


def fit(
    probabilities: ArrayLike, labels: ArrayLike, alpha: float, uniform_N: ArrayLike | None = None
) -> ClassConditionalThreshold:
    """Return the threshold of each class from a calibration split that nothing else was fitted on.

    Args:
        probabilities: (N, K), as they will be predicted: after calibration.
        labels: (N,), integers in 0..K-1; a class may have none.
        alpha: Probability of missing the label, between 0 and 1.
        uniform_N: Not used: the score is not random.

    Raises:
        ConfigError: alpha is not between 0 and 1.
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    check_alpha(alpha)
    p_NK, labels_N = checked(probabilities, labels)
    scores_N = 1.0 - p_NK[np.arange(len(labels_N)), labels_N]
    groups = [scores_N[labels_N == label] for label in range(p_NK.shape[1])]
    thresholds = tuple(order_statistic(group, alpha, 1.0) for group in groups)
    counts = tuple(len(group) for group in groups)
    return ClassConditionalThreshold(NAME, float(alpha), max(thresholds), len(labels_N), thresholds, counts)


def sets(
    probabilities: ArrayLike, threshold: ConformalThreshold, uniform_N: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Return which classes are in the set of each image, (N, K); a set may be empty.

    Args:
        probabilities: (N, K), as for `fit`.
        threshold: From `fit`.
        uniform_N: Not used.

    Raises:
        ValueError: There are not as many classes as thresholds, or the input is not probabilities.
    """
    assert isinstance(threshold, ClassConditionalThreshold)
    p_NK = checked_probabilities(probabilities)
    if p_NK.shape[1] != len(threshold.class_thresholds):
        raise ValueError(f"expected {len(threshold.class_thresholds)} classes, as calibrated; got {p_NK.shape[1]}")
    return np.asarray(1.0 - p_NK <= np.array(threshold.class_thresholds))


def from_json(entry: JsonObject) -> ClassConditionalThreshold:
    """Return the threshold that `ClassConditionalThreshold.to_json` wrote.

    Raises:
        CheckpointError: Other keys, a number out of range, or numbers that do not belong together.
    """
    check_entry(entry, ClassConditionalThreshold, largest=1)
    thresholds, counts = entry["class_thresholds"], entry["class_counts"]
    right = (
        isinstance(thresholds, list)
        and isinstance(counts, list)
        and 0 < len(thresholds) == len(counts)
        and all(is_number(threshold, 0, 1) for threshold in thresholds)
        and all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == entry["num_calibration"]
        and max(thresholds) == entry["threshold"]
    )
    if not right:
        raise unusable(entry)
    values = tuple(float(threshold) for threshold in thresholds)
    return ClassConditionalThreshold(NAME, entry["alpha"], max(values), sum(counts), values, tuple(counts))


METHOD = ConformalMethod(NAME, "sets that cover each class", False, fit, sets, from_json)
