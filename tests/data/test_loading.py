"""Reading ahead: the same batches for any number of workers, errors as one line, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data._utils import signal_handling

from bayesnet.data import loading as module
from bayesnet.data.examples import ArrayExamples, FileExamples
from bayesnet.data.loading import read_batches
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import DataError, DeviceError

NUM = 23
BATCHES = torch.randperm(NUM, generator=torch.Generator().manual_seed(0)).split(4)
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the classes of this file reach a worker by fork only")


class Hooked(ArrayExamples):
    """Examples that count as slow, and call a function for each batch."""

    def __init__(self, hook: Callable[[list[int]], object] = lambda indices: None) -> None:
        images = torch.arange(NUM * 3 * 4 * 4, dtype=torch.float32).view(NUM, 3, 4, 4)
        super().__init__(images, torch.zeros(NUM, dtype=torch.int64))
        self.hook = hook

    @property
    def in_memory(self) -> bool:
        return False

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        self.hook(list(map(int, indices)))
        return super().read(indices)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail where a test leaves a process, a signal handler or a mask behind, or the random state moved."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    state = torch.get_rng_state()
    yield
    assert multiprocessing.active_children() == []
    assert module._open_workers == set()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert torch.equal(torch.get_rng_state(), state)


def pids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_do_not_depend_on_the_workers(workers: int) -> None:
    with closing(read_batches(Hooked(), BATCHES, workers=workers)) as batches:
        first = next(batches)
        assert len(pids()) == workers
        got = [first, *batches]
    expected = [Hooked().read(indices_B) for indices_B in BATCHES]
    assert len(got) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_no_more_workers_than_batches_and_none_for_memory() -> None:
    with closing(read_batches(Hooked(), BATCHES[:2], workers=8)) as batches:
        next(batches)
        assert len(pids()) == 2
    with closing(read_batches(ArrayExamples(torch.zeros(5, 1, 2, 2), torch.arange(5)), BATCHES[:0], workers=2)) as none:
        assert list(none) == []
    memory = ArrayExamples(torch.zeros(NUM, 1, 2, 2), torch.arange(NUM))
    with closing(read_batches(memory, BATCHES, workers=2)) as batches:
        next(batches)
        assert pids() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_the_same_one_line(tmp_path: Path, workers: int) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for path in paths:
        Image.new("L", (8, 8)).save(path)
    paths[4].write_bytes(b"GIF89a")
    examples = FileExamples(paths, torch.zeros(6, dtype=torch.int64), Preprocessing(1, 8, 8, (0.0,), (1.0,)))
    with pytest.raises(DataError, match=r"^cannot read the image \(.*4\.png\)") as caught:
        list(read_batches(examples, torch.arange(6).split(2), workers=workers))
    assert "Traceback" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_a_bug_in_a_worker_stays_a_bug() -> None:
    with pytest.raises(ZeroDivisionError, match="Caught ZeroDivisionError in DataLoader worker"):
        list(read_batches(Hooked(lambda indices: 1 / 0), BATCHES, workers=2))


def test_a_killed_worker_is_one_line_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a fresh process
    batches = read_batches(Hooked(), torch.arange(NUM).split(1), workers=2)
    next(batches)
    os.kill(pids()[0], signal.SIGKILL)
    # Elsewhere than in the next batch nothing is raised: DataLoader's handler of SIGCHLD would, in this very line.
    time.sleep(0.2)
    start = time.monotonic()
    with pytest.raises(DeviceError, match=r"^a data worker died \(.*\): .*/dev/shm.*--workers 0$"):
        list(batches)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_dies_while_it_reads(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    def die(indices: list[int]) -> None:
        if 9 in indices:
            os.kill(os.getpid(), number)

    with pytest.raises(DeviceError, match=r"^a data worker died "):
        list(read_batches(Hooked(die), BATCHES, workers=2))


def test_full_shared_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Tensor) -> Tensor:
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(DeviceError, match=r"^a data worker found no shared memory \(.*No space left.*\): .*/dev/shm"):
        list(read_batches(Hooked(), BATCHES, workers=1))


def test_a_hanging_worker_ends_after_the_timeout() -> None:
    def hang(indices: list[int]) -> None:
        if 9 in indices:
            time.sleep(1000)

    start = time.monotonic()
    with pytest.raises(DeviceError, match=r"^no batch within 1 s \(2 data workers\): .*--workers 0$"):
        list(read_batches(Hooked(hang), BATCHES, workers=2, timeout=1.0))
    assert time.monotonic() - start < 10


def test_a_wait_may_be_longer_than_the_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.05)
    batches = list(read_batches(Hooked(lambda indices: time.sleep(0.3)), BATCHES[:2], workers=1))
    assert torch.equal(torch.cat(batches), Hooked().read(torch.cat(BATCHES[:2])))


def test_workers_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(DeviceError, match=r"^cannot start the data workers \(BlockingIOError: .*\): .*--workers 0$"):
        list(read_batches(Hooked(), BATCHES, workers=2))


def test_closing_early_ends_workers_in_the_middle_of_a_batch() -> None:
    order = sorted(BATCHES, key=lambda indices_B: 0 not in indices_B)
    batches = read_batches(Hooked(lambda indices: time.sleep(0.0 if 0 in indices else 1000)), order, workers=2)
    next(batches)
    children = pids()
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 5
    assert len(children) == 2
    for pid in children:
        with pytest.raises(ProcessLookupError):  # reaped, no zombie
            os.kill(pid, 0)


def test_workers_ignore_the_signals_of_their_group() -> None:
    with closing(read_batches(Hooked(), torch.arange(NUM).split(1), workers=2)) as batches:
        got = [next(batches)]
        for number in (signal.SIGTERM, signal.SIGINT):
            for pid in pids():
                os.kill(pid, number)
        got += batches
    assert torch.equal(torch.cat(got), Hooked().read(range(NUM)))


def test_a_handler_of_sigchld_is_kept() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    try:
        with closing(read_batches(Hooked(), BATCHES, workers=1)) as batches:
            next(batches)
            os.kill(pids()[0], signal.SIGKILL)
            time.sleep(0.2)
            assert heard == [signal.SIGCHLD]
    finally:
        signal.signal(signal.SIGCHLD, before)


SCRIPT = """
import signal, sys, time, torch
from bayesnet.data.examples import ArrayExamples
from bayesnet.data.loading import read_batches

class Slow(ArrayExamples):
    in_memory = False

stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
batches = read_batches(Slow(torch.zeros(9, 1, 2, 2), torch.arange(9)), torch.arange(9).split(1), workers=2)
next(batches)
print("ready", flush=True)
while sys.argv[1] == "signal" and not stopped:
    time.sleep(0.01)
print("read", 1 + (len(list(batches)) if sys.argv[1] == "signal" else 0), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("signal", 9), ("leave open", 1)])
def test_a_signal_to_the_group_and_an_exit_with_open_workers(mode: str, count: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if mode == "signal":
            os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout.read() == f"read {count}\n"
        with pytest.raises(ProcessLookupError):  # nobody is left of the group
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
