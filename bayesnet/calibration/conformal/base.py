"""What the conformal methods share: thresholds, the rank of the order statistic, and the law of the coverage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.errors import CheckpointError, ConfigError
from bayesnet.types import JsonObject

BAND_LEVEL = 0.99
SATURATED = "labels of the calibration split have a probability below 1e-16: every set holds all classes"
"""The notice where 1 - p of the order statistic is rounded to 1, so that every class ties with it."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ConformalThreshold:
    """A fitted threshold.

    Attributes:
        method: A name in CONFORMAL.
        alpha: Probability of missing the label that was asked for, between 0 and 1.
        threshold: Largest score of a class in a set; the largest that a score can be makes every set full.
        num_calibration: Number of images it was fitted on.
    """

    method: str
    alpha: float
    threshold: float
    num_calibration: int

    @property
    def notice(self) -> str | None:
        """What the user must know: that every set holds all classes, and why."""
        if rank(self.num_calibration, self.alpha) <= self.num_calibration:
            return SATURATED if self.threshold == 1 and self.method == "lac" else None
        plural = "image is" if self.num_calibration == 1 else "images are"
        return (
            f"{self.num_calibration} calibration {plural} too few for alpha {self.alpha:g} "
            f"(at least {num_needed(self.alpha)}): every set holds all classes"
        )

    def named_notice(self, classes: Sequence[str]) -> str | None:
        """Return ``notice`` with the names of the classes that it speaks of.

        Args:
            classes: Names in index order.
        """
        return self.notice

    def coverage_band(self, labels_N: NDArray[np.int64]) -> tuple[float, float]:
        """Return where the coverage of a test split falls with probability BAND_LEVEL.

        Args:
            labels_N: True classes of the test images.
        """
        return coverage_band(self.num_calibration, len(labels_N), self.alpha)

    def details(self, covered_N: NDArray[np.bool_], labels_N: NDArray[np.int64]) -> JsonObject:
        """Return what `evaluate_sets` adds for this method alone, ready for JSON.

        Args:
            covered_N: Whether the set of each test image holds its label.
            labels_N: True classes of the test images.
        """
        return {}

    def to_json(self) -> JsonObject:
        """Return what `threshold_from_json` reads."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }


class ConformalMethod(NamedTuple):
    """An entry of CONFORMAL.

    Attributes:
        name: Its public name.
        title: What it is called in a report.
        randomised: Whether its scores need a uniform number per image, from `image_uniforms`.
        fit: (probabilities (N, K), labels (N,), alpha, uniforms (N,) or None) -> threshold.
        sets: (probabilities (N, K), threshold, uniforms (N,) or None) -> which classes are in each set, bool (N, K).
        from_json: The inverse of `ConformalThreshold.to_json`; raises CheckpointError.
    """

    name: str
    title: str
    randomised: bool
    fit: Callable[[ArrayLike, ArrayLike, float, ArrayLike | None], ConformalThreshold]
    sets: Callable[[ArrayLike, ConformalThreshold, ArrayLike | None], NDArray[np.bool_]]
    from_json: Callable[[JsonObject], ConformalThreshold]


def rank(num_calibration: int, alpha: float) -> int:
    """Return k = ceil((n + 1)(1 - alpha)), exactly: alpha is the decimal that is written, not its binary neighbour.

    Example:
        >>> rank(9, 0.7)  # in floating point (9 + 1) * (1 - 0.7) exceeds 3
        3
    """
    return math.ceil((num_calibration + 1) * (1 - Fraction(repr(float(alpha)))))


def num_needed(alpha: float) -> int:
    """Return the least number of calibration images with which a set need not be full.

    Example:
        >>> num_needed(0.1), num_needed(0.01)
        (9, 99)
    """
    return math.ceil(1 / Fraction(repr(float(alpha)))) - 1


def order_statistic(scores_N: Array, alpha: float, largest: float) -> float:
    """Return the k-th smallest score, k = `rank`; the largest possible one, which makes sets full, where k > N.

    Args:
        scores_N: Scores of the labels of the calibration images, in any order; N may be 0.
        alpha: Probability of missing the label.
        largest: What no score exceeds.
    """
    k = rank(len(scores_N), alpha)
    return float(largest) if k > len(scores_N) else float(np.partition(scores_N, k - 1)[k - 1])


def coverage_band(
    num_calibration: int, num_test: int, alpha: float, *, level: float = BAND_LEVEL
) -> tuple[float, float]:
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

    check_alpha(alpha)
    k = rank(num_calibration, alpha)
    if k > num_calibration:
        return 1.0, 1.0
    tail = (1 - level) / 2
    low, high = betabinom.ppf([tail, 1 - tail], num_test, k, num_calibration + 1 - k)
    return float(low) / num_test, float(high) / num_test


def checked_uniforms(uniform_N: ArrayLike | None, num_images: int) -> Array:
    """Return the uniform numbers of a randomised method as float64 (N,).

    Raises:
        ValueError: There are none, not one for each image, or one is not in [0, 1).
    """
    if uniform_N is None:
        raise ValueError("a randomised method needs a uniform number for each image: see image_uniforms")
    u_N = np.asarray(uniform_N, np.float64)
    if u_N.shape != (num_images,):
        raise ValueError(f"uniforms must have shape ({num_images},), one for each image; got {u_N.shape}")
    bad_N = ~((u_N >= 0) & (u_N < 1))  # also true of NaN
    if bad_N.any():
        row = int(bad_N.argmax())
        raise ValueError(f"row {row}: uniform number {u_N[row]:g} is not in [0, 1)")
    return u_N


def check_alpha(alpha: float) -> None:
    """Raise unless alpha lies between 0 and 1.

    Raises:
        ConfigError: It does not, or is NaN.
    """
    if not 0 < alpha < 1:
        raise ConfigError(
            "alpha must be between 0 and 1", where=alpha, hint="0.1 asks for sets that hold 90 % of labels"
        )


def check_entry(entry: JsonObject, kind: type[ConformalThreshold], *, largest: float) -> None:
    """Raise unless an entry has exactly the keys of a threshold, and the fields that all share are in range.

    Args:
        entry: From a file.
        kind: What is to be made of it.
        largest: What the threshold may not exceed.

    Raises:
        CheckpointError: It has other keys, or a number out of range.
    """
    if set(entry) != {field.name for field in dataclasses.fields(kind)}:
        what = "conformal threshold has other keys than expected"
        raise CheckpointError(what, where=repr(entry)[:80], hint="run calibrate again")
    alpha = entry["alpha"]
    right = (
        isinstance(alpha, float)
        and 0 < alpha < 1
        and is_number(entry["threshold"], 0, largest)
        and type(entry["num_calibration"]) is int
        and entry["num_calibration"] >= 1
    )
    if not right:
        raise unusable(entry)


def simple_threshold(entry: JsonObject) -> ConformalThreshold:
    """Return the threshold of a method with nothing else to store and scores from 0 to 1.

    Raises:
        CheckpointError: Other keys, or a number out of range.
    """
    check_entry(entry, ConformalThreshold, largest=1)
    return ConformalThreshold(
        entry["method"], entry["alpha"], float(entry["threshold"]), num_calibration=entry["num_calibration"]
    )


def is_number(value: object, low: float, high: float) -> bool:
    """Return whether a value from a file is a number from ``low`` to ``high``; True and NaN are none."""
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


def unusable(entry: object) -> CheckpointError:
    """Return (not raise) the error for a threshold with the right keys and wrong values."""
    return CheckpointError("conformal threshold cannot be used", where=repr(entry)[:160], hint="run calibrate again")
