"""`bayesnet selftest`: what it prints, and that a failed check or a fault that is not caught fails the command."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable

import pytest

from bayesnet.battery import running
from bayesnet.battery.base import Check, Fault, Findings, Outcome

RunCli = Callable[..., tuple[int, str, str]]


def check(name: str, *values: float, full: bool = False, caught: bool = True) -> Check:
    """Return a check of these values, all with bound 1, and a fault that it catches or not."""
    planted = []

    @contextlib.contextmanager
    def plant():  # type: ignore[no-untyped-def] # noqa: ANN202 - a fault of this check
        planted.append(name)
        yield
        planted.clear()

    def run(seed: int) -> Findings:
        wrong = 2.0 if planted and caught else 0.0
        return Findings([Outcome(f"value {v}", v + wrong, 1.0) for v in values], {"full_rank": {"sd_ratio": 1.0}})

    return Check("T0", name, run, (Fault(f"fault of {name}", plant),), full=full)


def given(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(running, "battery", lambda *, full: tuple(each for each in checks if full or not each.full))


def test_all_is_well(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, check("first", 0.2, 0.9), check("second", 0.1, full=True))
    code, out, err = run_cli("selftest --full")
    assert code == 0
    assert "3 of 3 outcomes within bounds; planted faults caught: 2 of 2" in out
    assert "0.9" in out  # the worst of the first
    assert "full_rank" in out
    assert "1/2  T0   first" in err
    code, out, _ = run_cli("selftest")
    assert "2 of 2 outcomes within bounds; planted faults caught: 1 of 1" in out


@pytest.mark.parametrize("value", [1.5, math.nan])
def test_a_failed_check_fails_the_command(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    given(monkeypatch, check("first", 0.2), check("second", 0.1, value))
    code, out, _ = run_cli("selftest")
    assert code == 1
    assert f"FAIL T0 second: value {value}" in out
    code, out, _ = run_cli("selftest --json")
    record = json.loads(out)
    assert (code, record["passed"]) == (1, False)
    assert [test["passed"] for test in record["tests"]] == [True, True, False]


def test_an_error_is_a_failure_and_the_others_still_run(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int) -> Findings:
        raise RuntimeError("no such thing")

    given(monkeypatch, Check("T0", "broken", broken), check("second", 0.1))
    code, out, _ = run_cli("selftest")
    assert code == 1
    assert "FAIL T0 broken: RuntimeError: no such thing: - > 0" in out
    assert "1 of 2 outcomes within bounds" in out


def test_a_fault_that_is_not_caught_fails_the_command(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, check("first", 0.2, caught=False), check("second", 0.1))
    code, out, _ = run_cli("selftest")
    assert code == 1
    assert "FAIL not caught: fault of first, by first" in out
    assert "planted faults caught: 1 of 2" in out


def test_wrong_seed(run_cli: RunCli) -> None:
    code, _, err = run_cli("selftest --seed -1")
    assert code == 2
    assert "bayesnet: error: must be from 0 to 2147483647 (--seed -1)" in err


def test_the_battery_has_every_test_of_the_list() -> None:
    """Names are unique, and each check has a fault to reject, or is one of equalities that others plant faults in."""
    checks = running.battery(full=True)
    numbers = {each.id for each in checks}
    assert numbers >= {f"T{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16, 17, 28)}
    names = [each.name for each in checks]
    assert len(set(names)) == len(names)
    assert [each.name for each in checks if not each.faults] == []
    assert {each.id for each in running.battery(full=False)} >= {"T1", "T2", "T3", "T4", "T5", "T6", "T16", "T17"}
