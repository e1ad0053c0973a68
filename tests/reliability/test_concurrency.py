"""Several processes and one run directory: one writer, no stale lock, no shared names."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bayesnet.errors import BayesnetError
from bayesnet.rundir import RunDirectory

NUM_PROCESSES = 8

Report = Callable[[str], None]
Start = Callable[[Callable[[], object]], int]
Join = Callable[[int], int]
Kill = Callable[[int], None]
Race = Callable[[Callable[[Report], None]], tuple[list[int], list[tuple[int, str]]]]


@pytest.fixture
def race(start: Start, join: Join) -> Race:
    """Give a function that lets processes loose at once, each to report one line and to go on when all have."""

    def run(work: Callable[[Report], None]) -> tuple[list[int], list[tuple[int, str]]]:
        gate_reader, gate_writer = os.pipe()
        reports_reader, reports_writer = os.pipe()
        end_reader, end_writer = os.pipe()

        def child() -> None:
            os.close(gate_writer)
            os.close(end_writer)
            os.read(gate_reader, 1)

            def report(text: str) -> None:
                os.write(reports_writer, f"{os.getpid()} {text}\n".encode())
                os.read(end_reader, 1)

            try:
                work(report)
            except BayesnetError as error:
                report(f"{error.exit_code} {error}")

        pids = [start(child) for _ in range(NUM_PROCESSES)]
        os.close(reports_writer)
        os.close(gate_writer)  # end of file opens the gate for all
        reports = []
        with os.fdopen(reports_reader, "r") as file:
            for _ in range(NUM_PROCESSES):
                pid, text = file.readline().rstrip("\n").split(" ", 1)
                reports.append((int(pid), text))
        os.close(end_writer)
        assert [join(pid) for pid in pids] == [0] * NUM_PROCESSES
        os.close(gate_reader)
        os.close(end_reader)
        return pids, reports

    return run


@pytest.mark.parametrize("attempt", range(3))
def test_one_of_many_gets_the_lock(tmp_path: Path, race: Race, attempt: int) -> None:
    run = RunDirectory.create(tmp_path / "run", "")

    def work(report: Report) -> None:
        with run.lock():
            report("won")

    pids, reports = race(work)
    [winner] = [pid for pid, text in reports if text == "won"]
    assert winner in pids
    lines = {text for pid, text in reports if pid != winner}
    named = f"8 run directory is in use by process {winner} on "
    unnamed = "8 run directory is in use by another process"  # looked before the winner had signed
    creator = f"8 run directory is in use by process {os.getpid()} on "
    assert all(line.startswith((named, unnamed, creator)) for line in lines)
    with run.lock():
        pass


@pytest.mark.parametrize("attempt", range(3))
def test_one_of_many_starts_in_the_same_directory(tmp_path: Path, race: Race, attempt: int) -> None:
    def work(report: Report) -> None:
        run = RunDirectory.create(tmp_path / "parent" / "run", "")
        with run.lock():
            run.write_text("config.toml", f"pid = {os.getpid()}\n")
            report("won")

    _, reports = race(work)
    [winner] = [pid for pid, text in reports if text == "won"]
    assert all(text.startswith("8 ") for pid, text in reports if pid != winner)
    assert (tmp_path / "parent" / "run" / "config.toml").read_text() == f"pid = {winner}\n"


def test_runs_that_start_in_the_same_second_do_not_meet(tmp_path: Path, race: Race) -> None:
    def work(report: Report) -> None:
        run = RunDirectory.create(None, "digits", tmp_path / "runs")
        with run.lock():
            report(run.path.name)

    _, reports = race(work)
    names = {text for _, text in reports}
    assert len(names) == NUM_PROCESSES
    assert {path.name for path in (tmp_path / "runs").iterdir()} == names


def test_a_killed_holder_leaves_no_stale_lock_even_if_its_worker_lives(
    tmp_path: Path, start: Start, kill: Kill
) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    reader, writer = os.pipe()

    def hold() -> None:
        with run.lock():
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(writer, b"%d\n" % worker)
            time.sleep(30)

    holder = start(hold)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        worker = int(file.readline())
    try:
        with pytest.raises(BayesnetError, match=f"in use by process {holder} on "), run.lock():
            pass
        kill(holder)
        os.kill(worker, 0)  # it lives
        with run.lock():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
