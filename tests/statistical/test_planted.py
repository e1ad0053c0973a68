"""T12: which faults the battery must reject at least, and what `bayesnet.battery.wiring` says of its power.

That each check rejects its faults is tested where all checks are run.
"""

from __future__ import annotations

import math

import pytest
from scipy import stats

from bayesnet.battery import conformance, evidence, gradients, linear_gradients, numerics, recovery, wiring
from bayesnet.battery.base import Fault
from bayesnet.battery.wiring import DIGITS, NUM_DRAWS, NUM_WEIGHTS

MODULES = (evidence, gradients, linear_gradients, recovery, numerics, wiring, conformance)
CHECKS = [check for module in MODULES for check in module.CHECKS]

# The twelve of the plan, and the one that left posteriors where they started.
REQUIRED = {
    "KL x 0",
    "KL x 2",
    "KL x batch",
    "no plate scale",
    "X @ w.mT broadcasts",
    "posterior sd x 0.7 in draws",
    "prior sd x 2",
    "labels permuted",
    "dropout left on",
    "mean of logits",
    "particle reused",
    "classes numbered by each split",
    "head trained by the backbone's SGD",
}


def faults() -> list[Fault]:
    return [fault for check in CHECKS for fault in check.faults]


def test_the_battery_plants_every_required_fault() -> None:
    assert {fault.name for fault in faults()} >= REQUIRED


def test_a_fault_has_one_name_and_a_name_one_fault() -> None:
    assert len({fault.name for fault in faults()}) == len({id(fault) for fault in faults()})


def test_every_check_has_a_fault_to_reject_and_a_name_of_its_own() -> None:
    assert all(check.faults for check in CHECKS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_the_power_against_a_wrong_sd() -> None:
    """Draws with sd r have r^2 chi2 as their sum of squares: power in closed form."""
    whole = stats.chi2(NUM_DRAWS * NUM_WEIGHTS)
    low, high = whole.ppf([10**-DIGITS / 2, 1 - 10**-DIGITS / 2])
    small, large = math.sqrt(low / whole.ppf(0.99)), math.sqrt(high / whole.ppf(0.01))
    assert (small, large) == pytest.approx((0.91, 1.10), abs=0.005)


def test_the_power_against_shared_noise() -> None:
    """With a share c of the variance in common, S x mean^2 is (1 + c (S - 1)) chi2 with 15 degrees of freedom."""
    cut, low = stats.chi2.ppf([1 - 10**-DIGITS, 0.01], NUM_WEIGHTS)
    assert (cut / low - 1) / (NUM_DRAWS - 1) == pytest.approx(0.05, abs=0.005)
