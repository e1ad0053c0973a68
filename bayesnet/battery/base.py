"""What the statistical battery is made of: checks that measure numbers against bounds, and faults they must reject."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple


class Outcome(NamedTuple):
    """One number that a check measured, and the most it may be.

    Attributes:
        name: What was measured, with its unit: "full_rank: largest error of a mean, in posterior sd".
        value: Measured; a distance from the truth, so that smaller is better.
        bound: What it may not exceed.
    """

    name: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the value is a number within the bound; NaN is not."""
        return self.value <= self.bound


class Findings(NamedTuple):
    """What a check found.

    Attributes:
        outcomes: At least one.
        families: From a family's name to its row of the table to publish, by column: `FAMILY_COLUMNS`.
    """

    outcomes: Sequence[Outcome]
    families: Mapping[str, Mapping[str, float]] = {}

    @property
    def passed(self) -> bool:
        """Whether all outcomes did."""
        return all(outcome.passed for outcome in self.outcomes)


FAMILY_COLUMNS = {
    "mean_tv_k3": "mean total variation to long NUTS chains, 3 classes",
    "mean_tv_k10": "the same, 10 classes",
    "sd_ratio": "median sd of a weight over that of long NUTS chains, 3 classes",
    "elbo_gap": "log evidence less ELBO in nats, logistic head of two parameters",
    "sbc_z_sd": "sd of the z-scores of simulation-based calibration; 1 is calibrated",
    "coverage80": "coverage of 80 % intervals of weights under the model",
    "coverage95": "coverage of 95 % intervals of weights under the model",
    "interval80": "coverage of the 80 % intervals of class probabilities that `predict` gives, under the model",
    "interval90": "the same at 90 %",
    "interval95": "the same at 95 %",
}
"""Columns of the table of families, with their meaning."""


class Fault(NamedTuple):
    """A bug of the field that can be planted.

    Attributes:
        name: What is wrong: "KL x 2".
        plant: Makes a context in which the library has the bug.
    """

    name: str
    plant: Callable[[], AbstractContextManager[object]]


class Check(NamedTuple):
    """One test of the battery.

    Attributes:
        id: Its number in the battery: "T6".
        name: What it compares with what, in a few words; unique.
        run: From a seed to what was found. The same seed gives the same numbers; seed 0 is frozen.
        faults: What it must reject when planted, each at seed 0.
        full: Whether it takes more than about 10 seconds, and is left out unless all are asked for.
    """

    id: str
    name: str
    run: Callable[[int], Findings]
    faults: tuple[Fault, ...] = ()
    full: bool = False


Z_BOUND = 4.892
"""Largest absolute z-score of one quantity: a false alarm in a million."""


BROKEN_PLANT = (AttributeError, ImportError, NameError, TypeError)
"""Errors of a fault that no longer fits the code, not of the code with the fault: they prove nothing."""


def rejects(check: Check, fault: Fault) -> bool:
    """Return whether a check fails, by a number or an error, while a fault is planted. Its warnings are not shown."""
    with fault.plant(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return not check.run(0).passed
        except BROKEN_PLANT:
            return False
        except Exception:  # a wrong shape or a failed factorisation is a rejection too
            return True


def largest(values: Sequence[float]) -> float:
    """Return the largest value, NaN where one is NaN: `max` would drop it."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
