"""The directory of an export: free, or an earlier export; whole, or as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bayesnet import storage
from bayesnet.errors import ConfigError, StorageError
from bayesnet.exporting import JSON_NAME, KIND, claim, publish

Snapshot = Callable[[Path], dict[str, str]]


def export_to(path: Path, text: str) -> None:
    with publish(claim(path)) as building:
        storage.write_json(building / JSON_NAME, {"kind": KIND, "text": text})
        (building / "README.md").write_text(text)


def break_off(path: Path, error: BaseException) -> None:
    with publish(claim(path)) as building:
        (building / "README.md").write_text("half")
        raise error


def test_a_new_an_empty_and_an_earlier_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a/b/new", "empty"):
        for text in ("first", "second"):
            export_to(tmp_path / name, text)
            assert (tmp_path / name / "README.md").read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"a", "empty"}, "nothing temporary is left"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        export_to(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "README.md").exists()


@pytest.mark.parametrize("extra", ["mine.txt", "model.pt2.bak", ".hidden", "folder/"])
def test_what_no_export_made_is_not_replaced(tmp_path: Path, snapshot: Snapshot, extra: str) -> None:
    export_to(tmp_path / "out", "text")
    if extra.endswith("/"):
        (tmp_path / "out" / extra).mkdir()
    else:
        (tmp_path / "out" / extra).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"output directory is not empty \(.*out\): choose another --out"):
        claim(tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_files_of_the_right_names_alone_are_no_export(tmp_path: Path) -> None:
    for text in ('{"kind": "mine"}', "[]", ""):
        (tmp_path / JSON_NAME).write_text(text)
        with pytest.raises(ConfigError, match="output directory is not empty"):
            claim(tmp_path)


def test_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/out"):
        with pytest.raises(ConfigError, match=r"not a directory \(.*file\): choose another --out"):
            claim(tmp_path / place)


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_after_an_error_nothing_has_changed(tmp_path: Path, snapshot: Snapshot, error: BaseException) -> None:
    export_to(tmp_path / "out", "text")
    before = snapshot(tmp_path)
    expected = StorageError if isinstance(error, OSError) else type(error)
    for name in ("out", "new/deep"):
        with pytest.raises(expected):
            break_off(tmp_path / name, error)
        assert snapshot(tmp_path) == before


def test_where_the_last_move_fails_the_earlier_export_is_back(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_to(tmp_path / "out", "text")
    before, rename = snapshot(tmp_path), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-") and (self / "README.md").read_text() == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="cannot write the export: Input/output error"):
        export_to(tmp_path / "out", "new")
    assert snapshot(tmp_path) == before
