"""One writer at a time: a lock that the kernel frees when its holder dies, however that happens."""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path

from bayesnet import storage
from bayesnet.errors import BusyError, CheckpointError
from bayesnet.strict_json import json_bytes, parse_json

_HAS_FLOCK = importlib.util.find_spec("fcntl") is not None
_held: set[int] = set()


def acquire(path: Path, what: str = "run directory") -> Callable[[], None]:
    """Take the lock and return what gives it back. OSErrors are the caller's.

    Args:
        path: The file that is locked, in the directory that it protects; it is made.
        what: What it protects, for the message.

    Raises:
        BusyError: Another process holds it.
    """
    if _HAS_FLOCK:
        try:
            return _acquire_from_kernel(path, what)
        except OSError as error:  # some cluster file systems have no flock
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
    return _acquire_by_file(path.with_name(f"{path.name}-held"), what)


def _acquire_from_kernel(path: Path, what: str) -> Callable[[], None]:
    """Take the lock with flock, which ends with the process however that dies."""
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | storage.OPEN_FLAGS, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(os.read(descriptor, 1000), path, what, "wait for it") from None
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise BusyError(f"{what} was replaced while it was being locked", where=path.parent, hint="try again")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner())
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)

    def release() -> None:
        if descriptor in _held:  # a forked child has closed its copy already
            _held.discard(descriptor)
            os.close(descriptor)

    return release


def _acquire_by_file(path: Path, what: str) -> Callable[[], None]:
    """Take the lock by creating a file, where there is no flock; a killed process leaves it behind."""
    try:
        storage.write_new(path, owner())
    except FileExistsError:
        holder = storage.read_bytes(path, max_bytes=1000)
        raise _busy(holder, path, what, f"wait for it; if it is dead, delete {path}") from None
    return lambda: path.unlink(missing_ok=True)


def owner() -> bytes:
    """Return the contents of a lock file: who holds it."""
    return json_bytes({"pid": os.getpid(), "host": platform.node()})


def _busy(holder: bytes, path: Path, what: str, hint: str) -> BusyError:
    """Return the error that names the holder, if its lock file says."""
    try:
        record = parse_json(holder, where=path)
    except CheckpointError:  # it is just being written
        record = {}
    pid = record.get("pid")
    who = f"process {pid} on {record.get('host')}" if isinstance(pid, int) else "another process"
    return BusyError(f"{what} is in use by {who}", where=path.parent, hint=hint)


def _close_in_child() -> None:
    """Close a forked child's copies of the locks: a data-loading worker must not hold a dead parent's lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
