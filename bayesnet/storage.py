"""Files that are whole or absent: atomic writes, bounded reads and append-only logs.

A write goes to a temporary name in the same directory, is synced, renamed over the target, and the directory is synced:
a kill or a power cut leaves the old contents or the new ones. Reads accept regular files of a stated size only, so
neither a link, a pipe nor a bomb gets through. A failed write is a StorageError, a failed read a CheckpointError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bayesnet.errors import CheckpointError, StorageError
from bayesnet.strict_json import MAX_JSON_BYTES, json_bytes, json_line, json_ready, parse_json
from bayesnet.types import JsonObject

# O_NOFOLLOW: a planted link must not redirect a read or write. O_NONBLOCK: opening a planted pipe must not hang.
OPEN_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_TEMPORARY = re.compile(r"\.tmp-([0-9]{1,9})-([0-9a-f]{8})[0-9a-f]{16}")
_HINTS = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some of your quota or write to another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.EROFS: "choose a directory that you may write to",
    errno.ENOENT: "was the directory removed meanwhile?",
}


@contextlib.contextmanager
def storage_errors(what: str, path: Path) -> Iterator[None]:
    """Turn any OSError of the block into StorageError ``WHAT: REASON (PATH): WHAT TO DO``.

    Raises:
        StorageError: The block raised OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{what}: {reason}", where=path, hint=_HINTS.get(error.errno or 0)) from error


@contextlib.contextmanager
def read_errors(what: str, path: Path) -> Iterator[None]:
    """Turn any OSError of the block into CheckpointError ``WHAT: REASON (PATH)``.

    Raises:
        CheckpointError: The block raised OSError.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or error}", where=path) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the contents of ``path`` atomically and durably.

    Raises:
        StorageError: The file system refused; the old contents stand and no temporary file is left.
    """
    replace_file(path, lambda temporary: write_new(temporary, data), "cannot write the file")


def replace_file(path: Path, write: Callable[[Path], None], what: str) -> None:
    """Replace ``path`` atomically and durably by a file that is too large to hold in memory.

    Args:
        path: The file.
        write: Makes a file of the name that it is given and syncs its contents; its OSErrors become StorageError.
        what: What could not be done where that fails, for the message.

    Raises:
        StorageError: The file system refused; the old contents stand and no temporary file is left.
    """
    temporary = path.parent / temporary_name()
    with storage_errors(what, path):
        try:
            write(temporary)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_json(path: Path, record: JsonObject) -> None:
    """Replace ``path`` by ``record`` as JSON; see `json_ready` for what values may be.

    Raises:
        StorageError: The file system refused, or the text is longer than `read_json` reads.
        TypeError: A value or key has no JSON form.
    """
    write_bytes(path, json_file(path, record))


def json_file(path: Path, record: JsonObject) -> bytes:
    """Return what `write_json` would write, to know beforehand that it can be.

    Raises:
        StorageError: The text is longer than `read_json` reads.
        TypeError: A value or key has no JSON form.
    """
    data = json_bytes(json_ready(record))
    if len(data) > MAX_JSON_BYTES:
        raise StorageError(f"the record takes more than {MAX_JSON_BYTES:,} bytes", where=f"{path}: {len(data):,}")
    return data


def append_line(path: Path, record: JsonObject) -> None:
    """Add ``record`` as one line of JSON and sync it, first cutting off a line that a kill left unfinished.

    One process at a time may append: hold the run directory's lock.

    Raises:
        StorageError: The file system refused; the complete lines stand.
        TypeError: A value or key has no JSON form.
    """
    line = json_line(record)
    with storage_errors("cannot append to the file", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | OPEN_FLAGS, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StorageError("not a regular file", where=path)
            end = _end_of_lines(descriptor)
            os.ftruncate(descriptor, end)
            try:
                _write_all(descriptor, line)
                os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        if end == 0:
            sync_directory(path.parent)


def write_lines(path: Path, records: Sequence[JsonObject]) -> None:
    """Replace ``path`` atomically by one line of JSON per record.

    Raises:
        StorageError: The file system refused; an earlier file stands.
        TypeError: A value or key has no JSON form.
    """
    write_bytes(path, b"".join(json_line(record) for record in records))


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Return the contents of a regular file, refusing before allocation when it is larger than ``max_bytes``.

    Raises:
        CheckpointError: Missing, a link, not a regular file, too large, unreadable or changing.
    """
    with read_errors("cannot read the file", path):
        if path.is_symlink():
            raise CheckpointError("is a symbolic link, not a file", where=path)
        try:
            descriptor = os.open(path, os.O_RDONLY | OPEN_FLAGS)
        except FileNotFoundError:
            raise CheckpointError("file is missing", where=path) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError("not a regular file", where=path)
            if status.st_size > max_bytes:
                raise CheckpointError(f"file has {status.st_size} bytes, more than {max_bytes}", where=path)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(status.st_size + 1)
        finally:
            os.close(descriptor)
        if len(data) != status.st_size:
            raise CheckpointError("file changed while it was read", where=path)
        return data


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> JsonObject:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: Whatever `read_bytes` and `parse_json` refuse.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), where=path)


def read_lines(path: Path, *, max_bytes: int = 4 * MAX_JSON_BYTES) -> list[JsonObject]:
    """Return the objects of a file of JSON lines; an unfinished last line (a kill while appending) does not count.

    Raises:
        CheckpointError: The file cannot be read or a complete line is not a JSON object.
    """
    lines = read_bytes(path, max_bytes=max_bytes).split(b"\n")[:-1]
    return [parse_json(line, where=f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def write_new(path: Path, data: bytes) -> None:
    """Create ``path``, which must not exist, and sync its contents. OSErrors are the caller's."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, 0o666)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. OSErrors are the caller's."""
    if os.name == "nt":  # a directory cannot be opened there; renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not know this call, and are as durable without it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_directories(path: Path, *, levels: int | None = None) -> tuple[Path, ...]:
    """Create a directory and at most ``levels`` missing ones in all; return those created, outermost first.

    OSErrors are the caller's; after one, none of them is left.
    """
    missing: list[Path] = []
    while not path.exists() and (levels is None or len(missing) < levels):
        missing.insert(0, path)
        path = path.parent
    created: list[Path] = []
    try:
        for directory in missing:
            with contextlib.suppress(FileExistsError):  # another process was faster
                directory.mkdir()
                created.append(directory)
                sync_directory(directory.parent)
    except BaseException:
        remove_empty(created)
        raise
    return tuple(created)


def remove_empty(directories: Sequence[Path]) -> None:
    """Remove those directories that are empty, the last first; failing to is no error."""
    for path in reversed(directories):
        with contextlib.suppress(OSError):
            path.rmdir()


def temporary_name() -> str:
    """Return an unpredictable name that says which process of which host is writing."""
    return f".tmp-{os.getpid()}-{_host_tag()}{secrets.token_hex(8)}"


def remove_stale(directory: Path) -> None:
    """Remove temporary files and directories of processes of this host that are dead; failing to is no error."""
    with contextlib.suppress(OSError):
        for path in list(directory.iterdir()):
            match = _TEMPORARY.fullmatch(path.name)
            if match is None or match[2] != _host_tag() or _is_alive(int(match[1])):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``: one call may write a part only."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _end_of_lines(descriptor: int) -> int:
    """Return the offset behind the last newline, 0 where there is none."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(descriptor, start, os.SEEK_SET)
        newline = os.read(descriptor, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _host_tag() -> str:
    """Return eight hexadecimal digits that stand for this host: a process number means nothing on another one."""
    return f"{zlib.crc32(os.fsencode(platform.node())):08x}"


def _is_alive(pid: int) -> bool:
    """Return whether a process of this host exists; True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
