"""Whether two models differ on the same examples: p-values of paired differences, and their correction for several."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from bayesnet.metrics.checks import Array

NUM_FLIPS = 9_999
_CHUNK_ELEMENTS = 2_000_000  # signs held at once: 16 MB a temporary


def paired_p_value(differences: ArrayLike, *, num_flips: int = NUM_FLIPS, seed: int = 0) -> float:
    """Return the two-sided p-value of "the two models are equally good" from their differences on each example.

    If it made no difference which model gave which answer, every difference could as well have the other sign. The
    p-value is the share of random signs that give a mean at least as far from 0, the signs observed included, so that
    it is never 0. Where all differences that are not 0 have one size, as those of right answers do, the share over all
    signs is known, and is returned: it is the exact test of McNemar.

    Args:
        differences: (N,), finite: a metric of each example under one model less that under the other.
        num_flips: Number of random signs of all examples; 1 / (num_flips + 1) is the least p-value.
        seed: Of the signs.

    Returns:
        Above 0 to 1; 1 where no example differs.

    Raises:
        ValueError: There is no example, or a difference is not finite.

    Reference: Fisher, The Design of Experiments, 1935, section 21; McNemar 1947, Psychometrika 12; Phipson & Smyth
    2010, Permutation P-values Should Never Be Zero.

    Example:
        >>> paired_p_value([1, 1, 1, 1, 0, 0, 0])  # four against none are not yet significant
        0.125
    """
    difference_N = np.asarray(differences, np.float64)
    if difference_N.ndim != 1 or not len(difference_N) or not np.isfinite(difference_N).all():
        raise ValueError("expected finite differences (N,), at least one")
    difference_M = difference_N[difference_N != 0]
    if not len(difference_M):
        return 1.0
    if (np.abs(difference_M) == np.abs(difference_M[0])).all():
        fewer = min((difference_M > 0).sum(), (difference_M < 0).sum())
        return float(min(1.0, 2 * bdtr(fewer, len(difference_M), 0.5)))
    return (1 + _num_as_far(difference_M, num_flips, seed)) / (1 + num_flips)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return p-values corrected for being several: calling those at most .05 errs in any with at most 5 % probability.

    Args:
        p_values: By name; None for what could not be tested, which stays None and is not counted.

    Reference: Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.

    Example:
        >>> holm({"nll": 0.01, "brier": 0.04, "accuracy": 0.03, "other": None})
        {'nll': 0.03, 'brier': 0.06, 'accuracy': 0.06, 'other': None}
    """
    known = {name: value for name, value in p_values.items() if value is not None}
    corrected: dict[str, float] = {}
    largest = 0.0
    for index, (name, value) in enumerate(sorted(known.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(known) - index) * value))
        corrected[name] = largest
    return {name: corrected.get(name) for name in p_values}


def _num_as_far(difference_M: Array, num_flips: int, seed: int) -> int:
    """Return how many random signs give a sum at least as far from 0 as the one observed."""
    generator = np.random.default_rng([seed, 2])
    # Equal sums differ by rounding; without the margin some of them would not count.
    observed = abs(difference_M.sum()) - 1e-9 * np.abs(difference_M).sum()
    rows = max(1, _CHUNK_ELEMENTS // len(difference_M))
    found = 0
    for done in range(0, num_flips, rows):
        count = min(rows, num_flips - done)
        bits = np.unpackbits(np.frombuffer(generator.bytes(-(-count * len(difference_M) // 8)), np.uint8))
        positive_RM = bits[: count * len(difference_M)].reshape(count, len(difference_M)).astype(np.float64)
        sums_R = 2 * (positive_RM @ difference_M) - difference_M.sum()
        found += int((np.abs(sums_R) >= observed).sum())
    return found
