"""Image folders: layouts, class names, carved splits, links, and the size that is chosen."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from bayesnet.data import DataConfig, FileExamples, ImageData, Preprocessing, load_data
from bayesnet.data import examples as examples_module
from bayesnet.errors import ConfigError, DataError

MakeFolder = Callable[[Mapping[str, int]], Path]
SPLIT_LAYOUT = {f"{split}/{name}": 3 for split in ("train", "val", "calibration", "test") for name in ("cat", "dog")}


def load(root: Path, config: DataConfig | None = None) -> ImageData:
    config = config or DataConfig()
    return load_data(DataConfig(**{**vars(config), "spec": f"folder:{root}"}))


def names(data: ImageData) -> dict[str, list[str]]:
    """Return 'class/file' of each split, as the labels say."""
    splits = {"train": data.train, "validation": data.validation, "calibration": data.calibration, "test": data.test}
    return {
        split: [f"{data.classes[label]}/{Path(part.name(i)).name}" for i, label in enumerate(part.labels_N.tolist())]
        for split, part in splits.items()
    }


def relative(data: ImageData, root: Path) -> list[str]:
    parts = (data.train, data.validation, data.calibration, data.test)
    return [str(Path(part.name(index)).relative_to(root)) for part in parts for index in range(len(part))]


def test_class_folders_are_carved_into_four(make_folder: MakeFolder) -> None:
    root = make_folder({"cat": 20, "dog": 10})
    data = load(root)
    counts = {split: (sum("cat" in x for x in found), len(found)) for split, found in names(data).items()}
    assert counts == {"train": (12, 18), "validation": (2, 3), "calibration": (2, 3), "test": (4, 6)}
    assert sorted(relative(data, root)) == sorted(
        f"{name}/{i}.png" for name, n in (("cat", 20), ("dog", 10)) for i in range(n)
    )
    for part in (data.train, data.validation, data.calibration, data.test):
        for index, label in enumerate(part.labels_N.tolist()):
            assert Path(part.name(index)).parent.name == data.classes[label]
    assert data.notes == (
        "There is no folder for validation, calibration and test: carved from the training images by class and "
        "seed 0 (18 train, 3 validation, 3 calibration, 6 test).",
        "Images are 10 x 8 pixels and are used as they are.",
    )
    assert (data.name, data.spec, data.classes) == ("folder", f"folder:{root}", ("cat", "dog"))
    assert data.preprocessing.shape == (3, 10, 8)


def test_carving_is_stable_and_follows_the_seed(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({"cat": 20, "dog": 10})
    first = load(root)
    assert names(load(root)) == names(first)
    assert names(load(root, DataConfig(seed=1))) != names(first)
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    assert relative(load(moved), moved) == relative(first, root)
    assert hashlib.sha256("\n".join(relative(first, root)).encode()).hexdigest()[:16] == "d9f5d7ea56d1b558"
    assert load(moved).fingerprint == first.fingerprint


def test_split_folders_are_used(make_folder: MakeFolder) -> None:
    root = make_folder(SPLIT_LAYOUT)
    data = load(root)
    every = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert names(data) == {"train": every, "validation": every, "calibration": every, "test": every}
    assert Path(data.validation.name(0)).parent == root / "val" / "cat"
    assert data.notes == ("Images are 10 x 8 pixels and are used as they are.",)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_what_is_missing_is_carved_in_proportion(make_folder: MakeFolder, name: str) -> None:
    data = load(make_folder({"Train/a": 16, "Train/b": 16, f"{name}/a": 2, f"{name}/b": 1}))
    # 60/10/20 of what train has, since validation is given
    sizes = [len(part) for part in (data.train, data.validation, data.calibration, data.test)]
    assert sizes == [22, 3, 4, 6]
    assert data.notes[0].startswith("There is no folder for calibration and test: carved from the training images")


def test_a_class_may_be_called_train(make_folder: MakeFolder) -> None:
    assert load(make_folder({"train": 10, "plane": 10})).classes == ("plane", "train")


def test_classes_are_matched_by_name(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 8, "train/b": 8, "train/c": 8, "val/c": 2, "val/a": 1, "test/b": 3})
    data = load(root)
    assert names(data)["validation"] == ["a/0.png", "c/0.png", "c/1.png"]
    assert data.test.labels_N.tolist() == [1, 1, 1]
    assert data.notes[:2] == (
        "The validation folder has no image of b.",
        "The test folder has no image of a, c.",
    )
    (root / "test" / "zebra").mkdir()
    (root / "test" / "b").rename(root / "test" / "B")
    Image.new("RGB", (8, 8)).save(root / "test" / "zebra" / "1.png")
    with pytest.raises(DataError, match=r"test has other classes than train \(.*\): \+B, \+zebra, -a, -b, -c"):
        load(root)


def test_natural_order_and_hidden_folders(make_folder: MakeFolder) -> None:
    data = load(make_folder({"10": 6, "2": 6, "1": 6, ".ipynb_checkpoints": 3}))
    assert data.classes == ("1", "2", "10")


def test_sub_folders_of_a_class_and_other_files(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 6, "a/more": 2, "b": 8, "b/.cache": 4})
    (root / "a" / "notes.txt").touch()
    (root / "a" / "Thumbs.db").touch()
    (root / "README").touch()
    data = load(root)
    assert len(relative(data, root)) == 16
    assert data.notes[:2] == (
        "Passed over files beside the folders: 1, the first is README.",
        "Passed over files that are not images: 2, the first is a/Thumbs.db.",
    )


def test_folders_beside_the_splits_are_mentioned(make_folder: MakeFolder) -> None:
    root = make_folder(SPLIT_LAYOUT | {"extra": 2})
    assert load(root).notes[0] == "Passed over folders beside the splits: 1, the first is extra."


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, r"found 0 class folders, need at least 2 \(.*photos\): make one sub-folder of images per class"),
        ({"a": 9}, r"found 1 class folder, need at least 2"),
        ({"a": 9, "b": 0}, r"class folder has no image \(.*/b\)"),
        ({"a": 9, "b": 5}, r"class has 5 images, too few for one in each of 4 splits \(b\): add images"),
        ({"val/a": 9, "test/a": 5}, r"there are splits but no train folder \(.*\): found test, val"),
        (SPLIT_LAYOUT | {"valid/cat": 1}, r"two folders for the validation split \(.*/valid\): the other is val"),
        ({"train/a": 9, "train/b": 9, "test": 0}, r"the test folder has no class folder"),
    ],
)
def test_unusable_folders(make_folder: MakeFolder, counts: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(make_folder(counts))


def test_missing_folder_and_file_instead_of_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file or folder does not exist \(.*gone\)"):
        load(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"not a folder \(.*file\): give a folder with one sub-folder"):
        load(tmp_path / "file")


def test_link_loops_add_nothing(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 8, "b": 8, "b/deep": 2})
    (root / "a" / "loop").symlink_to("..")
    (root / "a" / "other_class").symlink_to("../b/deep")
    (root / "b" / "again").symlink_to("deep")
    data = load(root)
    assert len(relative(data, root)) == len(set(relative(data, root))) == 18
    assert data.notes[0] == "Passed over links to folders: 3, the first is a/loop."


@pytest.mark.parametrize("target", ["folder", "file", "class"])
def test_links_out_of_the_root_are_refused(make_folder: MakeFolder, tmp_path: Path, target: str) -> None:
    root = make_folder({"a": 8, "b": 8})
    outside = tmp_path / "photos_outside"  # begins with the root's name
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "1.png")
    link = {"folder": root / "a" / "x", "file": root / "a" / "x.png", "class": root / "x"}[target]
    link.symlink_to(outside / "1.png" if target == "file" else outside)
    with pytest.raises(DataError, match=rf"link leads out of the data folder \({link}\)"):
        load(root)


def test_links_inside_the_root_work_and_no_file_counts_twice(make_folder: MakeFolder) -> None:
    root = make_folder(SPLIT_LAYOUT | {"pool": 1})
    (root / "train" / "cat" / "linked.png").symlink_to("../../pool/0.png")
    assert "cat/linked.png" in names(load(root))["train"]
    (root / "train" / "cat" / "twice.png").symlink_to("linked.png")
    data = load(root)
    assert len(data.train) == 7
    assert "Passed over links to a file of the same class: 1, the first is train/cat/twice.png." in data.notes
    (root / "test" / "cat" / "leak.png").symlink_to("../../pool/0.png")
    with pytest.raises(DataError, match=r"the same file as .*train/cat/linked.png \(.*test/cat/leak.png\)"):
        load(root)


def test_a_linked_class_folder_is_no_second_class(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 8, "b": 8})
    (root / "c").symlink_to("a")
    with pytest.raises(DataError, match=r"the same file as .*/a/0.png \(.*/c/0.png\)"):
        load(root)


def test_dead_links_and_pipes_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 8, "b": 8})
    (root / "a" / "dead.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"link leads nowhere \(.*dead.png\)"):
        load(root)
    (root / "a" / "dead.png").unlink()
    os.mkfifo(root / "a" / "pipe.png")
    with pytest.raises(DataError, match=r"not a regular file \(.*pipe.png\)"):
        load(root)


def test_names_that_are_not_utf8(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 8, "b": 8})
    name = os.fsdecode(b"\xff\xfe\n")
    (root / "b").rename(root / name)
    (root / "a" / "0.png").rename(root / "a" / f"{name}.png")
    data = load(root)
    assert data.classes == ("a", name)
    data.train.verify()
    (root / "a" / f"{name}.txt").touch()
    again = load(root)
    assert again.fingerprint == data.fingerprint
    assert again.notes[0].endswith(r"the first is a/\udcff\udcfe\n.txt.")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(20, 30)], (20, 30)),  # height, width
        ([(224, 8)], (224, 8)),
        ([(4, 30)], (8, 8)),
        ([(300, 400)], (224, 224)),
        ([(50, 90), (70, 60), (61, 61)], (56, 56)),  # median of 50, 60, 61 (a third each) is 60
    ],
)
def test_automatic_size(tmp_path: Path, sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(30):
            height, width = sizes[index % len(sizes)]
            Image.new("RGB", (width, height), "red").save(tmp_path / name / f"{index:02}.png")
    data = load(tmp_path)
    assert data.preprocessing.shape == (3, *expected)
    assert f"{expected[0]} x {expected[1]} pixels" in data.notes[-1]


def test_chosen_size_channels_and_limits(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 8, "b": 8})
    data = load(root, DataConfig(image_size=16, channels=1, max_pixels=80))
    assert data.preprocessing.shape == (1, 16, 16)
    assert data.preprocessing.max_pixels == 80
    assert data.notes[-1] == "Images are scaled to 16 x 16 pixels (data.image_size)."
    with pytest.raises(DataError, match=r"it has 80 pixels; if you trust it, raise data.max_pixels above 79"):
        load(root, DataConfig(max_pixels=79))
    with pytest.raises(ConfigError, match=r"must be below the image side, 8 \(data.crop_padding\)"):
        load(root, DataConfig(crop_padding=8))


def test_preset_of_imagenet(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder({"a": 8, "b": 8})
    with monkeypatch.context() as patch:
        patch.setattr(examples_module, "read_image", None)  # nothing is decoded: the statistics are given
        data = load(root, DataConfig(preset="imagenet", max_pixels=80))
    assert data.preprocessing == Preprocessing(
        3, 224, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), max_pixels=80, resize=256
    )
    assert data.notes[-1] == (
        "Images are scaled to a short side of 256 and cropped to 224 x 224 pixels, with the statistics of ImageNet "
        "(data.preset)."
    )
    assert data.train.read([0]).shape == (1, 3, 224, 224)
    automatic, none = load(root), load(root, DataConfig(preset="none"))
    assert automatic.preprocessing == none.preprocessing
    assert (none.preprocessing.shape, none.preprocessing.resize) == ((3, 10, 8), 0)


def test_statistics_are_those_of_the_training_split(make_folder: MakeFolder) -> None:
    data = load(make_folder({"a": 10, "b": 10}))
    x_BCHW = data.preprocessing.normalize(data.train.read(range(len(data.train))))
    torch.testing.assert_close(x_BCHW.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x_BCHW.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_preprocessing_of_a_run_is_used_unchanged(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder({"a": 10, "b": 10})
    given = load(root, DataConfig(image_size=16)).preprocessing
    monkeypatch.setattr(examples_module, "read_image", None)  # nothing is decoded
    data = load_data(DataConfig(spec=f"folder:{root}"), given)
    assert data.preprocessing is given


def test_only_training_pixels_are_decoded_on_loading(make_folder: MakeFolder) -> None:
    root = make_folder(SPLIT_LAYOUT)
    for split in ("val", "calibration", "test"):
        (root / split / "cat" / "1.png").write_bytes(b"damaged")
    data = load(root)
    for part in (data.validation, data.calibration, data.test):
        with pytest.raises(DataError, match=r"cannot read the image \(.*cat/1.png\)"):
            part.verify()
    data.train.verify()


def test_cache_is_shared_by_the_splits(make_folder: MakeFolder) -> None:
    root = make_folder(SPLIT_LAYOUT)  # six images per split
    images_per_megabyte = DataConfig(image_size=256, cache_megabytes=3)  # 196,608 bytes each: 15 images
    data = load(root, images_per_megabyte)
    parts = (data.train, data.validation, data.calibration, data.test)
    assert [part.cached for part in parts if isinstance(part, FileExamples)] == [True, True, False, False]


def test_fingerprint_changes_with_the_data(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 10, "b": 10})
    seen = [load(root).fingerprint, load(root, DataConfig(seed=1)).fingerprint]
    assert load(root, DataConfig(image_size=32, cache_megabytes=0)).fingerprint == seen[0]
    (root / "a" / "0.png").write_bytes((root / "a" / "0.png").read_bytes() + b"x")
    seen.append(load(root).fingerprint)
    (root / "a" / "0.png").rename(root / "a" / "00.png")
    seen.append(load(root).fingerprint)
    (root / "b").rename(root / "c")
    seen.append(load(root).fingerprint)
    (root / "a" / "1.png").unlink()
    seen.append(load(root).fingerprint)
    assert len(set(seen)) == 6


def test_spec_is_absolute_and_keeps_colons(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({"a": 8, "b": 8}).rename(tmp_path / "x:y")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data(DataConfig(spec="folder:x:y")).spec == f"folder:{root}"
    assert load_data(DataConfig(spec="folder:~/x:y")).spec == f"folder:{root}"
    with pytest.raises(ConfigError, match=r"cannot find the home folder \(~nobody-of-that-name/x\)"):
        load_data(DataConfig(spec="folder:~nobody-of-that-name/x"))
    with pytest.raises(DataError, match="embedded null"):
        load_data(DataConfig(spec="folder:a\0b"))
