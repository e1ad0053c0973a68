r"""Statistics of simulation-based calibration: ranks of the truth among posterior draws, z-scores and exact intervals.

Draw w ~ p(w) and y ~ p(y | w), then L draws of the posterior of y: if it is exact, the rank of any quantity of (w, y)
among its values at the draws is uniform on 0 ... L (Talts et al. 2018, arXiv:1804.06788). Of R independent data sets:

    chi2      of ranks in 20 bins: shifts, and posteriors of a wrong shape
    KS        sqrt(R) times the Kolmogorov-Smirnov distance of (rank + 1/2) / (L + 1) from uniform: shifts
    spread    sum_r z_r^2, chi2 with R degrees of freedom where the posterior is Gaussian, as a normal score: its width

Ranks alone are slow to see a posterior that is too narrow, the commonest fault; and ranks of weights do not see one
that ignores the data, since the prior is calibrated too: those of the log-likelihood do (Modrak et al. 2023,
doi:10.1214/23-BA1404).

False alarm: each statistic is below its cut for *all* of m quantities but with probability 1e-6: each is held to
1e-6 / m. For R = 500 and m = 1 the cuts are chi2 < 63.68, KS < 2.68 (2.69 in the limit) and sd of z in [0.849, 1.158].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bayesnet.battery.base import Outcome

Array = NDArray[np.float64]

ALPHA = 1e-6
NUM_BINS = 20
NUM_DRAWS = 999
"""L, so that ranks have 1,000 values: whole numbers of them make a bin, and the 80 and 95 % intervals."""


class Ranked(NamedTuple):
    """One quantity in R data sets.

    Attributes:
        rank_R: How many of the L draws are below the truth.
        z_R: (truth - mean of the draws) / sd of the draws.
    """

    rank_R: NDArray[np.int64]
    z_R: Array


def ranked(truth_R: ArrayLike, draws_RL: ArrayLike, *, seed: int = 0) -> Ranked:
    """Return where the truth lies among the draws; ranks of equal values are drawn, so that they stay uniform.

    Args:
        truth_R: The quantity at the weight that made the data (R,).
        draws_RL: At the draws from the posterior (R, L).
        seed: Of the ties.

    Example:
        >>> ranked([0.5], [[0.0, 1.0, 2.0]])
        Ranked(rank_R=array([1]), z_R=array([-0.5]))
    """
    truth_R1, draws = np.asarray(truth_R, np.float64)[:, None], np.asarray(draws_RL, np.float64)
    below_R, equal_R = (draws < truth_R1).sum(1), (draws == truth_R1).sum(1)
    rank_R = below_R + np.random.default_rng(seed).integers(0, equal_R + 1)
    z_R = (truth_R1[:, 0] - draws.mean(1)) / draws.std(1, ddof=1).clip(min=np.finfo(np.float64).tiny)
    return Ranked(rank_R, z_R)


def chi2_statistic(rank_R: NDArray[np.int64]) -> float:
    """Return the chi2 of ranks 0 ... 999 in 20 bins of equal probability."""
    counts = np.bincount(rank_R * NUM_BINS // (NUM_DRAWS + 1), minlength=NUM_BINS)
    expected = len(rank_R) / NUM_BINS
    return float(((counts - expected) ** 2).sum() / expected)


def ks_statistic(rank_R: NDArray[np.int64]) -> float:
    """Return sqrt(R) times the Kolmogorov-Smirnov distance of the normalised ranks from uniform."""
    uniform_R = (rank_R + 0.5) / (NUM_DRAWS + 1)
    return math.sqrt(len(rank_R)) * float(stats.kstest(uniform_R, "uniform").statistic)


def spread_score(z_R: Array) -> float:
    """Return the normal score of sum z^2: 0 is calibrated, below 0 a posterior too wide, above 0 one too narrow."""
    total, half = float((z_R**2).sum()), len(z_R)
    upper, lower = stats.chi2.sf(total, half), stats.chi2.cdf(total, half)
    return float(stats.norm.isf(upper) if upper < lower else stats.norm.ppf(lower))


def chi2_cut(num_quantities: int) -> float:
    """Return what the largest chi2 of so many quantities exceeds once in a million times."""
    return float(stats.chi2.isf(ALPHA / num_quantities, NUM_BINS - 1))


def ks_cut(num_quantities: int, num_sets: int) -> float:
    """Return what the largest Kolmogorov-Smirnov statistic of so many quantities exceeds once in a million times."""
    return math.sqrt(num_sets) * float(stats.kstwo.isf(ALPHA / num_quantities, num_sets))


def spread_cut(num_quantities: int) -> float:
    """Return what the largest absolute normal score of so many quantities exceeds once in a million times."""
    return float(stats.norm.isf(ALPHA / num_quantities / 2))


def outcomes(label: str, quantities: Mapping[str, Ranked], gaussian: Sequence[str]) -> list[Outcome]:
    """Return the worst chi2, Kolmogorov-Smirnov distance and spread of all quantities, each against its cut.

    Args:
        label: What was calibrated: "full_rank".
        quantities: Ranks and z-scores by name.
        gaussian: Those whose exact posterior is Gaussian, for the spread.
    """
    num_sets = len(next(iter(quantities.values())).rank_R)
    chi2 = {name: chi2_statistic(found.rank_R) for name, found in quantities.items()}
    distance = {name: ks_statistic(found.rank_R) for name, found in quantities.items()}
    spread = {name: abs(spread_score(quantities[name].z_R)) for name in gaussian}
    return [
        _worst(f"{label}: chi2 of ranks, 19 degrees of freedom", chi2, chi2_cut(len(chi2))),
        _worst(f"{label}: sqrt(R) x KS distance of ranks", distance, ks_cut(len(distance), num_sets)),
        _worst(f"{label}: normal score of the sum of squares of z", spread, spread_cut(len(spread))),
    ]


def _worst(what: str, values: Mapping[str, float], bound: float) -> Outcome:
    """Return the outcome of the quantity that is furthest out; one that is NaN is."""
    name = max(values, key=lambda key: math.inf if math.isnan(values[key]) else values[key])
    return Outcome(f"{what}, worst of {len(values)} ({name})", values[name], bound)


def clopper_pearson(num_covered: float, num_trials: float, level: float = 0.95) -> tuple[float, float]:
    """Return the exact binomial interval of a probability.

    Both numbers may be fractions: with a number of trials such that p (1 - p) / trials is the variance of a mean over
    clusters, it is the interval of Korn and Graubard 1998 for trials that depend on each other.

    Example:
        >>> [round(end, 3) for end in clopper_pearson(8, 10)]
        [0.444, 0.975]
    """
    tail, missed = (1 - level) / 2, num_trials - num_covered
    lower = stats.beta.ppf(tail, num_covered, missed + 1) if num_covered > 0 else 0.0
    upper = stats.beta.isf(tail, num_covered + 1, missed) if missed > 0 else 1.0
    return float(lower), float(upper)


def exact_score(num_covered: float, num_trials: float, probability: float) -> float:
    """Return how many standard errors wide the Clopper-Pearson interval must be to reach a probability.

    Example:
        >>> score = exact_score(8, 10, 0.444)  # the end of the 95 % interval above
        >>> round(score, 2)
        1.96
    """
    missed = num_trials - num_covered
    below = stats.beta.cdf(probability, num_covered, missed + 1) if num_covered > 0 else 1.0
    above = stats.beta.sf(probability, num_covered + 1, missed) if missed > 0 else 1.0
    return max(0.0, float(stats.norm.isf(min(below, above))))
