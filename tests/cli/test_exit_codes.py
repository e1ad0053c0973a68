"""The exit codes of the contract, 0 to 8, 130 and 143, each with its line; and data sets at the edge of too small."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bayesnet import storage
from bayesnet.engine import available_devices
from bayesnet.errors import StopRequest
from bayesnet.rundir import RunDirectory

RunCli = Callable[..., tuple[int, str, str]]
Snapshot = Callable[[Path], dict[str, str]]
MakeFolder = Callable[[Mapping[str, int]], Path]

PREFIX = "bayesnet: error: "
TRAIN = "train --bayesian --data folder:{photos} --set backbone.width=4 --epochs 1 --devices cpu --out run"
EVERY_SPLIT = {f"{split}/{name}": 1 for split in ("train", "val", "calibration", "test") for name in ("cat", "dog")}


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Give a function that fills a folder: 'train/cat' -> 3 makes three 8 x 8 PNG files there, cats bright."""

    def make(counts: Mapping[str, int]) -> Path:
        rng = np.random.default_rng(0)
        for name, count in counts.items():
            folder = tmp_path / "photos" / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 128, (8, 8, 3), dtype=np.uint8) + 127 * name.endswith("cat")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        return tmp_path / "photos"

    return make


def raising(error: BaseException) -> Callable[..., None]:
    def broken(*arguments: object, **named: object) -> None:
        raise error

    return broken


# One test for each code, in the order of the contract.


def test_0_and_1_success_and_a_bug(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, calibrated_run: Path) -> None:
    code, _, err = run_cli("compare {run}", run=calibrated_run)
    assert (code, err) == (0, "")
    monkeypatch.setattr("bayesnet.workflows.compare", raising(KeyError("a")))
    line = f"{PREFIX}this is a bug in bayesnet (KeyError: 'a'): run again as `bayesnet --debug ...` and report it\n"
    assert run_cli("compare {run}", run=calibrated_run) == (1, "", line)


EXACT = [
    ("calibrate --alpha much", 2, "Invalid value for '--alpha': 'much' is not a valid float: {usage}"),
    ("compare absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("train --devices cpu,", 5, "empty device name ('cpu,'): this machine has {devices}"),
]


@pytest.mark.parametrize(("line", "code", "text"), EXACT)
def test_2_4_5_usage_runs_and_devices(run_cli: RunCli, workplace: Path, line: str, code: int, text: str) -> None:
    places = {"devices": ", ".join(available_devices()), "usage": "see `bayesnet calibrate --help`"}
    assert run_cli(line) == (code, "", f"{PREFIX}{text.format(**places)}\n")
    assert list(workplace.iterdir()) == []


def test_3_data(run_cli: RunCli, workplace: Path) -> None:
    text = f"file or folder does not exist ({workplace / 'gone'})"
    code, out, err = run_cli("train --data folder:gone")
    assert (code, out) == (3, "")
    assert err.startswith(PREFIX + text)
    assert err.count("\n") == 1


def test_6_storage_while_training(
    run_cli: RunCli, workplace: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up as the first checkpoint is written."""
    real = storage.write_new

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(storage, "write_new", full)
    code, out, err = run_cli(TRAIN, photos=make_folder(EVERY_SPLIT))
    assert (code, out) == (6, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"{PREFIX}cannot save the checkpoint: No space left on device (run/")
    assert "Traceback" not in err
    assert not list(workplace.rglob(".tmp-*"))


def test_7_diverged(run_cli: RunCli, make_folder: MakeFolder) -> None:
    line = f"{TRAIN} --set optimizer.learning_rate=1e30 --set optimizer.warmup_epochs=0 --epochs 9"
    code, out, err = run_cli(line, photos=make_folder({"cat": 20, "dog": 20}))
    assert (code, out) == (7, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"{PREFIX}training diverged (epoch ")
    assert last.endswith("or what else is large; raise optimizer.warmup_epochs; earlier checkpoints are kept")


def test_8_busy(run_cli: RunCli, calibrated_copy: Path) -> None:
    with RunDirectory.open(calibrated_copy).lock():
        code, out, err = run_cli("calibrate {run}", run=calibrated_copy)
    assert (code, out) == (8, "")
    assert err.startswith(f"{PREFIX}run directory is in use by process")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("signal_number", "code"), [(2, 130), (15, 143)])
@pytest.mark.parametrize("command", ["predict", "calibrate", "compare", "bench"])
def test_130_143_where_nothing_is_saved(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, calibrated_run: Path, command: str, signal_number: int, code: int
) -> None:
    name = "predict_images" if command == "predict" else command
    monkeypatch.setattr(f"bayesnet.workflows.{name}", raising(StopRequest(signal_number)))
    line = f"{command} {{run}}/examples --run {{run}} --json" if command == "predict" else f"{command} {{run}} --json"
    found, out, err = run_cli(line, run=calibrated_run)
    assert (found, err) == (code, f"{PREFIX}interrupted\n")
    assert json.loads(out) == {"error": {"code": code, "message": "interrupted"}}


# Data sets that are too small, and those that are just large enough.


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_images_for_four_splits(run_cli: RunCli, workplace: Path, make_folder: MakeFolder, count: int) -> None:
    hint = "add images, give the splits as folders of their own, or change data.fractions"
    text = f"class has {count} image{'s' * (count > 1)}, too few for one in each of 4 splits (cat): {hint}"
    found = run_cli(TRAIN, photos=make_folder({"cat": count, "dog": count}))
    assert found == (3, "", f"{PREFIX}{text}\n")
    assert list(workplace.iterdir()) == []


def test_test_folders_that_are_not_the_training_classes(
    run_cli: RunCli, workplace: Path, make_folder: MakeFolder
) -> None:
    photos = make_folder({"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/zebra": 2})
    line = f"{PREFIX}test has other classes than train ({photos}): +zebra, -dog\n"
    assert run_cli(TRAIN, photos=photos) == (3, "", line)
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"cat": 1}, "found 1 class folder, need at least 2 ({photos}): make one sub-folder of images per class"),
        ({"cat": 3, "dog": 0}, "class folder has no image ({photos}/dog): remove it or put images into it"),
        (
            {"train/cat": 3, "train/dog": 0, "test/cat": 1},
            "class folder has no image ({photos}/train/dog): remove it or put images into it",
        ),
        ({"train/cat": 3, "test/cat": 1}, "found 1 class folder, need at least 2 ({photos}): make one "),
    ],
)
def test_one_class_or_an_empty_one(run_cli: RunCli, make_folder: MakeFolder, counts: dict[str, int], line: str) -> None:
    photos = make_folder(counts)
    code, out, err = run_cli(TRAIN, photos=photos)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert err.startswith(PREFIX + line.format(photos=photos))


@pytest.mark.parametrize(
    ("num_cats", "batch_size"), [(2, 2), (1, 1000)], ids=["a last batch of one", "a batch larger than the data"]
)
def test_one_image_of_each_class_in_each_split(
    run_cli: RunCli, make_folder: MakeFolder, num_cats: int, batch_size: int
) -> None:
    """The smallest data set there is goes all the way, and calibration says that it cannot promise anything."""
    photos = make_folder(EVERY_SPLIT | {"train/cat": num_cats})
    code, out, _ = run_cli(f"{TRAIN} --set training.batch_size={batch_size} --json", photos=photos)
    assert code == 0
    nlls = [model["nll"] for model in json.loads(out)["models"].values()]
    assert len(nlls) == 2
    assert np.isfinite(nlls).all()
    code, out, err = run_cli("calibrate run")
    assert (code, err) == (0, "")
    assert "1 calibration image is too few for alpha 0.1 (at least 9): every set holds all classes" in out
    assert "Too few test errors to compare the two models" in out
    code, out, _ = run_cli("predict {photos}/test/cat/0.png --run run --json", photos=photos)
    [row] = json.loads(out)["predictions"]
    assert code == 0
    assert sorted(row["set"]) == ["cat", "dog"]


def test_a_test_split_without_a_class(run_cli: RunCli, make_folder: MakeFolder) -> None:
    counts = {name: count for name, count in EVERY_SPLIT.items() if name != "test/dog"}
    code, _, err = run_cli(TRAIN, photos=make_folder(counts))
    assert code == 0
    assert "The test folder has no image of dog." in err


def test_an_image_of_one_pixel(run_cli: RunCli, calibrated_run: Path, tmp_path: Path) -> None:
    Image.new("L", (1, 1), 255).save(tmp_path / "dot.png")
    code, out, _ = run_cli("predict {photo} --run {run} --json", photo=tmp_path / "dot.png", run=calibrated_run)
    [row] = json.loads(out)["predictions"]
    assert code == 0
    assert sum(each["probability"] for each in row["classes"]) == pytest.approx(1)


def test_a_folder_without_images(run_cli: RunCli, calibrated_run: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    shutil.copy(calibrated_run / "classes.json", tmp_path / "none" / "notes.txt")
    code, out, err = run_cli("predict {photos} --run {run}", photos=tmp_path / "none", run=calibrated_run)
    assert (code, out, err.count("\n")) == (3, "", 1)
