"""Children forked from this warm process: a start costs milliseconds, where an import of torch costs seconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch

TIMEOUT = 30.0  # seconds


@pytest.fixture
def running() -> Iterator[set[int]]:
    """Give the set of children that were started and not reaped, and kill what is left of them at the end."""
    pids: set[int] = set()
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def start(running: set[int]) -> Callable[[Callable[[], object]], int]:
    """Give a function that runs its argument in a child, which exits with 0, or with 1 if that raises."""

    def run(work: Callable[[], object]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)  # the parent's thread pool did not come along
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        running.add(pid)
        return pid

    return run


@pytest.fixture
def kill(running: set[int]) -> Callable[[int], None]:
    """Give a function that kills a child with SIGKILL and reaps it."""

    def run(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        running.discard(pid)

    return run


@pytest.fixture
def join(running: set[int]) -> Callable[[int], int]:
    """Give a function that returns the exit status of a child, negative for a signal, and fails if it hangs."""

    def run(pid: int) -> int:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                running.discard(pid)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        raise AssertionError(f"child {pid} hangs")

    return run
