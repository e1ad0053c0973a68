"""Reading ahead: what threads find of many items, in order, a bounded number of them at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

MAX_THREADS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def num_threads() -> int:
    """Return how many threads decode images: they wait for the disk, and decoders let others run."""
    return min(MAX_THREADS, os.cpu_count() or 1)


def map_ahead(function: Callable[[_Item], _Result], items: Iterable[_Item], *, ahead: int) -> Iterator[_Result]:
    """Yield ``function(item)`` for each item, in order, computed by a few threads.

    Args:
        function: What is computed; an exception of it is raised where its result would be given.
        items: They are taken as they are needed, so that there may be any number.
        ahead: How many items may be begun beyond the one that is given, at least 1.

    Example:
        >>> list(map_ahead(abs, iter([-1, 2, -3]), ahead=2))
        [1, 2, 3]
    """
    pending: deque[Future[_Result]] = deque()
    pool = ThreadPoolExecutor(num_threads(), thread_name_prefix="bayesnet-decode")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # an interruption must not wait for the items that are left
        pool.shutdown(wait=False, cancel_futures=True)
