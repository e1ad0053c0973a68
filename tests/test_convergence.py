"""T14: R-hat, effective sample size and Monte Carlo error against ArviZ, 1e-8 relative, the same NaN where it says NaN.

Fifty synthetic sets of chains: independent, autocorrelated (up to 0.99), antithetic, trending, stuck, of different
means and spreads, heavy-tailed, tied; constant, with NaN, of one chain, of very few draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from bayesnet.convergence import ess_bulk, ess_mean, mcse_mean, rhat

Array = NDArray[np.float64]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces its next version once a day
    import arviz


def autoregressive(rng: np.random.Generator, correlation: float, num_chains: int, num_draws: int) -> Array:
    """Return stationary chains of variance 1 with this correlation of neighbours."""
    noise = rng.normal(size=(num_chains, num_draws)) * math.sqrt(1 - correlation**2)
    draws = np.empty_like(noise)
    draws[:, 0] = rng.normal(size=num_chains)
    for t in range(1, num_draws):
        draws[:, t] = correlation * draws[:, t - 1] + noise[:, t]
    return draws


def chains() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    sets: dict[str, Array] = {}
    for correlation in (0.0, 0.3, 0.6, 0.9, 0.99, -0.3, -0.6, -0.9, -0.99):
        for shape in ((4, 500), (2, 101), (1, 250)):
            sets[f"autoregressive {correlation} {shape}"] = autoregressive(rng, correlation, *shape)
    normal = rng.normal(size=(4, 200))
    stuck = normal.copy()
    stuck[2] = stuck[2, 0]
    with_nan, with_infinity = normal.copy(), normal.copy()
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
    sets |= {f"{num_draws} draws": rng.normal(size=(3, num_draws)) for num_draws in (3, 4, 5)}
    assert len(sets) == 50
    return sets


CHAINS = chains()


def theirs(name: str, draws: Array) -> float:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if name == "rhat":
            return float(arviz.rhat(draws))  # type: ignore[no-untyped-call]
        if name == "mcse_mean":
            return float(arviz.mcse(draws, method="mean"))  # type: ignore[no-untyped-call]
        return float(arviz.ess(draws, method=name.removeprefix("ess_")))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", list(CHAINS))
@pytest.mark.parametrize("ours", [rhat, ess_bulk, ess_mean, mcse_mean], ids=lambda ours: ours.__name__)
def test_t14_arviz(ours: Callable[[Array], float], name: str) -> None:
    expected = theirs(ours.__name__, CHAINS[name])
    assert ours(CHAINS[name]) == pytest.approx(expected, rel=1e-8, abs=0, nan_ok=True)
