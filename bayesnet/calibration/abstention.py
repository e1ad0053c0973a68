"""Abstention: answer only images with so high a confidence that at most a stated share of the answers is wrong.

Coverages 5 %, 10 %, ..., 100 % of the n images of a split that nothing else was fitted on are tested from the most
confident up. For each, the images above the next confidence are kept, and it passes if the Clopper-Pearson upper bound
on their risk (the share of wrong answers) is at most ``max_risk``. The search ends at the first that fails, and the
last that passed gives the threshold. So no correction for twenty tests is needed: to claim falsely, the *first*
coverage with too high a true risk must pass, a single test with a false claim in at most 5 % of splits. Taking the
best of all thresholds that pass claims falsely several times as often.

Coverages of so few images that they could not pass without any error (fewer than 149 for 2 %) are skipped. This looks
at confidences alone, never at labels, so it is fixed before the first test like the coverages themselves.

What is assumed: images are exchangeable, and less confident images are wrong no less often than more confident ones
(for confidences without ties it suffices that the true risk crosses ``max_risk`` once as coverage grows). The
images at or below the next confidence say nothing about those above it, so these are independent images of the kept
kind and their errors binomial; that is why the confidence at the border itself is left out. Images of equal confidence
are kept or dropped together.

References: Geifman & El-Yaniv, Selective Classification for Deep Neural Networks, 2017; Angelopoulos, Bates, Candes,
Jordan & Lei, Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control, 2021 (fixed-sequence testing);
Clopper & Pearson, The Use of Confidence or Fiducial Limits, 1934.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.errors import CheckpointError, ConfigError
from bayesnet.metrics import checked, checked_probabilities
from bayesnet.types import JsonObject

NUM_COVERAGES = 20
CONFIDENCE_LEVEL = 0.95


class AbstentionThreshold(NamedTuple):
    """A fitted threshold.

    Attributes:
        max_risk: Largest share of wrong answers that was asked for.
        confidence_level: Probability, over splits, that the true risk of the answers is at most that.
        threshold: Confidence below which the model abstains, from 0 to 1; None where no coverage passed: it always
            abstains.
        coverage: Share of the images it was fitted on that are answered.
        risk_bound: Upper confidence bound on the risk of the answers, None where there are none.
        num_fitted: Number of images it was fitted on.
        num_kept: How many of them are answered.
    """

    max_risk: float
    confidence_level: float
    threshold: float | None
    coverage: float
    risk_bound: float | None
    num_fitted: int
    num_kept: int

    @property
    def attained(self) -> bool:
        """Whether any coverage was shown to have so low a risk."""
        return self.threshold is not None

    @property
    def notice(self) -> str | None:
        """What the user must know: that the risk was not attained, and why."""
        if self.attained:
            return None
        asked = f"a risk of at most {100 * self.max_risk:g} %"
        needed = num_needed(self.max_risk, self.confidence_level)
        if self.num_fitted < needed:
            there = "there is 1" if self.num_fitted == 1 else f"there are {self.num_fitted}"
            reason = f"{asked} needs at least {needed} images without an error to be shown; {there}"
        else:
            reason = f"{asked} could not be shown: too many errors among the most confident of {self.num_fitted} images"
        return f"{reason}: the model abstains on every image"

    def to_json(self) -> JsonObject:
        """Return what `abstention_from_json` reads: the fields, ``attained`` and ``notice``."""
        return {**self._asdict(), "attained": self.attained, "notice": self.notice}


def parse_risk(text: str) -> float:
    """Return the risk that a user wrote, as a percentage or a share.

    Raises:
        ConfigError: It is not a number, or not between 0 and 1.

    Example:
        >>> parse_risk("2%"), parse_risk("0.02")
        (0.02, 0.02)
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE]-?[0-9]{1,3})?)\s*(%?)\s*", text, re.ASCII)
    value = float(Decimal(found[1]) / (100 if found[2] else 1)) if found else math.nan
    if not 0 < value < 1:
        raise ConfigError("not a risk between 0 and 1", where=text, hint="write a share of errors such as 2% or 0.02")
    return value


def risk_upper_bound(num_errors: int, num_kept: int, confidence_level: float = CONFIDENCE_LEVEL) -> float:
    """Return the one-sided Clopper-Pearson upper bound on an error probability, exact for binomial counts.

    Args:
        num_errors: Wrong answers.
        num_kept: All answers, at least 1.
        confidence_level: Of the bound.

    Example:
        >>> round(risk_upper_bound(0, 149), 5), round(risk_upper_bound(0, 148), 5)
        (0.0199, 0.02004)
    """
    from scipy.special import betaincinv

    if num_errors == num_kept:
        return 1.0
    return float(betaincinv(num_errors + 1, num_kept - num_errors, confidence_level))


def num_needed(max_risk: float, confidence_level: float = CONFIDENCE_LEVEL) -> int:
    """Return the least number of images without any error that shows a risk of at most ``max_risk``.

    Example:
        >>> num_needed(0.02), num_needed(0.05), num_needed(0.01)
        (149, 59, 299)
    """
    return math.ceil(math.log(1 - confidence_level) / math.log1p(-max_risk))


def fit_abstention(
    probabilities: ArrayLike, labels: ArrayLike, max_risk: float, *, confidence_level: float = CONFIDENCE_LEVEL
) -> AbstentionThreshold:
    """Return the threshold of the largest coverage shown to have a risk of at most ``max_risk``.

    With probability ``confidence_level`` over splits the true risk of the answers is at most ``max_risk``, over the
    whole search; the module says what is assumed.

    Args:
        probabilities: (N, K), as they will be predicted: after calibration; of a split that nothing else was fitted on.
        labels: (N,), integers in 0..K-1.
        max_risk: Largest share of wrong answers, between 0 and 1.
        confidence_level: Between 0 and 1.

    Raises:
        ConfigError: ``max_risk`` or ``confidence_level`` is not between 0 and 1.
        ValueError: The input is not probabilities and labels; names the first bad row.

    Example:
        >>> found = fit_abstention([[0.9, 0.1]] * 300 + [[0.6, 0.4]] * 100, [0] * 300 + [1] * 100, 0.02)
        >>> found.coverage, round(found.risk_bound, 4), abstains([[0.9, 0.1], [0.6, 0.4]], found).tolist()
        (0.75, 0.0099, [False, True])
    """
    for name, value in (("max_risk", max_risk), ("confidence_level", confidence_level)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} must be between 0 and 1", where=value)
    p_NK, labels_N = checked(probabilities, labels)
    num_fitted = len(labels_N)
    confidence_N = p_NK.max(1)
    order_N = np.argsort(-confidence_N, kind="stable")
    confidence_N = confidence_N[order_N]
    errors_N = np.cumsum(p_NK.argmax(1)[order_N] != labels_N[order_N])
    needed = num_needed(max_risk, confidence_level)
    found = AbstentionThreshold(float(max_risk), float(confidence_level), None, 0.0, None, num_fitted, 0)
    for step in range(1, NUM_COVERAGES + 1):
        threshold = _border(confidence_N, -(-num_fitted * step // NUM_COVERAGES))
        num_kept = int(np.searchsorted(-confidence_N, -threshold, side="right"))
        if num_kept < needed:
            continue
        bound = risk_upper_bound(int(errors_N[num_kept - 1]), num_kept, confidence_level)
        if bound > max_risk:
            break
        found = found._replace(threshold=threshold, coverage=num_kept / num_fitted, risk_bound=bound, num_kept=num_kept)
    return found


def abstains(probabilities: ArrayLike, threshold: AbstentionThreshold) -> NDArray[np.bool_]:
    """Return on which images the model abstains, (N,): those whose confidence is below the threshold.

    Args:
        probabilities: (N, K), as those that the threshold was fitted on.
        threshold: From `fit_abstention`; where none was attained, all images.
    """
    confidence_N = checked_probabilities(probabilities).max(1)
    return np.asarray(confidence_N < (math.inf if threshold.threshold is None else threshold.threshold))


def evaluate_abstention(probabilities: ArrayLike, labels: ArrayLike, threshold: AbstentionThreshold) -> JsonObject:
    """Return the threshold and, under ``test``, how it does on a test split, ready for JSON.

    Args:
        probabilities: (N, K), as those that the threshold was fitted on.
        labels: (N,), integers in 0..K-1.
        threshold: From `fit_abstention`.

    Returns:
        What `AbstentionThreshold.to_json` returns, and ``test``: ``coverage``, ``num_kept``, ``num_errors``, ``risk``
        (None where no image is kept) and ``ci95``, its two-sided Clopper-Pearson interval.

    Raises:
        ValueError: The input is not probabilities and labels; names the first bad row.
    """
    p_NK, labels_N = checked(probabilities, labels)
    kept_N = ~abstains(p_NK, threshold)
    num_kept = int(kept_N.sum())
    num_errors = int((p_NK.argmax(1) != labels_N)[kept_N].sum())
    interval: list[float | None] = [None, None]
    if num_kept:
        # The lower end of the error rate is one minus the upper end of the rate of right answers.
        interval = [
            1 - risk_upper_bound(num_kept - num_errors, num_kept, 0.975),
            risk_upper_bound(num_errors, num_kept, 0.975),
        ]
    test = {
        "coverage": num_kept / len(labels_N),
        "num_kept": num_kept,
        "num_errors": num_errors,
        "risk": num_errors / num_kept if num_kept else None,
        "ci95": interval,
    }
    return {**threshold.to_json(), "test": test}


def abstention_from_json(entry: object) -> AbstentionThreshold:
    """Return the threshold that `AbstentionThreshold.to_json` or `evaluate_abstention` wrote.

    Raises:
        CheckpointError: Other keys, a number out of range, or numbers that do not belong together.
    """
    fields = AbstentionThreshold._fields
    if not isinstance(entry, dict) or set(entry) - {"test"} != {*fields, "attained", "notice"}:
        what = "abstention threshold has other keys than expected"
        raise CheckpointError(what, where=repr(entry)[:80], hint="run calibrate again")
    found = AbstentionThreshold(*(entry[name] for name in fields))
    if not _consistent(found) or entry["attained"] is not found.attained or entry["notice"] != found.notice:
        raise CheckpointError(
            "abstention threshold cannot be used", where=repr(entry)[:160], hint="run calibrate again"
        )
    return found


def _border(descending_N: NDArray[np.float64], num_images: int) -> float:
    """Return the least threshold that keeps no image beyond the first ``num_images``, nor one that ties with those."""
    if num_images == len(descending_N):
        return 0.0
    return float(np.nextafter(descending_N[num_images], math.inf))


def _consistent(found: AbstentionThreshold) -> bool:
    """Return whether values from a file can be those of a fitted threshold."""
    numbers = (found.max_risk, found.confidence_level, found.coverage)
    counts = (found.num_fitted, found.num_kept)
    if not all(type(value) is float for value in numbers) or not all(type(value) is int for value in counts):
        return False
    if not (0 < found.max_risk < 1 and 0 < found.confidence_level < 1):
        return False
    if found.threshold is None:
        return found.num_kept == 0 and found.coverage == 0 and found.risk_bound is None and found.num_fitted >= 1
    return (
        type(found.threshold) is float
        and 0 <= found.threshold <= 1
        and type(found.risk_bound) is float
        and 0 <= found.risk_bound <= found.max_risk
        and 1 <= found.num_kept <= found.num_fitted
        and found.coverage == found.num_kept / found.num_fitted
    )
