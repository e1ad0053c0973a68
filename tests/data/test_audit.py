"""The audit of a folder: everything that is planted is found and nothing else, in one pass that no file ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from bayesnet.data.audit import audit_folder
from bayesnet.data.images import inspect_image, write_png
from bayesnet.errors import DataError
from bayesnet.types import JsonObject

MAX_PIXELS = 10**6


def image(path: Path, seed: int, *, height: int = 8, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    write_png(path, torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give three classes of ten images, all different, with a test folder for two of them."""
    root = tmp_path / "data"
    for index, name in enumerate(("train/a", "train/b", "train/c", "test/a", "test/b")):
        for number in range(10):
            image(root / name / f"{number}.png", 10 * index + number)
    return root


def audit(root: Path) -> JsonObject:
    return audit_folder(root, max_pixels=MAX_PIXELS)


def test_nothing_is_wrong(folder: Path) -> None:
    record = audit(folder)
    assert record["ok"]
    assert record["problems"] == record["unreadable"] == []
    assert record["num_images"] == 50
    assert record["splits"] == {"train": {"a": 10, "b": 10, "c": 10}, "test": {"a": 10, "b": 10}}
    assert not any(record["duplicates"].values())
    assert (record["formats"], record["modes"]) == ({"PNG": 50}, {"RGB": 50})
    side = {"min": 8, "median": 8, "max": 8}
    assert record["sizes"] == {"height": side, "width": side, "short_side": [{"low": 1, "high": 8, "count": 50}]}


def test_unreadable_files_are_all_named(folder: Path) -> None:
    """Empty, cut, of another kind, too large, of no defined range: with the words in which `train` refuses them."""
    bad = folder / "train" / "b"
    (bad / "empty.png").write_bytes(b"")
    (bad / "cut.png").write_bytes(image(bad / "x.png", 99).read_bytes()[:60])
    (bad / "text.jpg").write_text("no image")
    image(bad / "huge.png", 98, height=1001, width=1000)
    Image.new("F", (8, 8)).save(bad / "float.tif")
    (bad / "x.png").unlink()
    record = audit(folder)
    assert [Path(each["path"]).name for each in record["unreadable"]] == [
        "cut.png",
        "empty.png",
        "float.tif",
        "huge.png",
        "text.jpg",
    ]
    assert all(str(bad) in each["reason"] for each in record["unreadable"])
    assert "raise data.max_pixels above 1000000" in record["unreadable"][3]["reason"]
    assert record["problems"] == ["5 of 55 images cannot be read"]
    assert not record["ok"]


def test_equal_bytes_are_found_by_what_they_endanger(folder: Path) -> None:
    train, test = folder / "train", folder / "test"
    planted = {
        "within_class": [train / "a" / "0.png", train / "a" / "copy.png"],
        "across_splits": [train / "b" / "1.png", test / "b" / "leak.png"],
        "across_classes": [train / "a" / "2.png", train / "c" / "2 again.png"],
    }
    for first, second in planted.values():
        shutil.copy(first, second)
    record = audit(folder)
    assert record["duplicates"] == {kind: [[str(path) for path in paths]] for kind, paths in planted.items()}
    assert record["problems"] == [
        "1 images are in two splits, byte for byte",
        "1 images are in two classes, byte for byte",
    ]


def test_every_problem_of_the_folder_is_told_in_one_pass(folder: Path, tmp_path: Path) -> None:
    """Where a scan for training raises the first, the audit goes on."""
    train = folder / "train"
    (train / "empty").mkdir()
    (train / "a" / "out.png").symlink_to(image(tmp_path / "elsewhere.png", 97))
    (train / "a" / "nowhere.png").symlink_to(train / "gone.png")
    (train / "a" / "loop").symlink_to(folder)
    os.mkfifo(train / "b" / "pipe.png")
    (train / "c" / "same.png").symlink_to(train / "a" / "0.png")
    image(folder / "test" / "unknown" / "0.png", 96)
    record = audit(folder)
    starts = [
        "link leads out of the data folder",
        "link leads nowhere",
        "not a regular file",
        "the same file as ",
        "class folder has no image",
        "test has other classes than train",
    ]
    for start in starts:
        assert sum(problem.startswith(start) for problem in record["problems"]) == 1, start
    assert len(record["problems"]) == len(starts)
    assert record["num_images"] == 51
    assert any("links to folders" in note for note in record["notes"])


def leave_one_class(root: Path) -> None:
    for name in "bc":
        shutil.rmtree(root / "train" / name)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda root: shutil.rmtree(root / "train"), "there are splits but no train folder"),
        (leave_one_class, "found 1 class folder, need at least 2"),
        (lambda root: (root / "val").mkdir(), "the validation folder has no class folder"),
        (
            lambda root: [(root / "train" / "a" / f"{number}.png").unlink() for number in range(8)],
            "class has 2 images, too few for one in each of 3 splits (a)",
        ),
    ],
)
def test_what_train_would_refuse(folder: Path, change: Callable[[Path], object], problem: str) -> None:
    change(folder)
    record = audit(folder)
    assert not record["ok"]
    assert any(text.startswith(problem) for text in record["problems"]), record["problems"]


def test_what_the_images_are(folder: Path) -> None:
    more = folder / "train" / "a"
    Image.new("L", (300, 20)).save(more / "grey.jpg")
    Image.new("CMYK", (9, 9), (1, 2, 3, 4)).save(more / "ink.jpg")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(more / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 10), "red").save(more / "turned.jpg", exif=exif)
    record = audit(folder)
    assert record["ok"]
    assert record["modes"] == {"RGB": 51, "L": 1, "CMYK": 1, "P": 1}
    assert record["formats"] == {"PNG": 50, "JPEG": 3, "GIF": 1}
    assert (record["num_animated"], record["num_rotated"]) == (1, 1)
    turned = inspect_image(more / "turned.jpg", max_pixels=MAX_PIXELS)
    assert (turned.height, turned.width, turned.orientation) == (40, 10, 6)
    assert record["sizes"]["width"]["max"] == 300
    assert record["sizes"]["short_side"][1] == {"low": 9, "high": 16, "count": 2}


def test_the_root_must_be_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", image(tmp_path / "a.png", 0)):
        with pytest.raises(DataError):
            audit(path)
