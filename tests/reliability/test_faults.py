"""A file system that refuses at any one call: the previous contents stand, nothing is left over, the error says why."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesnet import storage
from bayesnet.checkpoint import newest_checkpoint, save_checkpoint
from bayesnet.errors import StorageError
from bayesnet.rundir import RunDirectory

Start = Callable[[Callable[[], object]], int]
Join = Callable[[int], int]

CALLS = ("open", "mkdir", "write", "fsync", "rename", "replace")


class Recorder:
    """Notes each file system call with the names it concerns, and makes the ``fail_at``-th raise."""

    def __init__(self, fail_at: int = 0, code: int = errno.ENOSPC) -> None:
        self.fail_at, self.code = fail_at, code
        self.events: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}

    def wrap(self, call: str) -> Callable[..., Any]:
        real = getattr(os, call)

        def recorded(target: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            if "dir_fd" in options:  # rmtree cleaning up
                return real(target, *arguments, **options)
            name = self.names.get(target, "?") if isinstance(target, int) else Path(target).name
            self.events.append((call, name))
            if len(self.events) == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            result = real(target, *arguments, **options)
            if call == "open":
                self.names[result] = name
            return result

        return recorded

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for call in CALLS:
                patch.setattr(os, call, self.wrap(call))
            yield


def temporaries(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob(".tmp-*")]


def save(directory: Path, step: int, attempt: int) -> None:
    save_checkpoint(directory, step, {"w": torch.full((4,), float(attempt))}, {"attempt": attempt})


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_save_that_fails_at_any_call_keeps_the_previous_checkpoint(tmp_path: Path, step: int) -> None:
    save(tmp_path / "whole", 1, 1)
    recorder = Recorder()
    with recorder():
        save(tmp_path / "whole", step, 2)
    num_calls = len(recorder.events)
    assert num_calls >= 15  # 3 files x (open, write, fsync), 2 directories x (open, fsync), mkdir, rename
    refusals = 0
    for fail_at in range(1, num_calls + 1):
        directory = tmp_path / str(fail_at)
        save(directory, 1, 1)
        recorder = Recorder(fail_at)
        raised = None
        with recorder():
            try:
                save(directory, step, 2)
            except StorageError as error:
                raised = error
        assert raised is None or str(raised).startswith("cannot save the checkpoint: No space left on device (")
        assert len(recorder.events) >= fail_at
        newest, rejected = newest_checkpoint(directory)
        assert newest is not None
        assert rejected == ()
        earlier = recorder.events[: fail_at - 1]
        committed = any(call == "rename" and name.startswith(".tmp-") for call, name in earlier)
        assert newest.state["attempt"] == (2 if committed else 1)
        assert newest.tensors["w"][0] == newest.state["attempt"]
        assert newest.path.name == f"step-{newest.step:08d}"  # not .old: what stepped aside stepped back
        assert raised is not None or committed
        assert temporaries(directory) == []
        refusals += raised is not None
        save(directory, step, 3)  # and the next attempt succeeds
        newest, _ = newest_checkpoint(directory)
        assert newest is not None
        assert newest.state["attempt"] == 3
    assert refusals >= num_calls - (step == 1)  # only deleting the replaced one may fail silently


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
        (errno.EFBIG, "File too large"),
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_error_gives_the_reason_of_the_file_system(tmp_path: Path, code: int, reason: str) -> None:
    with Recorder(fail_at=2, code=code)(), pytest.raises(StorageError) as caught:
        storage.write_bytes(tmp_path / "a", b"data")
    assert str(caught.value).startswith(f"cannot write the file: {reason} ({tmp_path / 'a'})")


def test_a_file_that_fails_at_any_call_keeps_its_contents(tmp_path: Path) -> None:
    recorder = Recorder()
    with recorder():
        storage.write_bytes(tmp_path / "a", b"0")
    for fail_at in range(1, len(recorder.events) + 1):
        storage.write_bytes(tmp_path / "a", b"old")
        with Recorder(fail_at)(), pytest.raises(StorageError, match="No space left on device"):
            storage.write_bytes(tmp_path / "a", b"new")
        renamed = fail_at > [call for call, _ in recorder.events].index("replace") + 1
        assert (tmp_path / "a").read_bytes() == (b"new" if renamed else b"old")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_line_that_fails_at_any_call_leaves_the_complete_lines(tmp_path: Path) -> None:
    for fail_at in (1, 2, 3):  # open, write, fsync
        path = tmp_path / f"{fail_at}.jsonl"
        storage.append_line(path, {"a": 1})
        with Recorder(fail_at)(), pytest.raises(StorageError, match="No space left on device"):
            storage.append_line(path, {"a": 2})
        assert path.read_bytes() == b'{"a": 1}\n'


@pytest.mark.parametrize("named", [True, False])
def test_a_start_that_fails_at_any_call_leaves_nothing(tmp_path: Path, named: bool) -> None:
    def create(root: Path) -> RunDirectory:
        return RunDirectory.create(root / "a" / "run" if named else None, "digits", root / "runs")

    recorder = Recorder()
    with recorder():
        create(tmp_path / "whole")
    assert len(recorder.events) >= 8
    for fail_at in range(1, len(recorder.events) + 1):
        with Recorder(fail_at)(), pytest.raises(StorageError, match="No space left on device"):
            create(tmp_path / "root")
        assert [path.name for path in tmp_path.iterdir()] == ["whole"], fail_at


def before(events: list[tuple[str, str]], *expected: tuple[str, str]) -> bool:
    """Return whether the expected events happened, the last occurrence of each after the one before."""
    positions = [max(index for index, event in enumerate(events) if event == wanted) for wanted in expected]
    return positions == sorted(positions)


def test_the_order_of_calls_survives_a_power_cut(tmp_path: Path) -> None:
    recorder = Recorder()
    with recorder():
        save(tmp_path, 1, 1)
    events = recorder.events
    [temporary] = [name for call, name in events if call == "rename"]
    assert temporary.startswith(".tmp-")
    for name in ("tensors.safetensors", "state.json", "MANIFEST.json"):
        chain = [
            ("write", name),
            ("fsync", name),
            ("fsync", temporary),
            ("rename", temporary),
            ("fsync", tmp_path.name),
        ]
        assert before(events, *chain)
    assert before(events, ("write", "tensors.safetensors"), ("write", "MANIFEST.json"))
    assert before(events, ("write", "state.json"), ("write", "MANIFEST.json"))
    assert not before(events, ("rename", temporary), ("fsync", temporary))  # the control: `before` can say no


def test_the_order_of_calls_of_a_single_file(tmp_path: Path) -> None:
    recorder = Recorder()
    with recorder():
        storage.write_bytes(tmp_path / "a", b"1")
    [temporary] = [name for call, name in recorder.events if call == "replace"]
    chain = [("write", temporary), ("fsync", temporary), ("replace", temporary), ("fsync", tmp_path.name)]
    assert before(recorder.events, *chain)


def test_the_file_size_limit_of_the_system(tmp_path: Path, start: Start, join: Join) -> None:
    save(tmp_path, 1, 1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        with pytest.raises(StorageError) as caught:
            save_checkpoint(tmp_path, 2, {"w": torch.zeros(10_000)}, {})
        assert str(caught.value) == (
            f"cannot save the checkpoint: File too large ({tmp_path / 'step-00000002'}): "
            "raise the file size limit (ulimit -f)"
        )

    assert join(start(limited)) == 0
    newest, rejected = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, rejected) == (1, ())
    assert temporaries(tmp_path) == []
