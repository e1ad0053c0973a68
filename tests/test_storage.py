from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesnet import storage, strict_json
from bayesnet.errors import CheckpointError, StorageError
from bayesnet.types import JsonObject

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_json_round_trip(record: dict[str, object]) -> None:
    assert strict_json.parse_json(strict_json.json_bytes(strict_json.json_ready(record)), where="x") == record


def test_json_keeps_names_that_are_not_utf8_and_the_order(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe.png")
    storage.write_json(tmp_path / "a.json", {"z": name, "a": "\u202ex\n"})
    assert storage.read_json(tmp_path / "a.json") == {"z": name, "a": "\u202ex\n"}
    text = (tmp_path / "a.json").read_bytes()
    assert text.isascii()
    assert text.startswith(b'{\n  "z"')
    assert text.endswith(b"}\n")


def test_json_ready_maps_what_json_has_not() -> None:
    record = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf, np.float32("nan")],
        "array": np.array([[1.0, np.nan]]),
        "tensor": torch.tensor([1, 2]),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        "pair": (1, 2.5),
    }
    assert strict_json.json_ready(record) == {
        "nan": None,
        "inf": [None, None, None],
        "array": [[1.0, None]],
        "tensor": [1, 2],
        "count": 3,
        "flag": True,
        "path": "a/b",
        "pair": [1, 2.5],
    }


def test_json_ready_refuses_what_would_change_silently() -> None:
    with pytest.raises(TypeError, match="key must be a string, not 1"):
        strict_json.json_ready({1: "a"})
    with pytest.raises(TypeError, match="set has no JSON form"):
        strict_json.json_ready({"a": {1}})
    deep: list[object] = []
    deep.append(deep)
    with pytest.raises(ValueError, match="deeper than 64"):
        strict_json.json_ready(deep)


def test_what_can_be_written_can_be_read_up_to_the_depth_limit() -> None:
    value: object = 1
    for _ in range(strict_json.MAX_JSON_DEPTH):
        value = {"a": value}
    strict_json.parse_json(strict_json.json_bytes(strict_json.json_ready(value)), where="x")
    with pytest.raises(ValueError, match="deeper"):
        strict_json.json_ready({"a": value})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON (f): Expecting value"),
        (b"\xff", "not valid JSON (f): 'utf-8' codec"),
        (b'{"a": 1', "not valid JSON (f): Expecting ',' delimiter"),
        (b'{"a": 1, "a": 1}', "not valid JSON (f): duplicate key 'a'"),
        (b'{"a": NaN}', "not valid JSON (f): NaN is not JSON"),
        (b'{"a": -Infinity}', "not valid JSON (f): -Infinity is not JSON"),
        (b'{"a": 1e999}', "not valid JSON (f): number out of range: 1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON (f): Exceeds the limit"),
        (b"[]", "not a JSON object (f)"),
        (b'{"a":' * 100_000, "JSON is nested too deeply (f)"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "JSON is nested too deeply (f)"),
    ],
)
def test_parse_json_refuses(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        strict_json.parse_json(data, where="f")
    assert str(caught.value).startswith(message)


def test_write_bytes_replaces_follows_the_umask_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a"
    previous = os.umask(0o027)
    try:
        storage.write_bytes(target, b"1")
        storage.write_bytes(target, b"22")
    finally:
        os.umask(previous)
    assert target.read_bytes() == b"22"
    assert target.stat().st_mode & 0o777 == 0o640  # mkstemp's 0600 would hide results from the group
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_write_bytes_replaces_a_link_instead_of_following_it(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"keep")
    (tmp_path / "a").symlink_to(tmp_path / "outside")
    storage.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "outside").read_bytes() == b"keep"
    assert not (tmp_path / "a").is_symlink()


def test_write_errors_name_path_reason_and_remedy(tmp_path: Path) -> None:
    target = tmp_path / "gone" / "a.json"
    with pytest.raises(StorageError) as caught:
        storage.write_json(target, {})
    assert str(caught.value) == (
        f"cannot write the file: No such file or directory ({target}): was the directory removed meanwhile?"
    )
    (tmp_path / "d").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        storage.write_bytes(tmp_path / "d", b"")
    assert os.listdir(tmp_path) == ["d"]  # noqa: PTH208


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
        storage.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_read_bytes_takes_regular_files_of_the_stated_size_only(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    assert storage.read_bytes(tmp_path / "f", max_bytes=3) == b"abc"
    for name, message in {
        "missing": "file is missing",
        "link": "is a symbolic link, not a file",
        "pipe": "not a regular file",
        "f": "file has 3 bytes, more than 2",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            storage.read_bytes(tmp_path / name, max_bytes=2)
    with pytest.raises(CheckpointError, match="not a regular file"):
        storage.read_bytes(tmp_path, max_bytes=2)


def test_a_sparse_giant_is_refused_before_allocation(tmp_path: Path) -> None:
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=f"file has {2**40} bytes, more than {strict_json.MAX_JSON_BYTES}"):
        storage.read_json(tmp_path / "giant")


def test_a_record_that_nothing_could_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    storage.write_json(path, {"kept": True})
    with pytest.raises(
        StorageError, match=r"the record takes more than 32,000,000 bytes \(.*record.json: 32,000,\d+\)"
    ):
        storage.write_json(path, {"long": "x" * strict_json.MAX_JSON_BYTES})
    assert storage.read_json(path) == {"kept": True}
    largest = {"long": "x" * (strict_json.MAX_JSON_BYTES - len(strict_json.json_bytes({"long": ""})))}
    storage.write_json(path, largest)
    assert storage.read_json(path) == largest


def test_lines_round_trip_and_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    storage.append_line(path, {"epoch": 1, "nll": math.nan})
    storage.append_line(path, {"epoch": 2})
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = [{"epoch": 1, "nll": None}, {"epoch": 2}][: whole[:cut].count(b"\n")]
        assert storage.read_lines(path) == complete
        storage.append_line(path, {"epoch": 3})  # goes on after the last complete line
        assert storage.read_lines(path) == [*complete, {"epoch": 3}]


def test_the_last_newline_is_found_behind_a_long_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    storage.append_line(path, {"a": 2})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(CheckpointError) as caught:
        storage.read_lines(path)
    assert str(caught.value).startswith(f"not valid JSON ({path}, line 2): ")


def test_append_line_does_not_follow_links_and_does_not_hang_on_pipes(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="Too many levels of symbolic links"):
        storage.append_line(tmp_path / "link", {"a": 1})
    with pytest.raises(StorageError, match="not a regular file"):
        storage.append_line(tmp_path / "pipe", {"a": 1})
    assert (tmp_path / "outside").read_bytes() == b""


def test_a_failed_append_leaves_the_complete_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    storage.append_line(path, {"a": 1})
    real = os.write
    written: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(real(descriptor, bytes(data[:4])))
        return written[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError) as caught:
            storage.append_line(path, {"a": 2})
    assert str(caught.value) == (
        f"cannot append to the file: No space left on device ({path}): free some space or write to another disk"
    )
    assert path.read_bytes() == b'{"a": 1}\n'


def test_write_lines_replaces_all_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    contents: list[list[JsonObject]] = [[{"a": 1}, {"b": math.inf}], [{"c": "\udcff\n"}], []]
    for records in contents:
        storage.write_lines(path, records)
        assert storage.read_lines(path) == strict_json.json_ready(records)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]  # noqa: PTH208


def test_make_directories_creates_no_more_than_asked(tmp_path: Path) -> None:
    a = tmp_path / "a"
    assert storage.make_directories(a / "b" / "c") == (a, a / "b", a / "b" / "c")
    assert storage.make_directories(a / "b" / "c") == ()
    with pytest.raises(FileNotFoundError):
        storage.make_directories(tmp_path / "x" / "y" / "z", levels=2)
    assert not (tmp_path / "x").exists()


def test_remove_stale_spares_the_living_and_other_hosts(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    mine = storage.temporary_name()
    dead = mine.replace(f"-{os.getpid()}-", f"-{child}-")
    tag = dead.split("-")[2][:8]
    elsewhere = dead.replace(tag, "0" * 8 if tag != "0" * 8 else "1" * 8)
    for name in (mine, elsewhere, f"{dead}x", ".tmp-notes", "summary.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / dead).mkdir()
    (tmp_path / dead / "part").write_bytes(b"")
    (tmp_path / f"{dead[:-1]}{'0' if dead[-1] != '0' else '1'}").write_bytes(b"")
    storage.remove_stale(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {mine, elsewhere, f"{dead}x", ".tmp-notes", "summary.json"}
    storage.remove_stale(tmp_path / "missing")


def test_bytes_are_canonical() -> None:
    record = {"b": [1, 2.5, None], "a": "\u00e9"}
    assert strict_json.json_bytes(record) == json.dumps(record, indent=2).encode() + b"\n"
