r"""T14: R-hat, effective sample size (ESS) and Monte Carlo error of Markov chains, against what they must be.

Fifty synthetic sets of chains are compared with the formulas written a second time, slowly: ranks by counting,
autocovariances by summing products, Geyer's sequence by a loop, in float64. Both must agree to 1e-8 relative and be NaN
for the same sets. An equality: no false alarm; the smallest fault caught is 1e-8.

Other answers are known without any formula: of draws that are all equal, with NaN, too few, of a single chain, of two
values in turns (exact); and, for autoregressive chains x_t = r x_t-1 + e_t of variance 1, the error of a mean,

    Var(mean of C chains of S draws) = (S + 2 sum_t>0 (S - t) r^t) / (C S^2)

with which the mean MCSE of 500 sets of four chains of 500 draws is compared. An effective sample size has a bias of its
own: over eight seeds the mean MCSE was 3.4, 0.0, 0.8 and -2.5 % too large for r = 0.9, 0.5, 0 and -0.5, with a sd of
1.2, 0.13, 0.17 and 0.15 % between seeds. The bounds are that plus 4.9 sd, rounded up (about 1e-6 each); caught with
power 0.99 are errors of 16, 1.1, 3 and 7 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import NormalDist
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from bayesnet import convergence
from bayesnet.battery.base import Check, Fault, Findings, Outcome, largest

Array = NDArray[np.float64]
Quantity = Callable[[Array], float]

RELATIVE_BOUND = 1e-8
NUM_SETS, NUM_CHAINS, NUM_DRAWS = 500, 4, 500
ERROR_BOUNDS = {0.9: 0.095, 0.5: 0.0075, 0.0: 0.018, -0.5: 0.034}
"""Largest |mean MCSE / exact error - 1|, by the correlation of neighbours."""


def autoregressive(rng: np.random.Generator, correlation: float, num_chains: int, num_draws: int) -> Array:
    """Return stationary chains (C, S) of variance 1 whose neighbours have this correlation."""
    noise = rng.normal(size=(num_chains, num_draws)) * math.sqrt(1 - correlation**2)
    draws = np.empty_like(noise)
    draws[:, 0] = rng.normal(size=num_chains)
    for t in range(1, num_draws):
        draws[:, t] = correlation * draws[:, t - 1] + noise[:, t]
    return draws


def synthetic_chains(seed: int = 0) -> dict[str, Array]:
    """Return fifty sets of chains (C, S) by name.

    They are independent, autocorrelated (up to 0.99), antithetic, trending, stuck, of different means and spreads,
    heavy-tailed, tied; constant, with NaN, of one chain, of very few draws.
    """
    rng = np.random.default_rng(seed)
    sets: dict[str, Array] = {}
    for correlation in (0.0, 0.3, 0.6, 0.9, 0.99, -0.3, -0.6, -0.9, -0.99):
        for shape in ((4, 500), (2, 101), (1, 250)):
            sets[f"autoregressive {correlation} {shape}"] = autoregressive(rng, correlation, *shape)
    normal = rng.normal(size=(4, 200))
    stuck, with_nan, with_infinity = normal.copy(), normal.copy(), normal.copy()
    stuck[2] = stuck[2, 0]
    with_nan[1, 7] = np.nan
    with_infinity[1, 7] = np.inf
    sets |= {
        "other means": normal + np.arange(4)[:, None],
        "other spreads": normal * (1 + np.arange(4))[:, None],
        "trend": normal + 3 * np.arange(200) / 199,
        "jump": normal + (np.arange(200) > 100),
        "stuck": stuck,
        "stuck apart": np.repeat(np.arange(3.0)[:, None], 50, axis=1),
        "alternating": np.tile([1.0, -1.0], (4, 50)),
        "constant": np.full((4, 100), 3.7),
        "constant, one chain": np.zeros((1, 100)),
        "nearly constant": 1 + 2.3e-16 * (normal > 0).astype(float),
        "nan": with_nan,
        "all nan": np.full((2, 50), np.nan),
        "infinity": with_infinity,
        "cauchy": rng.standard_cauchy((4, 200)),
        "exponential": rng.exponential(size=(3, 77)),
        "ties": np.floor(2 * normal),
        "two values": (normal > 0).astype(float),
        "rare": (normal > 2.5).astype(float),
        "large offset": normal + 1e6,
        "tiny": normal * 1e-9,
    }
    return sets | {f"{num_draws} draws": rng.normal(size=(3, num_draws)) for num_draws in (3, 4, 5)}


# The formulas a second time, from Vehtari et al. 2021 and Geyer 1992.


def slow_rhat(draws_CS: Array) -> float:
    """Return the rank-normalised split R-hat of chains (C, S)."""
    num_chains, num_draws = draws_CS.shape
    if num_chains < 2 or num_draws < 4 or np.isnan(draws_CS).any():
        return math.nan
    halves = _halves(draws_CS)
    distances = np.abs(halves - np.median(halves))
    both = [value for value in (_ratio(_scores(halves)), _ratio(_scores(distances))) if not math.isnan(value)]
    return max(both, default=math.nan)


def slow_ess_bulk(draws_CS: Array) -> float:
    """Return the effective number of draws of the ranks of chains (C, S)."""
    invalid = draws_CS.shape[1] < 4 or np.isnan(draws_CS).any()
    return math.nan if invalid else _geyer(_scores(_halves(draws_CS)))


def slow_ess_mean(draws_CS: Array) -> float:
    """Return the effective number of draws of the mean of chains (C, S)."""
    invalid = draws_CS.shape[1] < 4 or not np.isfinite(draws_CS).all()
    return math.nan if invalid else _geyer(_halves(draws_CS))


def slow_mcse_mean(draws_CS: Array) -> float:
    """Return the Monte Carlo standard error of the mean of chains (C, S)."""
    ess = slow_ess_mean(draws_CS)
    if math.isnan(ess):
        return math.nan
    values = draws_CS.ravel()
    return math.sqrt(math.fsum((values - values.mean()) ** 2) / (values.size - 1) / ess)


def _halves(draws_CS: Array) -> Array:
    """Return first and last halves as chains; the middle draw of an odd number is left out."""
    half = draws_CS.shape[1] // 2
    return np.array([chain[part] for part in (slice(0, half), slice(-half, None)) for chain in draws_CS])


def _scores(draws_CS: Array) -> Array:
    """Return normal quantiles of the ranks, each rank by counting what is smaller and what is equal."""
    values = draws_CS.ravel()
    smaller = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    probabilities = (smaller + (equal + 1) / 2 - 3 / 8) / (values.size + 1 / 4)
    return np.array([NormalDist().inv_cdf(p) for p in probabilities]).reshape(draws_CS.shape)


def _ratio(draws_CS: Array) -> float:
    """Return sqrt(estimate of the variance from all chains / variance within chains)."""
    num_draws = draws_CS.shape[1]
    within = sum(_variance(chain) for chain in draws_CS) / len(draws_CS)
    between = _variance(draws_CS.mean(1))
    if within == 0:
        return math.inf if between > 0 else math.nan
    return math.sqrt((num_draws - 1) / num_draws + between / within)


def _variance(values: Array) -> float:
    deviations = values - values.mean()
    return float(deviations @ deviations) / (len(values) - 1)


def _geyer(draws_CS: Array) -> float:
    """Return the effective number of draws by Geyer's initial monotone sequence."""
    num_chains, num_draws = draws_CS.shape
    if draws_CS.max() - draws_CS.min() < 1e-15:
        return float(draws_CS.size)
    centred = draws_CS - draws_CS.mean(1, keepdims=True)
    covariance = [float((centred[:, t:] * centred[:, : num_draws - t]).sum()) for t in range(num_draws)]
    covariance = [each / (num_draws * num_chains) for each in covariance]
    within = covariance[0] * num_draws / (num_draws - 1)
    total = covariance[0] + (_variance(draws_CS.mean(1)) if num_chains > 1 else 0.0)
    rho = [1.0, *(1 - (within - each) / total for each in covariance[1:])]
    tau, previous, lag = -1.0, math.inf, 0
    while rho[lag] + rho[lag + 1] > 0 and lag + 4 < num_draws:
        previous = min(previous, rho[lag] + rho[lag + 1])
        tau += 2 * previous
        lag += 2
    # The first half of the pair that ended it still counts where it is positive.
    tau += rho[lag] if rho[lag] > 0 or rho[lag] + rho[lag + 1] >= 0 else 0.0
    return draws_CS.size / max(tau, 1 / math.log10(draws_CS.size))


QUANTITIES: dict[str, Quantity] = {
    "rhat": slow_rhat,
    "ess_bulk": slow_ess_bulk,
    "ess_mean": slow_ess_mean,
    "mcse_mean": slow_mcse_mean,
}
"""From a function of `bayesnet.convergence` to the same written a second time."""


def disagreement(found: float, expected: float) -> float:
    """Return the relative difference of two numbers: 0 where both are NaN, infinite where one is.

    Example:
        >>> disagreement(math.nan, math.nan), disagreement(1.0, math.nan), disagreement(3.0, 2.0)
        (0.0, inf, 0.5)
    """
    if found == expected or (math.isnan(found) and math.isnan(expected)):
        return 0.0
    if math.isnan(found) or math.isnan(expected) or expected == 0:
        return math.inf
    return abs(found - expected) / abs(expected)


def against_formulas(seed: int) -> Findings:
    """Return how far the library is from the slow formulas on fifty sets of chains."""
    sets = synthetic_chains(seed)
    outcomes = []
    for name, slow in QUANTITIES.items():
        with np.errstate(all="ignore"):
            worst = {key: disagreement(getattr(convergence, name)(draws), slow(draws)) for key, draws in sets.items()}
        key = max(worst, key=lambda key: worst[key])
        what = f"{name}: largest relative difference in {len(sets)} sets of chains ({key})"
        outcomes.append(Outcome(what, worst[key], RELATIVE_BOUND))
    return Findings(outcomes)


def against_exact(seed: int) -> Findings:
    """Return how far the library is from what is known without a formula."""
    rng = np.random.default_rng(seed)
    equal, turns = np.full((4, 100), 3.0), np.tile([1.0, -1.0], (4, 50))
    one, few, with_nan = rng.normal(size=(1, 400)), rng.normal(size=(4, 3)), rng.normal(size=(4, 100))
    with_nan[3, 99] = math.nan
    everything = (convergence.rhat, convergence.ess_bulk, convergence.ess_mean, convergence.mcse_mean)
    nothing = [quantity(draws) for draws in (few, with_nan) for quantity in everything]
    nothing += [convergence.rhat(equal), convergence.rhat(one)]
    exact = [
        (convergence.ess_bulk(equal), 400.0),
        (convergence.ess_mean(equal), 400.0),
        (convergence.mcse_mean(equal), 0.0),
        (convergence.ess_mean(turns), 400 * math.log10(400)),  # the most that is ever claimed
    ]
    errors = largest([disagreement(*pair) for pair in exact])
    outcomes = [
        Outcome("numbers where there should be NaN, of 10", sum(not math.isnan(value) for value in nothing), 0),
        Outcome("equal draws, draws in turns: largest relative error", errors, RELATIVE_BOUND),
    ]
    for correlation, bound in ERROR_BOUNDS.items():
        what = f"autoregressive chains, r = {correlation}: mean MCSE over the exact error, less 1"
        outcomes.append(Outcome(what, abs(mean_error_ratio(rng, correlation) - 1), bound))
    return Findings(outcomes)


def mean_error_ratio(rng: np.random.Generator, correlation: float, num_sets: int = NUM_SETS) -> float:
    """Return the mean MCSE of sets of four autoregressive chains of 500 draws, over the exact sd of their mean."""
    lags = np.arange(1, NUM_DRAWS)
    spread = NUM_DRAWS + 2 * float(((NUM_DRAWS - lags) * correlation**lags).sum())
    exact = math.sqrt(spread / NUM_CHAINS) / NUM_DRAWS
    draws = autoregressive(rng, correlation, num_sets * NUM_CHAINS, NUM_DRAWS)
    errors = [convergence.mcse_mean(draws_CS) for draws_CS in draws.reshape(num_sets, NUM_CHAINS, NUM_DRAWS)]
    return float(np.mean(errors)) / exact


def _patched(name: str, replacement: Callable[..., object]) -> Callable[[], AbstractContextManager[object]]:
    return lambda: mock.patch.object(convergence, name, replacement)


def _circular(draws_CS: Array) -> Array:
    """Return autocovariances (C, S) where the chains' ends touch: the transform without zeros behind."""
    spectrum = np.fft.rfft(draws_CS - draws_CS.mean(1, keepdims=True), axis=1)
    covariance_CS: Array = np.fft.irfft(np.abs(spectrum) ** 2, draws_CS.shape[1], axis=1) / draws_CS.shape[1]
    return covariance_CS


UNSPLIT = Fault("chains not split in halves", _patched("_split", lambda draws_CS: draws_CS))
UNRANKED = Fault("draws instead of normal scores", _patched("_normal_scores", lambda draws_CS: draws_CS))
CIRCULAR = Fault("circular autocovariance", _patched("_autocovariance", _circular))
INDEPENDENT = Fault("draws taken for independent", _patched("_ess", lambda draws_CS: float(draws_CS.size)))

CHECKS: tuple[Check, ...] = (
    Check("T14", "convergence of chains, by a second implementation", against_formulas, (UNSPLIT, UNRANKED, CIRCULAR)),
    Check("T14", "convergence of chains whose answer is known", against_exact, (INDEPENDENT,)),
)
