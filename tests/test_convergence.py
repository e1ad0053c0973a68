"""T14: R-hat, effective sample size and Monte Carlo error against ArviZ, 1e-8 relative, the same NaN where it says NaN.

The fifty sets of chains are those of the self-test, which compares with formulas of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from bayesnet.battery.convergence import synthetic_chains
from bayesnet.convergence import ess_bulk, ess_mean, mcse_mean, rhat

Array = NDArray[np.float64]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces its next version once a day, and notes the day in a file
    try:
        import arviz
    except FileNotFoundError:  # another process moved that file away; it is written now
        import arviz


CHAINS = synthetic_chains()


def test_there_are_fifty_sets() -> None:
    assert len(CHAINS) == 50


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
