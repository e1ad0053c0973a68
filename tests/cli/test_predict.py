"""`predict` as it is typed: lines on stdout, lists on stdin, files that go on after an interruption."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bayesnet.types import JsonObject
from bayesnet.workflows import ImageClassifier

RunCli = Callable[..., tuple[int, str, str]]
SENTENCE = "The interval (equal-tailed, contains mean, 256 draws) holds the class probability under the posterior"


@pytest.fixture
def photos(calibrated_run: Path, tmp_path: Path) -> Path:
    """Give a folder of the run's examples, and a file that is no image."""
    folder = Path(shutil.copytree(calibrated_run / "examples", tmp_path / "photos"))
    (folder / "broken.png").write_bytes(b"broken")
    return folder


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Give a function that sets what standard input holds."""

    def hold(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return hold


def test_lines_hold_what_json_holds(run_cli: RunCli, calibrated_run: Path, photos: Path) -> None:
    record = json.loads(run_cli("predict {photos} --run {run} --json", photos=photos, run=calibrated_run)[1])
    code, out, err = run_cli("predict {photos} --run {run} --format jsonl", photos=photos, run=calibrated_run)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert lines == sorted(record["predictions"] + record["skipped"], key=lambda line: line["path"])
    assert err.startswith(SENTENCE)
    code, out, err = run_cli("predict {photos} --run {run} --format csv", photos=photos, run=calibrated_run)
    for row, line in zip(csv.DictReader(io.StringIO(out)), lines, strict=True):
        assert row["path"] == line["path"]
        assert row["reason"] == line.get("reason", "")
        assert row["upper"] == ("" if "reason" in line else repr(line["upper"]))


def test_top5_in_every_form(run_cli: RunCli, calibrated_run: Path, photos: Path) -> None:
    """The five most probable classes, the first one being the label."""
    line = "predict {photos}/*.png --run {run} --classes top5"
    for form in ("--json", "--format jsonl"):
        out = run_cli(f"{line} {form}", photos=photos, run=calibrated_run)[1]
        rows = json.loads(out)["predictions"] if form == "--json" else [json.loads(row) for row in out.splitlines()]
        for row in rows:
            if "reason" not in row:
                assert len(row["classes"]) == 5
                assert row["classes"][0]["name"] == row["label"]
    assert "class_5" in run_cli(f"{line} --format csv", photos=photos, run=calibrated_run)[1]
    assert "classes" in run_cli(line, photos=photos, run=calibrated_run)[1]


def test_a_list_on_standard_input(
    run_cli: RunCli, calibrated_run: Path, photos: Path, stdin: Callable[[bytes], None]
) -> None:
    """A file that is not there is skipped, not the end of a long list."""
    names = [os.fsencode(photos / name) for name in ("test-0001.png", "gone.png", "test-0000.png")]
    for separator, option in ((b"\n", ""), (b"\0", " --null")):
        stdin(separator.join(names))
        code, out, err = run_cli(f"predict - --run {{run}} --format jsonl{option}", run=calibrated_run)
        lines = [json.loads(line) for line in out.splitlines()]
        assert (code, [os.fsencode(line["path"]) for line in lines]) == (0, names)
        assert lines[1]["reason"].startswith("file or folder does not exist (")
    stdin(names[1])
    code, out, err = run_cli("predict - --run {run}", run=calibrated_run)
    assert (code, out) == (3, "")
    assert "no image could be read: file or folder does not exist" in err


@pytest.mark.parametrize("form", ["--json", "--format csv", "--format jsonl", "--out a.csv", ""])
def test_strict(run_cli: RunCli, calibrated_run: Path, photos: Path, form: str) -> None:
    line = f"predict {{photos}} --run {{run}} {form}"
    assert run_cli(line, photos=photos, run=calibrated_run)[0] == 0
    Path("a.csv").unlink(missing_ok=True)
    code, _, err = run_cli(f"{line} --strict", photos=photos, run=calibrated_run)
    assert code == 3
    count = len(list(photos.iterdir()))
    assert f"bayesnet: error: 1 of {count} images could not be read: cannot read the image ({photos}/broken.png" in err


def test_an_interrupted_file_goes_on(
    run_cli: RunCli, calibrated_run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle: exit code 130 and the command that goes on, which needs neither the run nor the images."""
    line = "predict {photos} --run {run} --out {out}"
    code, out, err = run_cli(line, photos=photos, run=calibrated_run, out="whole.jsonl")
    count = len(list(photos.iterdir()))
    assert (code, out) == (0, f"whole.jsonl: {count - 1} predictions, 1 files skipped\n")
    assert "is no promise about the label" in err
    outcomes = ImageClassifier.outcomes

    def interrupted(self: ImageClassifier, paths: Iterator[Path]) -> Iterator[JsonObject]:
        for number, outcome in enumerate(outcomes(self, paths)):
            if number == 3:
                raise KeyboardInterrupt
            yield outcome

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "outcomes", interrupted)
        code, out, err = run_cli(line, photos=photos, run=calibrated_run, out="my rows.jsonl")
    assert (code, out) == (130, "")
    assert "go on with: bayesnet predict --continue --out 'my rows.jsonl'\n" in err
    code, out, err = run_cli(line, photos=photos, run=calibrated_run, out="my rows.jsonl")
    message = "the file of predictions exists (my rows.jsonl): go on with --continue"
    assert (code, out, err) == (2, "", f"bayesnet: error: {message}\n")
    code, out, _ = run_cli("predict --continue --out 'my rows.jsonl'")
    assert (code, out) == (0, f"my rows.jsonl: {count - 1} predictions, 1 files skipped\n")
    assert Path("my rows.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("option", ["--format csv", "--out a.csv"])
def test_json_is_one_object(run_cli: RunCli, calibrated_run: Path, photos: Path, option: str) -> None:
    line = f"predict {{photos}} --run {{run}} --json {option}"
    code, out, err = run_cli(line, photos=photos, run=calibrated_run)
    message = "--json is one object on stdout: give either it or --format and --out: see `bayesnet predict --help`"
    assert (code, err) == (2, f"bayesnet: error: {message}\n")
    assert json.loads(out) == {"error": {"code": 2, "message": message}}
