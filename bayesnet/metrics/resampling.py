"""The resamples and labels that confidence intervals and null bands are made of, and the intervals themselves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from bayesnet.metrics.checks import Array
from bayesnet.metrics.counted import COUNTED, Counted, Scores, ones

_CHUNK_ELEMENTS = 250_000  # counts or draws held at once: 2 MB a temporary


def bootstrap_counts(num_examples: int, num_resamples: int, seed: int) -> Iterator[Array]:
    """Yield multinomial counts (R', N), so many at a time that memory stays small, R in all."""
    generator = np.random.default_rng([seed, 0])
    for rows in _chunks(num_examples, num_resamples):
        drawn_RN = generator.integers(num_examples, size=(rows, num_examples))
        drawn_RN += num_examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn_RN.ravel(), minlength=rows * num_examples)
        yield counts.reshape(rows, num_examples).astype(np.float64)


def calibrated_draws(confidence_N: Array, num_resamples: int, seed: int) -> Iterator[Array]:
    """Yield correctness (R', N) for labels drawn from the model's own probabilities, R in all.

    Only whether the drawn label is the predicted class matters, and its probability is the confidence.
    """
    generator = np.random.default_rng([seed, 1])
    for rows in _chunks(len(confidence_N), num_resamples):
        yield (generator.random((rows, len(confidence_N))) < confidence_N).astype(np.float64)


def bootstrap_values(scores: Scores, names: Iterable[str], num_resamples: int, seed: int) -> dict[str, Array]:
    """Return each metric on resamples of the examples, each (R,)."""
    counts = bootstrap_counts(len(scores.confidence_N), num_resamples, seed)
    return _collect((Counted(scores, counts_RN) for counts_RN in counts), names)


def null_values(scores: Scores, names: Iterable[str], num_resamples: int, seed: int) -> dict[str, Array]:
    """Return calibration errors of sets of labels drawn from the model's own probabilities, each (R,)."""
    draws = calibrated_draws(scores.confidence_N, num_resamples, seed)
    sets = (Counted(scores._replace(correct_N=drawn_RN), ones(scores, len(drawn_RN))) for drawn_RN in draws)
    return _collect(sets, names)


def central(values_R: Array, level: float) -> tuple[float, float]:
    """Return the order statistics that hold the central ``level`` of the values; NaN are left out, NaN if all are."""
    values = np.sort(values_R[~np.isnan(values_R)])
    if not len(values):
        return math.nan, math.nan
    tail = (1 - level) / 2 * (len(values) - 1)
    return float(values[math.floor(tail)]), float(values[math.ceil(len(values) - 1 - tail)])


def mean_intervals(
    values: Mapping[str, Array], level: float, num_resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return intervals for means of non-negative values of the same examples, by the bootstrap-t on the log scale.

    Each resample's mean is taken in units of its own standard error, which few large values make as uncertain as the
    mean: percentiles of the means themselves, which leave that out, are too narrow where a model makes few errors. In
    simulations (1,000 sets of 400 examples with 24 to 154 errors) 95 % intervals of NLL and Brier score covered the
    truth in 93 to 96 % of the sets, percentiles in 92 to 94 %.

    Args:
        values: (N,) by name, at least 0.
        level: Level of the intervals.
        num_resamples: Number of bootstrap resamples.
        seed: Of these.

    Returns:
        Both ends by name; they are the mean where all values are equal, and NaN where one is infinite.

    Reference: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12.
    """
    finite = {name: each_N for name, each_N in values.items() if np.isfinite(each_N).all()}
    units: dict[str, list[Array]] = {name: [] for name in finite}
    for counts_RN in bootstrap_counts(len(next(iter(values.values()))), num_resamples, seed):
        for name, each_N in finite.items():
            units[name].append(_log_units(each_N, counts_RN))
    return {
        name: _bootstrap_t(each_N, np.concatenate(units[name]), level) if name in finite else (math.nan, math.nan)
        for name, each_N in values.items()
    }


def _log_units(values_N: Array, counts_RN: Array) -> Array:
    """Return the log of each resample's mean over that of all, in its own standard errors; NaN where it has none."""
    mean_R = counts_RN @ values_N / len(values_N)
    variance_R = np.maximum(counts_RN @ np.square(values_N) / len(values_N) - np.square(mean_R), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error_R = np.sqrt(variance_R / len(values_N)) / mean_R
        units_R: Array = np.log(mean_R / values_N.mean()) / error_R
    return np.where(np.isfinite(units_R), units_R, np.nan)


def _bootstrap_t(values_N: Array, units_R: Array, level: float) -> tuple[float, float]:
    """Return the interval that the units of the resamples give."""
    mean = float(values_N.mean())
    low, high = central(units_R, level)
    if mean == 0 or math.isnan(low):
        return mean, mean
    error = float(values_N.std()) / math.sqrt(len(values_N)) / mean
    # The ends hold the mean between them, which few resamples can fail to do.
    return min(mean * math.exp(-high * error), mean), max(mean * math.exp(-low * error), mean)


def wilson_interval(num_successes: int, num_trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion.

    Example:
        >>> [round(end, 4) for end in wilson_interval(9, 10)]
        [0.5958, 0.9821]
    """
    z, share = float(ndtri(0.5 + level / 2)), num_successes / num_trials
    scale = 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    # At 0 and n successes one end is exactly 0 or 1, which the arithmetic misses by a rounding error.
    low = 0.0 if num_successes == 0 else centre - half
    return low, 1.0 if num_successes == num_trials else centre + half


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Return Student's interval for the mean of independent values, such as one per seed; one value has no bounds.

    Example:
        >>> [round(end, 4) for end in t_interval([-0.1, -0.2, 0.2])]
        [-0.5504, 0.4838]
    """
    if len(values) < 2:
        return -math.inf, math.inf
    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, 0.5 + level / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def calibration_interval(value: float, bootstrap_R: Array, null_R: Array, level: float) -> tuple[float, float]:
    """Return an interval for a calibration error, which the bootstrap's own percentiles never cover near 0.

    Resampling adds to a mean of absolute gaps the bias that sampling had added already. So the interval is reflected
    at the value, (2 v - high, 2 v - low), reaches down to 0 if a calibrated model can show such a value, and always
    contains the value. In simulations (300 to 5,000 examples, true ECE 0 to .1) 95 % intervals covered the true ece,
    ace and mce in 86 to 100 % of 200 sets, the bootstrap's percentiles in 0 to 97 %.

    Args:
        value: The measured error.
        bootstrap_R: Its bootstrap values.
        null_R: Its values under calibration.
        level: Level of the interval.
    """
    low, high = central(bootstrap_R, level)
    calibrated = value <= central(null_R, level)[1]
    return 0.0 if calibrated else min(max(2 * value - high, 0.0), value), max(min(2 * value - low, 1.0), value)


def _collect(chunks: Iterable[Counted], names: Iterable[str]) -> dict[str, Array]:
    names = tuple(names)
    parts = [[COUNTED[name](chunk) for name in names] for chunk in chunks]
    return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def _chunks(num_examples: int, num_resamples: int) -> Iterator[int]:
    rows = max(1, _CHUNK_ELEMENTS // num_examples)
    for done in range(0, num_resamples, rows):
        yield min(rows, num_resamples - done)
