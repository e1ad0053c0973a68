"""Timing, by a clock of our own: what is slower by 3 % is found through drift of 50 %, and what is equal is 1."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from bayesnet.benchmark import MAX_WARMUP_BLOCKS, Timing, measure, ratio

ROUNDS = 40


class Clock:
    """A clock that only work moves. The machine gets slower as time goes by, and calls scatter by 1 %.

    Args:
        drift: By how much the machine is slower after a second.
    """

    def __init__(self, drift: float = 0.0) -> None:
        self.now = 0.0
        self.drift = drift
        self.rng = np.random.default_rng(0)
        self.calls: list[str] = []

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        """Return an arm that takes so long on the cold machine."""

        def arm() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + self.drift * self.now) * self.rng.normal(1, 0.01)

        return arm


@pytest.fixture
def make_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Clock]:
    """Give a function that puts a clock in the place of the real one."""

    def make(drift: float) -> Clock:
        clock = Clock(drift)
        monkeypatch.setattr("bayesnet.benchmark.time", SimpleNamespace(perf_counter=lambda: clock.now))
        return clock

    return make


def nothing() -> None:
    """Wait for nothing."""


def test_a_slowdown_of_three_percent_is_found(make_clock: Callable[[float], Clock]) -> None:
    clock = make_clock(0.1)
    arms = {"plain": clock.work("plain", 1e-3), "slow": clock.work("slow", 1.03e-3), "again": clock.work("again", 1e-3)}
    timings = measure(arms, synchronize=nothing, rounds=ROUNDS, seconds_per_block=0.02)
    assert list(timings) == list(arms)
    slow, control = (ratio(timings[name], timings["plain"]) for name in ("slow", "again"))
    assert timings["plain"].seconds_R[-1] > 1.2 * timings["plain"].seconds_R[0]  # the drift is there
    assert slow.value == pytest.approx(1.03, abs=0.004)
    assert control.value == pytest.approx(1.0, abs=0.004)
    assert 1 < slow.low < slow.value < slow.high
    assert control.low < 1 < control.high


def test_one_arm_after_the_other_would_mistake_the_drift_for_a_slowdown(make_clock: Callable[[float], Clock]) -> None:
    """The control: this is why arms are interleaved."""
    clock = make_clock(0.1)
    timings = [
        measure({"arm": clock.work("arm", 1e-3)}, synchronize=nothing, rounds=ROUNDS, seconds_per_block=0.02)["arm"]
        for _ in range(2)
    ]
    assert ratio(timings[1], timings[0]).low > 1.05


def test_every_round_has_every_arm_in_an_order_of_its_own(make_clock: Callable[[float], Clock]) -> None:
    clock = make_clock(0.0)
    arms = {name: clock.work(name, 1.0) for name in "abc"}
    timings = measure(arms, synchronize=nothing, rounds=ROUNDS, seconds_per_block=1e-9)  # one call a block
    rounds = np.array(clock.calls[-3 * ROUNDS :]).reshape(ROUNDS, 3)
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds.tolist())
    assert len({tuple(each) for each in rounds.tolist()}) == 6
    assert {timing.calls_per_block for timing in timings.values()} == {1}
    assert {len(timing.seconds_R) for timing in timings.values()} == {ROUNDS}


def test_warm_up_goes_on_until_two_blocks_agree(make_clock: Callable[[float], Clock]) -> None:
    """An arm that takes 100, 50, 25, ... ms before it settles at 1 ms is timed when it has settled."""
    clock = make_clock(0.0)
    durations = [0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003]

    def settling() -> None:
        clock.calls.append("settling")
        clock.now += durations.pop(0) if durations else 0.001

    timing = measure({"arm": settling}, synchronize=nothing, rounds=5, seconds_per_block=0.01)["arm"]
    assert timing.seconds_R == pytest.approx(np.full(5, 0.001))
    assert timing.calls_per_block == 10


def test_warm_up_ends_even_where_nothing_settles(make_clock: Callable[[float], Clock]) -> None:
    clock = make_clock(0.0)

    def slower_and_slower() -> None:
        clock.calls.append("call")
        clock.now += 2.0 ** len(clock.calls)

    measure({"arm": slower_and_slower}, synchronize=nothing, rounds=1)
    assert len(clock.calls) == 1 + MAX_WARMUP_BLOCKS + 1


def test_the_device_is_waited_for_before_each_reading(make_clock: Callable[[float], Clock]) -> None:
    """Work that is only queued by the call is timed when it is waited for."""
    clock = make_clock(0.0)
    queued: list[float] = []

    def wait() -> None:
        clock.now += sum(queued)
        queued.clear()

    arms = {"a": lambda: queued.append(0.5), "b": lambda: queued.append(0.25)}
    timings = measure(arms, synchronize=wait, rounds=4, seconds_per_block=1.0)
    assert timings["a"].seconds_R == pytest.approx(np.full(4, 0.5))
    assert timings["b"].seconds_R == pytest.approx(np.full(4, 0.25))
    assert (timings["a"].calls_per_block, timings["b"].calls_per_block) == (2, 4)


def test_statistics_of_a_timing() -> None:
    timing = Timing(np.arange(1.0, 22.0), 1)
    assert (timing.median, timing.p95) == (11.0, 20.0)
    low, high = timing.median_interval()
    assert 1 < low < 11 < high < 21
    assert timing.median_interval() == timing.median_interval()
    assert ratio(timing, Timing(timing.seconds_R / 2, 1)) == (2.0, 2.0, 2.0)
