"""Timing that can be believed: interleaved arms, warm-up until steady, an A/A control, intervals.

Arms (functions to be timed) are run in blocks, in a fresh random order each round, so that drift of clocks, heat or
other processes touches all arms alike. A ratio of two arms is the median over rounds of their per-round ratio, with a
bootstrap interval over rounds. The control is a second copy of one arm: what its ratio departs from 1 is noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WARMUP_TOLERANCE = 0.1
MAX_WARMUP_BLOCKS = 8


class Timing(NamedTuple):
    """Times of one arm.

    Attributes:
        seconds_R: Seconds per call, one mean per round (R,).
        calls_per_block: Calls between two readings of the clock.
    """

    seconds_R: NDArray[np.float64]
    calls_per_block: int

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return float(np.median(self.seconds_R))

    @property
    def p95(self) -> float:
        """95th percentile over rounds of the seconds per call."""
        return float(np.quantile(self.seconds_R, 0.95))

    def median_interval(self, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Return the bootstrap interval of the median, seconds."""
        return _bootstrap_median(self.seconds_R, level, seed)


class Ratio(NamedTuple):
    """A ratio of two arms' times with its interval."""

    value: float
    low: float
    high: float


def measure(
    arms: Mapping[str, Callable[[], object]],
    *,
    synchronize: Callable[[], None],
    rounds: int,
    seconds_per_block: float = 0.05,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time the arms, interleaved.

    Args:
        arms: Name to function; each call is one unit of work.
        synchronize: Waits until the device has finished; called before each reading of the clock.
        rounds: Blocks per arm.
        seconds_per_block: Target length of a block; short calls are repeated to reach it.
        seed: Of the order of the arms within each round.

    Returns:
        Name to Timing, in the order of ``arms``.
    """
    calls = {name: _warm_up(function, synchronize, seconds_per_block) for name, function in arms.items()}
    rng = np.random.default_rng(seed)
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for position in rng.permutation(len(names)):
            name = names[position]
            seconds[name].append(_block(arms[name], synchronize, calls[name]))
    return {name: Timing(np.array(seconds[name]), calls[name]) for name in names}


def ratio(numerator: Timing, denominator: Timing, *, level: float = 0.95, seed: int = 0) -> Ratio:
    """Return the median per-round ratio of two arms that were measured together, with its bootstrap interval."""
    ratios_R = numerator.seconds_R / denominator.seconds_R
    return Ratio(float(np.median(ratios_R)), *_bootstrap_median(ratios_R, level, seed))


def _warm_up(function: Callable[[], object], synchronize: Callable[[], None], seconds_per_block: float) -> int:
    """Run until two blocks in a row agree; return how many calls make a block."""
    first = _block(function, synchronize, 1)
    calls = max(1, round(seconds_per_block / max(first, 1e-9)))
    previous = first
    for _ in range(MAX_WARMUP_BLOCKS):
        current = _block(function, synchronize, calls)
        calls = max(1, round(seconds_per_block / max(current, 1e-9)))
        if abs(current - previous) <= WARMUP_TOLERANCE * previous:
            break
        previous = current
    return calls


def _block(function: Callable[[], object], synchronize: Callable[[], None], calls: int) -> float:
    """Return the mean seconds of a call over one block."""
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - started) / calls


def _bootstrap_median(values_R: NDArray[np.float64], level: float, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values_R), (1000, len(values_R)))
    low, high = np.quantile(np.median(values_R[picks], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
