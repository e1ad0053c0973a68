"""The battery as a whole: all checks in their order, run with their planted faults, and the record of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from bayesnet.battery.base import FAMILY_COLUMNS, Check, Findings, Outcome, rejects
from bayesnet.types import JsonObject

MODULES = (
    "evidence",  # T1 to T4
    "gradients",  # T5
    "linear_gradients",
    "recovery",  # T6
    "quadrature",  # T7
    "reference",  # T8
    "simulation_based",  # T9
    "softmax_calibration",  # T10
    "simulated_predictions",  # T11
    "wiring",  # T12's own
    "convergence",  # T14
    "geweke",  # T15
    "numerics",  # T16 and T17
    "known_truth",  # T28
    "conformance",
)
"""Modules of this package whose CHECKS make the battery."""

FROZEN = ("T6", "T7", "T8", "T28")
"""Tests whose regions were frozen from measurement at seed 0 and hold for it alone: no other seed is tried on them."""

OnCheck = Callable[[Check, int, int], None]


class Planted(NamedTuple):
    """What became of the planted faults.

    Attributes:
        tried: Names of the faults.
        missed: Pairs of a fault's name and that of a check which did not reject it.
    """

    tried: tuple[str, ...]
    missed: tuple[tuple[str, str], ...]

    @property
    def num_caught(self) -> int:
        """Faults that every check which should reject them did."""
        return len(self.tried) - len({fault for fault, _ in self.missed})


def battery(*, full: bool = True) -> tuple[Check, ...]:
    """Return the checks, in the order of their numbers; without ``full`` those of seconds alone."""
    found = [check for name in MODULES for check in import_module(f"bayesnet.battery.{name}").CHECKS]
    return tuple(check for check in found if full or not check.full)


def run_check(check: Check, seed: int) -> Findings:
    """Return what a check finds; where it fails with an error, an outcome that is not a number."""
    try:
        return check.run(seed)
    except Exception as error:  # the others still run, and this one has failed
        return Findings((Outcome(f"{type(error).__name__}: {error}".partition("\n")[0], math.nan, 0.0),))


def plant(checks: Sequence[Check]) -> Planted:
    """Plant the faults of checks one by one, and return which were rejected."""
    pairs = [(fault, check) for check in checks for fault in check.faults]
    missed = tuple((fault.name, check.name) for fault, check in pairs if not rejects(check, fault))
    return Planted(tuple(dict.fromkeys(fault.name for fault, _ in pairs)), missed)


def run_battery(
    *, full: bool = False, seed: int = 0, on_check: OnCheck = lambda check, number, total: None
) -> JsonObject:
    """Run the checks and plant their faults.

    Args:
        full: Whether to run those that take minutes too.
        seed: Of the noise of tests with a stated false alarm; those of FROZEN always run at seed 0.
        on_check: Is told of each check before it runs: its number, from 1, and how many there are.

    Returns:
        ``passed``, ``tests`` (id, name, what, passed, value, bound, seconds of its check), ``planted`` (caught, tried,
        missed), ``families`` (a row of `FAMILY_COLUMNS` for each), ``seconds``.
    """
    started = time.perf_counter()
    checks = battery(full=full)
    tests: list[JsonObject] = []
    families: dict[str, dict[str, float]] = {}
    missed: list[tuple[str, str]] = []
    tried: dict[str, None] = {}
    for number, check in enumerate(checks, 1):
        on_check(check, number, len(checks))
        begun = time.perf_counter()
        findings = run_check(check, 0 if check.id in FROZEN else seed)
        seconds = time.perf_counter() - begun
        tests += [_record(check, outcome, seconds) for outcome in findings.outcomes]
        for family, row in findings.families.items():
            families.setdefault(family, {}).update(row)
        planted = plant([check])
        tried |= dict.fromkeys(planted.tried)
        missed += planted.missed
    planted = Planted(tuple(tried), tuple(missed))
    return {
        "passed": all(test["passed"] for test in tests) and not missed,
        "full": full,
        "seed": seed,
        "tests": tests,
        "planted": {
            "caught": planted.num_caught,
            "tried": len(planted.tried),
            "missed": [{"fault": fault, "check": check} for fault, check in missed],
        },
        "families": {name: {key: row[key] for key in FAMILY_COLUMNS if key in row} for name, row in families.items()},
        "seconds": time.perf_counter() - started,
    }


def _record(check: Check, outcome: Outcome, seconds: float) -> JsonObject:
    return {
        "id": check.id,
        "name": check.name,
        "what": outcome.name,
        "passed": outcome.passed,
        "value": outcome.value,
        "bound": outcome.bound,
        "seconds": seconds,
    }
