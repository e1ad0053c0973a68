"""Wrong input: the documented exit code, one line that says what to do, no traceback, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bayesnet.errors import StopRequest
from bayesnet.rundir import RunDirectory

RunCli = Callable[..., tuple[int, str, str]]
Snapshot = Callable[[Path], dict[str, str]]
Refused = Callable[..., str]

PREFIX = "bayesnet: error: "

# Command line, exit code, what the line says. {run} is a calibrated run, {photos} a good folder of images.
USAGE = [
    ("", 2, "Missing command: see `bayesnet --help`"),
    ("trian", 2, "No such command 'trian'. Did you mean 'train'?: see `bayesnet --help`"),
    ("train --epoch 3", 2, "No such option '--epoch'. Did you mean '--epochs'?: see `bayesnet train --help`"),
    ("train --epochs three", 2, "Invalid value for '--epochs': 'three' is not a valid integer"),
    ("predict", 2, "Missing argument 'PATH...': see `bayesnet predict --help`"),
    ("compare", 2, "Missing argument 'RUN...': see `bayesnet compare --help`"),
]
CONFIGURATION = [
    ("train --data digts", 2, "unknown data set (digts): did you mean 'digits'? Known: digits, folder"),
    ("train --data folder", 2, "the data set needs a path (folder): write folder:PATH"),
    ("train --data digits:8", 2, "the data set takes no path (digits:8): write digits"),
    ("train --family mean_feild", 2, "unknown family (mean_feild): did you mean 'mean_field'?"),
    ("train --backbone resnet", 2, "unknown backbone (resnet): did you mean 'resnet50'?"),
    ("train --config digits/mean_feild", 2, "unknown recipe (digits/mean_feild): did you mean 'digits/mean_field'?"),
    ("train --config absent.toml", 2, "cannot read the configuration (absent.toml): "),
    ("train --bayesian --family deterministic", 2, "--bayesian needs a Bayesian family (deterministic): try --family "),
    ("train --set optimizer.learning_rat=1", 2, "did you mean 'optimizer.learning_rate'?"),
    ("train --set optimiser.name=sgd", 2, "unknown configuration section (optimiser): did you mean 'optimizer'?"),
    ("train --set optimizer.name=sdg", 2, "unknown value of optimizer.name (sdg): did you mean 'sgd'?"),
    ("train --set epochs", 2, "cannot read the override (epochs): write section.key=value"),
    ("train --set training.epochs=many", 2, "expected int (training.epochs): got 'many'"),
    ("train --epochs 0", 2, "must be at least 1 (training.epochs = 0)"),
    ("train --seed -1", 2, "must be from 0 to 2^31 - 1 (training.seed = -1)"),
    ("train --set predict.samples=100", 2, "must be a power of two from 1 to 256 (predict.samples = 100)"),
    ("train --resume {run} --epochs 3", 2, "--resume takes its settings from the run ({run}): give only --devices"),
    ("train --resume {run} --bayesian", 2, "--resume takes its settings from the run"),
    ("train --resume {run} --set optimizer.name=sgd", 2, "--resume takes its settings from the run"),
    ("train --resume {run} --seed 0", 2, "--resume takes its settings from the run"),
    ("predict {photos} --run {run} --samples 100", 2, "must be a power of two from 1 to 256 (samples = 100)"),
    ("predict {photos} --run {run} --samples 0", 2, "must be a power of two from 1 to 256 (samples = 0)"),
    ("predict {photos} --run {run} --samples 512", 2, "must be a power of two from 1 to 256 (samples = 512)"),
    ("predict {photos} --run {run} --interval 1", 2, "must lie between 0 and 1 (interval = 1.0)"),
    ("predict {photos} --run {run} --interval 0", 2, "must lie between 0 and 1 (interval = 0.0)"),
    ("predict {photos} --run {run} --interval nan", 2, "must lie between 0 and 1 (interval = nan)"),
    ("predict {photos} --run {run} --format xlsx", 2, "Invalid value for '--format': 'xlsx' is not one of"),
    ("predict {photos} --run {run} --classes top3", 2, "Invalid value for '--classes': 'top3' is not one of"),
    ("predict {photos} --run {run} --out a.txt", 2, "give --format, or end --out in .csv or .jsonl"),
    ("predict {photos} --run {run} --out {run}/config.toml --format csv", 2, "the file of predictions exists ("),
    ("predict {photos} --run {run} --null", 2, "--null is for PATH -, a list on standard input"),
    ("predict - {photos} --run {run}", 2, "- stands alone: the list on standard input can name the other files"),
    ("predict {photos} --run {run} --spreadsheet-safe", 2, "--spreadsheet-safe is for --format csv"),
    ("predict --continue", 2, "--continue needs --out FILE, the file to go on with"),
    ("predict --continue --out a.csv", 2, "there is no such file of predictions (a.csv): begin one with "),
    ("predict {photos} --continue --out a.csv", 2, "--continue takes --out and --devices alone"),
    ("predict --continue --out a.csv --strict", 2, "--continue takes --out and --devices alone"),
    ("predict {photos} --run {run} --model bayes", 2, "no such model, it has deterministic, bayesian (bayes)"),
    ("calibrate {run} --alpha 0", 2, "must lie between 0 and 1 (alpha = 0.0)"),
    ("calibrate {run} --calibrator vectr", 2, "unknown calibrator (vectr): did you mean 'vector'?"),
    ("calibrate {run} --sets lacs", 2, "unknown conformal method (lacs): did you mean 'lac'?"),
    ("calibrate {run} --max-risk 150%", 2, "not a risk between 0 and 1 (150%)"),
    ("calibrate {run} --ood nowhere", 2, "unknown unfamiliar set (nowhere)"),
    ("calibrate {run} --ood {run}/config.toml", 3, "cannot read the image ("),
    ("calibrate {run} --corrupt -3", 2, "must not be negative (num_corrupted = -3)"),
    ("calibrate {run} --alpha 1.5", 2, "must lie between 0 and 1 (alpha = 1.5)"),
    ("export {run} --format tflite", 2, "Invalid value for '--format': 'tflite' is not one of"),
    ("export {run} --model bayes", 2, "no such model, it has deterministic, bayesian (bayes)"),
    ("export {run} --interval 1", 2, "must lie between 0 and 1 (interval = 1.0)"),
    ("export {run} --samples 100", 2, "must be a power of two from 1 to 256 (samples = 100)"),
    ("export {run} --out {photos}", 2, "output directory is not empty ({photos}): choose another --out: only an "),
    ("bench {run} --batch 1", 2, "must be from 2 to 65536 (batch = 1)"),
    ("bench {run} --seconds 0", 2, "must be from 0.1 to 3600 (seconds = 0.0)"),
]
DATA = [
    ("train --data folder:absent", 3, "file or folder does not exist ("),
    ("predict absent.png --run {run}", 3, "file or folder does not exist (absent.png)"),
    ("predict 'absent*' --run {run}", 3, "no image matches (absent*): images are files that end in "),
]
NO_RUN = [
    ("predict {photos} --run absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("calibrate absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("export absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("export {photos}", 4, "not a run directory, it has no config.toml ({photos}): make one with"),
    ("export", 4, "there is no finished run (runs): make one with `bayesnet train`"),
    ("bench absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("compare absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("compare {run} absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("train --resume absent", 4, "run directory does not exist (absent): make one with `bayesnet train`"),
    ("calibrate {photos}", 4, "not a run directory, it has no config.toml ({photos}): make one with"),
    ("predict {photos}", 4, "there is no finished run (runs): make one with `bayesnet train`"),
    ("calibrate", 4, "there is no finished run (runs): make one with `bayesnet train`"),
]
DEVICE = [
    ("train --devices cuda:99", 5, "no such device (cuda:99): this machine has "),
    ("train --devices cpu,cpu", 5, "one device at a time (cpu,cpu): name one, such as --devices cpu"),
    ("predict {photos} --run {run} --devices cuda:99", 5, "no such device (cuda:99): this machine has "),
    ("calibrate {run} --devices cuda:99", 5, "no such device (cuda:99): this machine has "),
    ("bench {run} --devices cpu,cuda:99", 5, "no such device (cuda:99): this machine has "),
    ("bench --devices gpu", 5, "no such device (gpu): this machine has "),
]


@pytest.fixture
def refused(run_cli: RunCli, workplace: Path, snapshot: Snapshot) -> Refused:
    """Give a function that runs a command which must fail and leave nothing; it returns all of stderr."""

    def run(line: str, code: int, text: str, **places: object) -> str:
        before = snapshot(workplace)
        found, out, err = run_cli(line, **places)
        errors = [each for each in err.splitlines() if each.startswith(PREFIX)]
        assert err.splitlines()[-1:] == errors, err
        assert text.format(**places) in errors[0]
        assert (found, out) == (code, "")
        assert "Traceback" not in err
        assert snapshot(workplace) == before
        return err

    return run


@pytest.mark.parametrize(("line", "code", "text"), [*USAGE, *CONFIGURATION, *DATA, *NO_RUN, *DEVICE])
def test_wrong_words(
    refused: Refused, calibrated_run: Path, folder_data: Path, line: str, code: int, text: str
) -> None:
    err = refused(line, code, text, run=calibrated_run, photos=folder_data)
    assert err.count("\n") == 1


def test_json_and_debug(run_cli: RunCli) -> None:
    code, out, err = run_cli("train --data digts --json")
    assert json.loads(out) == {"error": {"code": code, "message": err.removeprefix(PREFIX).removesuffix("\n")}}
    assert code == 2
    code, out, err = run_cli("--debug train --data digts")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.splitlines()[-1].startswith(f"{PREFIX}unknown data set (digts)")


def test_a_bug_is_called_one(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("first\nsecond")

    monkeypatch.setattr("bayesnet.workflows.doctor", broken)
    what = "this is a bug in bayesnet (ValueError: first): run again as `bayesnet --debug ...` and report it"
    assert run_cli("doctor") == (1, "", f"{PREFIX}{what}\n")


OUT_OF_MEMORY = "out of memory: lower training.batch_size, predict.chunk_size or backbone.width"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 5, OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 5, OUT_OF_MEMORY),
        (StopRequest(15), 143, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "some\nwhere"), 6, "Permission denied (some\\nwhere)"),
    ],
)
def test_errors_that_are_not_ours(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr("bayesnet.workflows.doctor", broken)
    assert run_cli("doctor") == (code, "", f"{PREFIX}{text}\n")


def test_folders_that_cannot_be_used(refused: Refused, workplace: Path, tmp_path: Path) -> None:
    empty, single = tmp_path / "empty", tmp_path / "single"
    empty.mkdir()
    (single / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(single / "cat" / "a.png")
    refused("train --data folder:{path}", 3, "found 0 class folders, need at least 2 ({path})", path=empty)
    refused("train --data folder:{path}", 3, "found 1 class folder, need at least 2 ({path})", path=single)
    (single / "dog").mkdir()
    refused("train --data folder:{path}", 3, "class folder has no image ({path}/dog)", path=single)
    refused("predict {path} --run {path}", 4, "not a run directory, it has no config.toml", path=empty)


@pytest.mark.parametrize("name", ["red/00.png", "blue/23.jpg"])
def test_a_corrupt_image_is_named(refused: Refused, folder_copy: Path, name: str) -> None:
    bad = folder_copy / name
    bad.write_bytes(bad.read_bytes()[:-40])
    refused("train --data folder:{photos} --out new", 3, f"cannot read the image ({bad})", photos=folder_copy)


def test_an_out_that_cannot_be_used(refused: Refused, workplace: Path) -> None:
    (workplace / "file").write_text("not a folder")
    (workplace / "full").mkdir()
    (workplace / "full" / "note.txt").write_text("mine")
    refused("train --out file/run", 6, "cannot create the run directory: Not a directory (file/run)")
    refused("train --out full", 2, "output directory is not empty (full): choose another --out, or go on with --resume")


def test_a_busy_run(refused: Refused, calibrated_copy: Path) -> None:
    (calibrated_copy / "summary.json").unlink()
    with RunDirectory.open(calibrated_copy).lock():
        for line in ("train --resume {run}", "calibrate {run}", "train --out {run}"):
            refused(line, 8, "run directory is in use by process", run=calibrated_copy)


def test_corrupt_files_among_good_ones_are_skipped(
    run_cli: RunCli, refused: Refused, calibrated_run: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(calibrated_run / "examples" / "test-0000.png", photos / "good.png")
    (photos / "bad.png").write_bytes(b"GIF89a")
    code, out, err = run_cli("predict {photos} --run {run} --json", photos=photos, run=calibrated_run)
    record = json.loads(out)
    assert code == 0
    assert [row["path"] for row in record["predictions"]] == [str(photos / "good.png")]
    [skipped] = record["skipped"]
    assert skipped["path"] == str(photos / "bad.png")
    assert err == f"skipped {skipped['reason']}\n"
    assert f"cannot read the image ({photos / 'bad.png'})" in err
    (photos / "good.png").unlink()
    refused(
        "predict {photos} --run {run}",
        3,
        "no image could be read: cannot read the image (",
        photos=photos,
        run=calibrated_run,
    )


def test_data_that_changed_after_training(run_cli: RunCli, refused: Refused, folder_copy: Path) -> None:
    line = "train --data folder:{photos} --set backbone.width=4 --epochs 1 --out run"
    assert run_cli(line, photos=folder_copy)[0] == 0
    (folder_copy / "red" / "00.png").unlink()
    refused(
        "calibrate run", 3, "the data set has changed since training (folder:{photos}): restore it", photos=folder_copy
    )
    (Path("run") / "summary.json").unlink()
    refused(
        "train --resume run",
        3,
        "the data set has changed since the run began (folder:{photos}): restore it",
        photos=folder_copy,
    )
