"""What may enter a metric: probabilities and labels, checked row by row, as float64 and int64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

SUM_TOLERANCE = 1e-4
_HALF_ROUNDING = 2.0**-11  # rounding to float16 moves a sum of probabilities by as much

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def checked_probabilities(probabilities: ArrayLike) -> Array:
    """Return probabilities as float64 (N, K).

    Raises:
        ValueError: A row is not a distribution (to 1e-4, and the rounding of float16 where that is given); names the
            first one. Or they are of a type that NumPy does not know, as bfloat16.
    """
    given = _array(probabilities)
    tolerance = SUM_TOLERANCE + (_HALF_ROUNDING if given.dtype == np.float16 else 0)
    p_NK = given.astype(np.float64, copy=False)
    if p_NK.ndim != 2 or 0 in p_NK.shape:
        raise ValueError(f"probabilities must have shape (examples, classes), neither of them 0; got {p_NK.shape}")
    with np.errstate(invalid="ignore"):
        bad_N = ~(np.abs(p_NK.sum(1) - 1) <= tolerance) | (p_NK < 0).any(1)
    if bad_N.any():
        row = int(bad_N.argmax())
        if not np.isfinite(p_NK[row]).all():
            raise ValueError(f"row {row}: probabilities contain NaN or infinity")
        if (p_NK[row] < 0).any():
            raise ValueError(f"row {row}: probability {p_NK[row].min():g} is negative; are these logits?")
        raise ValueError(f"row {row}: probabilities sum to {p_NK[row].sum():g}, not 1")
    return p_NK


def checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, Labels]:
    """Return both as arrays, or raise ValueError naming the first bad row."""
    p_NK, labels_N = checked_probabilities(probabilities), np.asarray(labels)
    if labels_N.shape != (len(p_NK),):
        raise ValueError(f"labels must have shape ({len(p_NK)},), one for each row; got {labels_N.shape}")
    if labels_N.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers; got {labels_N.dtype}")
    bad_N = (labels_N < 0) | (labels_N >= p_NK.shape[1])
    if bad_N.any():
        row = int(bad_N.argmax())
        raise ValueError(f"row {row}: label {labels_N[row]} is not in 0..{p_NK.shape[1] - 1}")
    return p_NK, labels_N.astype(np.int64)


def checked_scores(scores: ArrayLike, name: str) -> Array:
    """Return scores as float64 (N,), infinities allowed.

    Raises:
        ValueError: They are not one-dimensional numbers, or one is NaN; names it.
    """
    scores_N = _array(scores).astype(np.float64, copy=False)
    if scores_N.ndim != 1:
        raise ValueError(f"{name} scores must have one dimension; got shape {scores_N.shape}")
    if np.isnan(scores_N).any():
        raise ValueError(f"{name} score {int(np.isnan(scores_N).argmax())} is NaN")
    return scores_N


def _array(values: ArrayLike) -> NDArray[np.generic]:
    """Return real numbers of any type as an array."""
    try:
        array = np.asarray(values)
    except TypeError as error:
        raise ValueError(f"cannot be read as an array, convert to float32 first: {error}") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"expected an array of real numbers; got {array.dtype}")
    return array
