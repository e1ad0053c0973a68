"""APS, adaptive prediction sets: classes are taken from the most probable down until enough probability is gathered.

The score of class y, with u uniform on [0, 1) for the image, is

    sum of p_j over classes more probable than y  +  u * (p_y and what ties with it)

which is uniform on [0, 1] if the labels are drawn from p, for every image: a hard image gets a larger set, not a set
that misses more often. Tied classes come together, so that no set depends on the order of the classes.

Reference: Romano, Sesia & Candes, Classification with Valid and Adaptive Coverage, 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.calibration.conformal.base import (
    Array,
    ConformalMethod,
    ConformalThreshold,
    check_alpha,
    checked_uniforms,
    order_statistic,
    simple_threshold,
)
from bayesnet.metrics import checked, checked_probabilities

NAME = "aps"
_CHUNK_ELEMENTS = 1_000_000  # scores computed at once: 8 MB a temporary

Score = Callable[[Array, Array], Array]
"""From probabilities (B, K) and uniforms (B,) to the score of every class, (B, K)."""


def cumulative(p_BK: Array, uniform_B: Array) -> tuple[Array, NDArray[np.int64]]:
    """Return the APS score of every class, from 0 to 1, and how many classes are more probable than it.

    Args:
        p_BK: Probabilities.
        uniform_B: In [0, 1).

    Returns:
        Scores (B, K) and counts (B, K).

    Example:
        >>> scores, more_probable = cumulative(np.array([[0.25, 0.5, 0.25]]), np.array([0.5]))
        >>> scores.tolist(), more_probable.tolist()
        ([[0.75, 0.25, 0.75]], [[1, 0, 1]])
    """
    order_BK = np.argsort(-p_BK, axis=1, kind="stable")
    sorted_BK = np.take_along_axis(p_BK, order_BK, 1)
    sums_BK = np.cumsum(sorted_BK, axis=1)
    sums_BK /= sums_BK[:, -1:]  # rows sum to 1 only to a tolerance, and no score may exceed 1
    change_BK = sorted_BK[:, 1:] != sorted_BK[:, :-1]
    edge_B1 = np.ones((len(p_BK), 1), bool)
    position_K = np.arange(p_BK.shape[1])
    first_BK = np.maximum.accumulate(np.where(np.hstack([edge_B1, change_BK]), position_K, 0), axis=1)
    is_last_BK = np.hstack([change_BK, edge_B1])[:, ::-1]
    last_BK = np.minimum.accumulate(np.where(is_last_BK, position_K[::-1], position_K[-1]), axis=1)[:, ::-1]
    before_BK = np.where(first_BK > 0, np.take_along_axis(sums_BK, np.maximum(first_BK - 1, 0), 1), 0.0)
    after_BK = np.take_along_axis(sums_BK, last_BK, 1)
    sorted_scores_BK = np.minimum(before_BK + uniform_B[:, None] * (after_BK - before_BK), 1.0)
    scores_BK, more_probable_BK = np.empty_like(p_BK), np.empty(p_BK.shape, np.int64)
    np.put_along_axis(scores_BK, order_BK, sorted_scores_BK, 1)
    np.put_along_axis(more_probable_BK, order_BK, first_BK, 1)
    return scores_BK, more_probable_BK


def label_scores(p_NK: Array, labels_N: NDArray[np.int64], uniform_N: Array, score: Score) -> Array:
    """Return the score of each image's label, (N,), some images at a time."""
    parts = [
        np.take_along_axis(score(p_NK[rows], uniform_N[rows]), labels_N[rows, None], 1)[:, 0]
        for rows in _chunks(*p_NK.shape)
    ]
    return np.concatenate(parts)


def sets_below(p_NK: Array, uniform_N: Array, threshold: float, score: Score) -> NDArray[np.bool_]:
    """Return which classes have a score of at most the threshold, (N, K), some images at a time."""
    return np.concatenate([score(p_NK[rows], uniform_N[rows]) <= threshold for rows in _chunks(*p_NK.shape)])


def fit(
    probabilities: ArrayLike, labels: ArrayLike, alpha: float, uniform_N: ArrayLike | None = None
) -> ConformalThreshold:
    """Return the APS threshold from a calibration split that nothing else was fitted on.

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
    scores_N = label_scores(p_NK, labels_N, checked_uniforms(uniform_N, len(p_NK)), _score)
    return ConformalThreshold(NAME, float(alpha), order_statistic(scores_N, alpha, 1.0), len(labels_N))


def sets(
    probabilities: ArrayLike, threshold: ConformalThreshold, uniform_N: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Return which classes are in the set of each image, (N, K); a set may be empty.

    Args:
        probabilities: (N, K), as for `fit`.
        threshold: From `fit`.
        uniform_N: `image_uniforms` of the images.
    """
    p_NK = checked_probabilities(probabilities)
    return sets_below(p_NK, checked_uniforms(uniform_N, len(p_NK)), threshold.threshold, _score)


def _score(p_BK: Array, uniform_B: Array) -> Array:
    return cumulative(p_BK, uniform_B)[0]


def _chunks(num_images: int, num_classes: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // num_classes)
    return (slice(start, start + step) for start in range(0, num_images, step))


METHOD = ConformalMethod(NAME, "adaptive sets (APS)", True, fit, sets, simple_threshold)
