"""A file of predictions: wherever its writer is stopped, going on gives the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayesnet import locking
from bayesnet.data import DataConfig, load_data
from bayesnet.data.finding import find_images
from bayesnet.data.images import write_png
from bayesnet.errors import BayesnetError, BusyError, CheckpointError, ConfigError, DataError, StorageError
from bayesnet.workflows import ImageClassifier, continue_predictions, predict, predict_to_file

NUM_IMAGES = 70
CHUNK = 32


class StoppedError(Exception):
    """What stops a writer in these tests."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give 70 files in two chunks of 32 and 6 more; the fifth is damaged, and one name is no UTF-8."""
    folder, data = tmp_path_factory.mktemp("images"), load_data(DataConfig())
    paths = [folder / f"{index:03d}.png" for index in range(NUM_IMAGES)]
    paths[40] = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\n.png"))
    for index, path in enumerate(paths):
        write_png(path, data.test.read([index])[0])
    paths[4].write_bytes(b"damaged")
    return paths


@pytest.fixture(scope="module")
def whole(calibrated_run: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Give the bytes of uninterrupted files, by format."""
    folder = tmp_path_factory.mktemp("whole")
    return {form: written(calibrated_run, images, folder / f"out.{form}").read_bytes() for form in ("csv", "jsonl")}


def written(run: Path, images: list[Path], out: Path, **options: Any) -> Path:  # noqa: ANN401 - what it takes
    classifier = ImageClassifier(run, devices="cpu")
    predict_to_file(images, out, classifier, **({"format": out.suffix[1:]} | options))
    return out


def stopped(run: Path, images: list[Path], out: Path, **options: Any) -> Path:  # noqa: ANN401 - what it takes
    """Stop after the first chunk."""

    def stop(done: int, total: int) -> None:
        assert (done, total) == (CHUNK, len(images))
        raise StoppedError

    with pytest.raises(StoppedError):
        written(run, images, out, progress=stop, **options)
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_holds_what_predict_returns(calibrated_run: Path, images: list[Path], whole: dict[str, bytes]) -> None:
    record = predict(images, run=calibrated_run, devices="cpu")
    lines = [json.loads(line) for line in whole["jsonl"].splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in images]
    assert [line for line in lines if "reason" not in line] == record["predictions"]
    assert [line for line in lines if "reason" in line] == record["skipped"]
    assert whole["csv"].count(b"\n") == NUM_IMAGES + 1


def test_the_summary_and_what_is_left_on_the_disk(calibrated_run: Path, images: list[Path], tmp_path: Path) -> None:
    classifier, out = ImageClassifier(calibrated_run, devices="cpu"), tmp_path / "a.csv"
    summary = predict_to_file(images, out, classifier, format="csv")
    assert {key: summary[key] for key in ("file", "run", "model", "num_predictions", "num_skipped")} == {
        "file": str(out),
        "run": str(calibrated_run),
        "model": "bayesian",
        "num_predictions": NUM_IMAGES - 1,
        "num_skipped": 1,
    }
    assert names(tmp_path) == {"a.csv"}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("share", [0.0, 0.0004, 0.07, 0.5, 0.93, 1.0])
def test_going_on_from_any_byte(
    calibrated_run: Path, images: list[Path], whole: dict[str, bytes], tmp_path: Path, form: str, share: float
) -> None:
    """What a kill leaves is the list and some first bytes of the file, or none at all."""
    out = stopped(calibrated_run, images, tmp_path / f"a.{form}")
    out.write_bytes(whole[form][: round(share * len(whole[form]))])
    if share == 0:
        out.unlink()
    summary = continue_predictions(out, devices="cpu")
    assert out.read_bytes() == whole[form]
    assert (summary["num_predictions"], summary["num_skipped"]) == (NUM_IMAGES - 1, 1)
    assert names(tmp_path) == {out.name}


def test_the_folder_may_change_meanwhile(
    calibrated_run: Path, images: list[Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The list was made at the beginning; an image that is gone by its turn is skipped by name."""
    folder = tmp_path / "images"
    shutil.copytree(images[0].parent, folder)
    copies = sorted(folder.iterdir())
    out = stopped(calibrated_run, copies, tmp_path / "a.jsonl")
    (folder / "000-new.png").write_bytes(b"")
    copies[60].unlink()
    assert continue_predictions(out, devices="cpu")["num_skipped"] == 2
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in copies]
    assert lines[60] == {"path": str(copies[60]), "reason": f"file or folder does not exist ({copies[60]})"}


def other_line(out: Path) -> None:
    out.write_bytes(out.read_bytes().replace(b"001.png", b"002.png"))


def no_json(out: Path) -> None:
    out.write_bytes(b"{}\n" + out.read_bytes())


def longer(out: Path) -> None:
    out.write_bytes(out.read_bytes() * 3)


def no_options(out: Path) -> None:
    out.with_name(f"{out.name}.unfinished").write_bytes(b"{}\n")


def no_list(out: Path) -> None:
    path = out.with_name(f"{out.name}.unfinished")
    path.write_bytes(path.read_bytes() + b"[3]\n")


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (other_line, StorageError, "line 2 is not the one that was written"),
        (no_json, StorageError, "line 1 is not the one that was written"),
        (longer, StorageError, "line 33 is not the one that was written"),
        (no_options, CheckpointError, "not a list of images of this version"),
        (no_list, CheckpointError, "the list of images is damaged"),
    ],
)
def test_what_was_changed_is_told_and_left(
    calibrated_run: Path,
    images: list[Path],
    tmp_path: Path,
    change: Callable[[Path], None],
    kind: type[BayesnetError],
    what: str,
) -> None:
    out = stopped(calibrated_run, images, tmp_path / "a.jsonl")
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:CHUNK]))
    change(out)
    before = out.read_bytes()
    with pytest.raises(kind, match=what):
        continue_predictions(out, devices="cpu")
    assert out.read_bytes() == before
    assert names(tmp_path) == {"a.jsonl", "a.jsonl.unfinished"}


def test_another_calibration_or_directory_is_refused(
    calibrated_copy: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped(calibrated_copy, images, tmp_path / "a.csv")
    path = calibrated_copy / "calibration.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="the run has another calibration now"):
        continue_predictions(out, devices="cpu")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"was begun in .*: go there"):
        continue_predictions(out, devices="cpu")


def test_no_file_is_overwritten_or_taken_for_another(calibrated_run: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"exists .*: choose another name"):
        written(calibrated_run, images, tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="the file of predictions is finished"):
        continue_predictions(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "mine"
    with pytest.raises(ConfigError, match="there is no such file of predictions"):
        continue_predictions(tmp_path / "b.csv")
    stopped(calibrated_run, images, tmp_path / "b.csv")
    with pytest.raises(ConfigError, match=r"exists .*: go on with --continue"):
        written(calibrated_run, images, tmp_path / "b.csv")
    with pytest.raises(ConfigError, match="must name a file"):
        continue_predictions(Path())
    with pytest.raises(StorageError, match="cannot write the predictions: No such file or directory"):
        written(calibrated_run, images, tmp_path / "none" / "a.csv")


def test_one_writer_at_a_time(calibrated_run: Path, images: list[Path], tmp_path: Path) -> None:
    out = stopped(calibrated_run, images, tmp_path / "a.csv")
    release = locking.acquire(tmp_path / "a.csv.lock")
    try:
        for action in (lambda: continue_predictions(out), lambda: written(calibrated_run, images, out)):
            with pytest.raises(BusyError, match="file of predictions is in use by process"):
                action()
    finally:
        release()


def test_strict_counts_what_was_skipped_before_the_stop(
    calibrated_run: Path, images: list[Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """All is written before the error, so that nothing has to be done again."""
    out = stopped(calibrated_run, images, tmp_path / "a.jsonl", strict=True)
    with pytest.raises(DataError, match="1 of 70 images could not be read: cannot read the image"):
        continue_predictions(out, devices="cpu")
    assert out.read_bytes() == whole["jsonl"]
    assert names(tmp_path) == {"a.jsonl"}


def test_nothing_but_damaged_files_is_an_error(calibrated_run: Path, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image could be read: cannot read the image"):
        written(calibrated_run, [images[4]], tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().count(b"\n") == 2


def test_a_folder_without_images_begins_nothing(calibrated_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder has no image"):
        predict_to_file(
            find_images([tmp_path / "empty"]),
            tmp_path / "a.csv",
            ImageClassifier(calibrated_run, devices="cpu"),
            format="csv",
        )
    assert names(tmp_path) == {"empty"}
