"""Split conformal prediction sets: sets of classes that hold the label with a stated probability, whatever the model.

Each method gives every class of an image a score, low where the class is likely. With n calibration images the
threshold is the k-th smallest score of their labels, k = ceil((n + 1)(1 - alpha)), and a set holds every class whose
score is at most that. If calibration and test images are exchangeable, a set misses the label with probability at most
alpha: on average over images and calibration splits, and with `class_conditional` within each class; not for every
kind of image.

Reference: Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, 2005.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.calibration.conformal import aps, class_conditional, lac, raps
from bayesnet.calibration.conformal.base import ConformalMethod, ConformalThreshold, coverage_band, rank, unusable
from bayesnet.calibration.conformal.uniforms import image_uniforms
from bayesnet.errors import CheckpointError
from bayesnet.metrics import checked
from bayesnet.registry import Registry
from bayesnet.types import JsonObject

__all__ = [
    "CONFORMAL",
    "ConformalMethod",
    "ConformalThreshold",
    "coverage_band",
    "evaluate_sets",
    "fit_lac",
    "image_uniforms",
    "prediction_sets",
    "rank",
    "threshold_from_json",
]

CONFORMAL: Registry[ConformalMethod] = Registry(
    "conformal method", {each.name: each for each in (lac.METHOD, aps.METHOD, raps.METHOD, class_conditional.METHOD)}
)

fit_lac = lac.fit


def prediction_sets(
    probabilities: ArrayLike, threshold: ConformalThreshold, uniform_N: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Return which classes are in the set of each image, (N, K); a set may be empty.

    Args:
        probabilities: (N, K), as those that the threshold was fitted on.
        threshold: Of any method.
        uniform_N: `image_uniforms` of the images; the methods that are not randomised need none.

    Raises:
        ValueError: The input is not probabilities, or a randomised method has no uniforms.

    Example:
        >>> threshold = fit_lac([[0.9, 0.1]] * 15 + [[0.4, 0.6]] * 4, [0] * 19, 0.1)
        >>> prediction_sets([[0.7, 0.3], [0.45, 0.55]], threshold).tolist()
        [[True, False], [True, True]]
    """
    return CONFORMAL[threshold.method].sets(probabilities, threshold, uniform_N)


def evaluate_sets(
    probabilities: ArrayLike,
    labels: ArrayLike,
    threshold: ConformalThreshold,
    uniform_N: ArrayLike | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> JsonObject:
    """Return coverage and size of the sets on a test split, ready for JSON.

    Args:
        probabilities: (N, K), as those that the threshold was fitted on.
        labels: (N,), integers in 0..K-1.
        threshold: Of any method.
        uniform_N: `image_uniforms` of the images; the methods that are not randomised need none.
        classes: Names in index order, for the notice; it says indices where there are none.

    Returns:
        ``alpha``, ``method``, ``threshold``, ``coverage``, ``coverage_band`` (99 %), ``mean_set_size``, ``num_empty``,
        ``num_calibration``, ``num_test`` and ``notice`` (None, or what to know). RAPS adds ``penalty`` and
        ``num_unpenalised``, class_conditional ``by_class``: for each class ``coverage``, ``band``, ``num_test`` and
        ``num_calibration``.

    Raises:
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    p_NK, labels_N = checked(probabilities, labels)
    sets_NK = prediction_sets(p_NK, threshold, uniform_N)
    sizes_N, num_test = sets_NK.sum(1), len(labels_N)
    covered_N = sets_NK[np.arange(num_test), labels_N]
    return {
        "alpha": threshold.alpha,
        "method": threshold.method,
        "threshold": threshold.threshold,
        "coverage": float(covered_N.mean()),
        "coverage_band": list(threshold.coverage_band(labels_N)),
        "mean_set_size": float(sizes_N.mean()),
        "num_empty": int((sizes_N == 0).sum()),
        "num_calibration": threshold.num_calibration,
        "num_test": num_test,
        "notice": threshold.notice if classes is None else threshold.named_notice(classes),
        **threshold.details(covered_N, labels_N),
    }


def threshold_from_json(entry: object) -> ConformalThreshold:
    """Return the threshold that `ConformalThreshold.to_json` wrote.

    Raises:
        CheckpointError: Other keys, an unknown method, or a number out of range.
    """
    if not isinstance(entry, dict) or "method" not in entry:
        what = "conformal threshold has other keys than expected"
        raise CheckpointError(what, where=repr(entry)[:80], hint="run calibrate again")
    if entry["method"] not in CONFORMAL:
        raise unusable(entry)
    return CONFORMAL[entry["method"]].from_json(entry)
