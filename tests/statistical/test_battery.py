"""The statistical battery, check by check: each passes at the frozen seed, and rejects every fault that it should.

These are the checks of `bayesnet selftest`; their modules state false alarms and the smallest faults they catch. Seed 0
is frozen, so no test here is random. Nightly, those with a stated false alarm (1e-6 each) run with the seed of the day
as well; regions that were frozen from measurement hold for seed 0 alone.
"""

from __future__ import annotations

from datetime import date

import pytest

from bayesnet.battery.base import Check, Fault, rejects
from bayesnet.battery.running import FROZEN, battery

CHECKS = battery(full=True)
# A fault costs what its check does. Those of cheap checks are planted each time, the others' with the slow tests.
PLANTED_EACH_TIME = ("T1", "T2", "T3", "T4", "T5", "T12", "T14", "T16", "T17")
CONTROLS = [(check, fault) for check in CHECKS for fault in check.faults]


def marks(check: Check) -> list[pytest.MarkDecorator]:
    if check.full:
        return [pytest.mark.nightly]
    return [pytest.mark.slow] if check.name.startswith("nuts ") or check.id in ("T10", "T11") else []


def control_marks(check: Check) -> list[pytest.MarkDecorator]:
    return marks(check) or ([] if check.id in PLANTED_EACH_TIME else [pytest.mark.slow])


def failures(check: Check, seed: int) -> list[str]:
    return [
        f"{outcome.name}: {outcome.value:.4g} > {outcome.bound:.4g}"
        for outcome in check.run(seed).outcomes
        if not outcome.passed
    ]


@pytest.mark.parametrize(
    "check", [pytest.param(each, marks=marks(each), id=f"{each.id}: {each.name}") for each in CHECKS]
)
def test_it_passes(check: Check) -> None:
    assert failures(check, 0) == []


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        pytest.param(check, fault, marks=control_marks(check), id=f"{check.id}: {check.name}: {fault.name}")
        for check, fault in CONTROLS
    ],
)
def test_it_rejects(check: Check, fault: Fault) -> None:
    assert rejects(check, fault)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "check", [pytest.param(each, id=f"{each.id}: {each.name}") for each in CHECKS if each.id not in FROZEN]
)
def test_it_passes_with_the_seed_of_the_day(check: Check) -> None:
    assert failures(check, date.today().toordinal()) == []
