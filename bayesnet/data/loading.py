"""Reading batches ahead in worker processes: the same batches in the same order whatever their number.

Workers pay where reading is slow (files that do not fit into memory, a data set with transforms of its own). They are
started for each pass and gone when it ends, is closed or fails.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from bayesnet.data.examples import Examples
from bayesnet.errors import BayesnetError, DeviceError

PREFETCH = 2
# How often a wait looks for dead workers, and how long workers that read or hang are waited for at the end, seconds.
_POLL = 1.0
_PATIENCE = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHARED_MEMORY_HINT = "give /dev/shm more space (docker run --shm-size=2g), or read without workers: --workers 0"

_open_workers: set[Any] = set()


def read_batches(
    examples: Examples, batches: Sequence[Tensor], *, workers: int, timeout: float = 120.0
) -> Generator[Tensor, None, None]:
    """Yield ``examples.read(indices)`` for each batch, in order.

    The pixels do not depend on ``workers``, nor do torch's random numbers afterwards. Close the generator (or exhaust
    it) to end the workers: `contextlib.closing` does so however a loop is left.

    Args:
        examples: What to read; examples in memory are read by this process.
        batches: int64 indices, each of shape (B,).
        workers: Processes that read ahead, 0 for none.
        timeout: How long to wait for one batch, seconds.

    Raises:
        DataError: An image cannot be read; the same error for any number of workers.
        DeviceError: The workers cannot be started, one died, shared memory is full, or no batch came in time.

    Example:
        >>> from bayesnet.data.examples import ArrayExamples
        >>> examples = ArrayExamples(torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64))
        >>> [len(x_BCHW) for x_BCHW in read_batches(examples, torch.arange(5).split(2), workers=0)]
        [2, 2, 1]
    """
    assert timeout > 0, timeout
    workers = min(workers, len(batches))
    if workers == 0 or examples.in_memory:
        for indices_B in batches:
            yield examples.read(indices_B)
        return
    poll = min(_POLL, timeout)
    with _batch_iterator(_Batches(examples), batches, workers, poll) as iterator:
        for _ in batches:
            batch = _next_batch(iterator, timeout, workers)
            if isinstance(batch, BayesnetError):
                raise batch
            yield batch


class _Batches(Dataset["Tensor | BayesnetError"]):
    """What a worker reads: a batch, or the error that it met.

    An error is sent as a value, since DataLoader would raise another one, with the worker's traceback as its text.
    """

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, indices: list[int]) -> Tensor | BayesnetError:
        try:
            x_BCHW = self._examples.read(indices)
        except BayesnetError as error:
            return error
        try:  # here and not in the thread that sends it, whose errors nobody hears of
            x_BCHW.share_memory_()
        except (RuntimeError, OSError) as error:
            return DeviceError("a data worker found no shared memory", where=_reason(error), hint=_SHARED_MEMORY_HINT)
        return x_BCHW


def _same(batch: object) -> object:
    """Return the batch: nothing is to be collated."""
    return batch


def _start_worker(worker_id: int) -> None:
    """Leave signals to the main process, which must be able to save after them, and computing to one thread."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    torch.set_num_threads(1)


@contextmanager
def _batch_iterator(dataset: _Batches, batches: Sequence[Tensor], workers: int, poll: float) -> Iterator[Any]:
    """Start the workers, give DataLoader's iterator, and end the workers."""
    iterator: Any = None
    with _child_signal_kept() as put_aside:
        try:
            with _stop_signals_held():
                iterator = _start(dataset, batches, workers, poll)
                put_aside()
                _open_workers.update(iterator._workers)
            yield iterator
        finally:
            if iterator is not None:
                _end(iterator)


def _start(dataset: _Batches, batches: Sequence[Tensor], workers: int, poll: float) -> Any:  # noqa: ANN401 - private
    """Return DataLoader's iterator, its workers started."""
    with warnings.catch_warnings():
        # The number of workers is the user's; and what a thread may leave locked in a fork, no worker touches.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        loader: DataLoader[Tensor | BayesnetError] = DataLoader(
            dataset,
            batch_size=None,
            sampler=map(Tensor.tolist, batches),  # lists: a tensor would take a file descriptor
            num_workers=workers,
            collate_fn=_same,
            timeout=poll,
            worker_init_fn=_start_worker,
            multiprocessing_context=_start_method(),
            generator=torch.Generator(),  # or it would draw from the generator that training draws from
            prefetch_factor=PREFETCH,
        )
        try:
            return iter(loader)
        except Exception as error:  # no more processes, no semaphores, or data that cannot be sent
            hint = "read without them: --workers 0"
            raise DeviceError("cannot start the data workers", where=_reason(error), hint=hint) from error


def _next_batch(iterator: Any, timeout: float, workers: int) -> Tensor | BayesnetError:  # noqa: ANN401 - private type
    """Return the next batch.

    DataLoader looks for dead workers when its own timeout has passed, so that is short, and is tried again.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            batch: Tensor | BayesnetError = next(iterator)
            return batch
        except (RuntimeError, OSError, EOFError) as error:
            text = str(error)
            if text.startswith("Caught "):  # raised while reading, and no user error: a bug
                raise
            if not text.startswith("DataLoader timed out"):
                where = text.partition("\n")[0] or type(error).__name__
                hint = f"it was killed or out of memory; {_SHARED_MEMORY_HINT}"
                raise DeviceError("a data worker died", where=where, hint=hint) from error
            if time.monotonic() >= deadline:
                raise DeviceError(
                    f"no batch within {timeout:g} s",
                    where=f"{workers} data worker{'s' * (workers != 1)}",
                    hint="reading hangs or is too slow; look at the disk and the data set, or use --workers 0",
                ) from error


def _end(iterator: Any) -> None:  # noqa: ANN401 - private type
    """End the workers and wait for them; those that still read or hang are killed, for nobody wants their batch."""
    workers = list(iterator._workers)
    if not _open_workers.issuperset(workers):  # Python is exiting: they are dead, and no thread can start
        return
    timer = threading.Timer(_PATIENCE, _kill, [workers])
    timer.daemon = True
    timer.start()
    try:
        iterator._shutdown_workers()
    finally:
        timer.cancel()
        _kill(workers)
        for worker in workers:
            worker.join()
        _open_workers.difference_update(workers)


def _kill(workers: Sequence[Any]) -> None:
    """Kill those that are alive: they do not heed SIGTERM."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


@atexit.register
def _kill_open_workers() -> None:
    """Kill what a generator that was never closed left: at exit Python sends SIGTERM, and waits for ever."""
    _kill(list(_open_workers))
    _open_workers.clear()


def _start_method() -> BaseContext:
    """Return how processes are started: by fork on Linux, else the platform's default.

    A fork takes the examples along whatever they are (lambdas, classes of a script) in milliseconds. It is safe here
    although threads of torch run: a worker computes in one thread of its own and never touches the accelerator. On
    macOS system libraries do not survive a fork.
    """
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


@contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back, so that a worker never gets one before it has learned to ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _child_signal_kept() -> Iterator[Callable[[], None]]:
    """Give a function to call when the workers run, which puts DataLoader's handler of SIGCHLD aside until the end.

    That handler raises RuntimeError in whatever line the main process is at, be it the saving of a checkpoint, while
    `_next_batch` notices a dead worker where the batch is wanted.
    """
    if not hasattr(signal, "SIGCHLD") or not _in_main_thread():  # then DataLoader sets none
        yield lambda: None
        return
    before = installed = signal.getsignal(signal.SIGCHLD)

    def put_aside() -> None:
        nonlocal installed
        installed = signal.getsignal(signal.SIGCHLD)
        theirs = getattr(before, "__module__", None) == signal_handling.__name__  # of a loader of the user's
        signal.signal(signal.SIGCHLD, (None if theirs else before) or signal.SIG_DFL)

    try:
        yield put_aside
    finally:
        if _in_main_thread():  # a generator can be collected by any
            signal.signal(signal.SIGCHLD, installed or signal.SIG_DFL)


def _in_main_thread() -> bool:
    """Return whether this is the thread that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def _reason(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
