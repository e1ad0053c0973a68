"""Finding image files: folders by name, patterns, lists on a stream."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from bayesnet.data.finding import find_images, image_paths, listed_images
from bayesnet.errors import DataError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, *sources: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in image_paths(folder / source for source in sources)]


def test_image_paths_walks_sorted(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/.hidden.png", "b/notes.txt", "a/deep/1.jpg", ".secret/3.png", "c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = image_paths([tmp_path / "b" / "notes.txt", tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/notes.txt", "a/deep/1.jpg", "b/2.PNG", "c.webp"]


def test_image_paths_refuses_what_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file or folder does not exist \(.*gone\)"):
        image_paths([tmp_path / "gone"])
    with pytest.raises(DataError, match=r"folder has no image \(.*\): images are files that end in .bmp .gif"):
        image_paths([tmp_path])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["a.png", "b[1].png"]),
        ("b[1].png", ["b[1].png"]),
        ("b[[]1].*", ["b[1].png"]),
        ("**/*.jpg", ["c/d.jpg", "c/e/f.jpg"]),
        ("c/**", ["c/d.jpg", "c/e/f.jpg"]),
        ("**", ["a.png", "b[1].png", "c/d.jpg", "c/e/f.jpg"]),
        ("c/?", ["c/e/f.jpg"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    """A file of that very name comes first, and no image is found twice."""
    make(tmp_path, "a.png", "b[1].png", "c/d.jpg", "c/e/f.jpg", "c/notes.txt", ".hidden.png")
    assert found(tmp_path, pattern) == expected


def test_a_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    make(tmp_path, "notes.txt")
    with pytest.raises(DataError, match=r"no image matches \(.*\*\): images are files that end in"):
        found(tmp_path, "*")


def test_what_is_named_is_looked_at_before_the_first_image(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    with pytest.raises(DataError, match="does not exist"):
        find_images([tmp_path / "a.png", tmp_path / "gone"])


def test_a_list_is_read_as_it_comes() -> None:
    """Names cut anywhere by the reads, the last one without an end; undecodable bytes come back."""
    names = [b"a.png", b"\xff b.png", b" c ", b"-d.png"]

    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read1(min(size or 1, 3))

    assert [os.fsencode(path) for path in listed_images(Slow(b"\n".join(names)))] == names
    assert [os.fsencode(path) for path in listed_images(Slow(b"\r\n\r\n".join(names)))] == names
    with_newline = [b"a\nb.png", b"c.png\r"]
    nulls = listed_images(Slow(b"\0".join(with_newline) + b"\0"), separator=b"\0")
    assert [os.fsencode(path) for path in nulls] == with_newline


def test_what_is_no_list_is_refused_in_bounded_memory() -> None:
    with pytest.raises(DataError, match="not a list of image files: expected one name per line"):
        list(listed_images(io.BytesIO(b"x" * 2**21)))
