r"""Have Markov chains converged, and how many independent draws are theirs worth?

    R-hat = sqrt((B / W + S - 1) / S),    B, W = variance between and within chains, each split in two
    ESS = C S / tau,    tau = 1 + 2 sum_t rho_t over Geyer's initial monotone positive pairs of autocorrelations
    MCSE of the mean = sd / sqrt(ESS)

R-hat and the bulk ESS look at ranks turned into normal quantiles, so heavy tails do not upset them; R-hat is the larger
of that and of the same for distances from the median, which sees chains that differ in spread alone.

What cannot be said is NaN: any value NaN, fewer than four draws, R-hat of one chain or of draws that are all equal, a
mean of infinite values. The ESS of draws that are all equal is their number. A guide's draws are independent: none of
this is for them.
Reference: Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021, "Rank-normalization, folding, and localization",
Bayesian Analysis 16(2), arXiv:1903.08008.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Array = NDArray[np.float64]

MIN_DRAWS = 4
_SAME = 1e-15  # draws within this of each other are one value


def rhat(draws_CS: Array) -> float:
    """Return the rank-normalised split R-hat of a quantity: 1 where chains agree, above 1.01 they have not converged.

    Args:
        draws_CS: Draws of each chain (C, S), at least two chains and four draws.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4, 500))
        >>> rhat(draws) < 1.01, rhat(draws + np.arange(4)[:, None]) > 1.3
        (True, True)
    """
    if len(draws_CS) < 2 or not _is_valid(draws_CS):
        return math.nan
    split_CS = _split(draws_CS)
    folded_CS = np.abs(split_CS - np.median(split_CS))
    # fmax leaves out the distances where they are all equal (two values, each as often): they say nothing.
    return float(np.fmax(_plain_rhat(_normal_scores(split_CS)), _plain_rhat(_normal_scores(folded_CS))))


def ess_bulk(draws_CS: Array) -> float:
    """Return the effective number of draws in the bulk of the distribution: below 100 per chain R-hat is no guide.

    Args:
        draws_CS: Draws of each chain (C, S), at least four.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4, 500))
        >>> 1500 < ess_bulk(draws) < 2500, ess_bulk(draws.repeat(5, axis=1)) < 2500
        (True, True)
    """
    return _ess(_normal_scores(_split(draws_CS))) if _is_valid(draws_CS) else math.nan


def ess_mean(draws_CS: Array) -> float:
    """Return the effective number of draws for the mean of a quantity.

    Args:
        draws_CS: Draws of each chain (C, S), at least four.
    """
    return _ess(_split(draws_CS)) if _is_valid(draws_CS) and bool(np.isfinite(draws_CS).all()) else math.nan


def mcse_mean(draws_CS: Array) -> float:
    """Return the Monte Carlo standard error of the mean over all draws, in the draws' unit.

    Args:
        draws_CS: Draws of each chain (C, S), at least four.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4, 625))
        >>> round(mcse_mean(draws), 2)
        0.02
    """
    ess = ess_mean(draws_CS)
    return ess if math.isnan(ess) else float(np.std(draws_CS, ddof=1) / math.sqrt(ess))


def _is_valid(draws_CS: Array) -> bool:
    return draws_CS.shape[1] >= MIN_DRAWS and not bool(np.isnan(draws_CS).any())


def _split(draws_CS: Array) -> Array:
    """Return first and last halves as chains of their own, so that a chain which drifts disagrees with itself."""
    half = draws_CS.shape[1] // 2
    return np.concatenate([draws_CS[:, :half], draws_CS[:, -half:]])


def _normal_scores(draws_CS: Array) -> Array:
    """Return the normal quantiles of the ranks among all draws; equal draws share their mean rank (Blom 1958)."""
    _, place, counts = np.unique(draws_CS, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    ranks_CS = mean_ranks[place].reshape(draws_CS.shape)
    scores_CS: Array = ndtri((ranks_CS - 3 / 8) / (draws_CS.size + 1 / 4))
    return scores_CS


def _plain_rhat(draws_CS: Array) -> float:
    num_draws = draws_CS.shape[1]
    within = np.var(draws_CS, axis=1, ddof=1).mean()
    between = num_draws * np.var(draws_CS.mean(1), ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # equal draws: 0 / 0 is NaN, chains that stand still: infinite
        return float(np.sqrt((between / within + num_draws - 1) / num_draws))


def _ess(draws_CS: Array) -> float:
    """Return the effective sample size of chains (C, S), from the autocorrelations rho_t of all of them together."""
    num_draws = draws_CS.shape[1]
    if np.ptp(draws_CS) < _SAME:
        return float(draws_CS.size)
    covariance_S = _autocovariance(draws_CS).mean(0)
    within = covariance_S[0] * num_draws / (num_draws - 1)
    total = covariance_S[0] + (np.var(draws_CS.mean(1), ddof=1) if len(draws_CS) > 1 else 0.0)
    rho_S = 1 - (within - covariance_S) / total
    rho_S[0] = 1.0
    num_pairs = max(0, (num_draws - 3) // 2) + 1  # the last autocorrelations rest on too few draws
    pairs = rho_S[: 2 * num_pairs : 2] + rho_S[1 : 2 * num_pairs : 2]
    # Sums of two neighbours are positive for a reversible chain: from the first that is not, there is only noise.
    negative = np.flatnonzero(pairs <= 0)
    end = int(negative[0]) if len(negative) else num_pairs - 1
    tail = rho_S[2 * end] if rho_S[2 * end] > 0 or pairs[end] >= 0 else 0.0
    tau = -1 + 2 * np.minimum.accumulate(pairs[:end]).sum() + tail
    return float(draws_CS.size / max(tau, 1 / math.log10(draws_CS.size)))


def _autocovariance(draws_CS: Array) -> Array:
    """Return the autocovariances (C, S) at lags 0 to S - 1, biased, by fast Fourier transform."""
    num_draws = draws_CS.shape[1]
    padded = 1 << (2 * num_draws - 1).bit_length()  # zeros keep the ends from touching
    spectrum = np.fft.rfft(draws_CS - draws_CS.mean(1, keepdims=True), padded, axis=1)
    covariance_CS: Array = np.fft.irfft(np.abs(spectrum) ** 2, padded, axis=1)[:, :num_draws] / num_draws
    return covariance_CS
