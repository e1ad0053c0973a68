"""kill -9 at random moments of `calibrate`: the run answers with the calibration that it had, or with the new one.

A correct writer never fails here (false-alarm rate 0). One that leaves a run unreadable during a fraction f of its time
escapes n kills with probability (1 - f)**n: 8 kills catch f = 0.31 with 95 %.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bayesnet import storage
from bayesnet.workflows import calibrate, predict

Start = Callable[[Callable[[], object]], int]
Kill = Callable[[int], None]
Join = Callable[[int], int]
NUM_KILLS = 8


def what_answers(run: Path) -> object:
    """Return the label sets' threshold after a prediction was made with it."""
    assert predict([run / "examples"], run=run, devices="cpu")["calibrated"]
    return storage.read_json(run / "calibration.json")["models"]["bayesian"]["threshold"]


def count_torn(start: Start, kill: Kill, join: Join, run: Path, *, num_kills: int) -> int:
    """Kill `calibrate` at another level each time; return how many times the run answered with neither level."""

    def work(alpha: float) -> Callable[[], object]:
        return lambda: calibrate(run, alpha=alpha, ood="none", num_corrupted=0, devices="cpu")

    before = time.monotonic()
    assert join(start(work(0.1))) == 0
    longest = time.monotonic() - before
    threshold = {0.1: what_answers(run)}
    assert join(start(work(0.2))) == 0
    threshold[0.2] = what_answers(run)
    moments, torn = random.Random(0), 0
    for number in range(num_kills):
        pid = start(work((0.1, 0.2)[number % 2]))
        time.sleep(moments.uniform(0, 1.1 * longest))
        kill(pid)
        try:
            torn += what_answers(run) not in threshold.values()
        except Exception:  # a run that a kill made unreadable
            torn += 1
    return torn


@pytest.mark.slow
def test_a_killed_calibrate_leaves_a_run_that_answers(
    start: Start, kill: Kill, join: Join, calibrated_copy: Path
) -> None:
    assert count_torn(start, kill, join, calibrated_copy, num_kills=NUM_KILLS) == 0


@pytest.mark.slow
def test_a_calibrate_that_writes_in_place_is_caught(
    start: Start, kill: Kill, join: Join, calibrated_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: the old record is emptied before the new one is made."""

    def empty_first(run: Path, **arguments: object) -> object:
        (run / "calibration.json").write_bytes(b"")
        return original(run, **arguments)  # type: ignore[arg-type]

    original = calibrate
    monkeypatch.setitem(globals(), "calibrate", empty_first)
    assert count_torn(start, kill, join, calibrated_copy, num_kills=3) > 0
