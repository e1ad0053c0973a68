"""What a person sees: a session from a folder of images to predictions, and what each command promises to show."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunCli = Callable[..., tuple[int, str, str]]

SMALL = "--set backbone.width=8 --set training.batch_size=16 --epochs 3 --devices cpu"
CLI = "from bayesnet_cli.main import main; main()"


def squeezed(text: str) -> str:
    """Return the text with runs of blanks and table lines as one blank each."""
    return re.sub(r"[\s│┃]+", " ", text)


def test_a_session(run_cli: RunCli, folder_data: Path, workplace: Path) -> None:
    """Train, calibrate, predict, compare and bench, each run found by default."""
    code, out, err = run_cli(f"train --bayesian --data folder:{{photos}} {SMALL}", photos=folder_data)
    assert code == 0
    [run] = (workplace / "runs").iterdir()
    shown = f"runs/{run.name}"
    assert out.startswith("folder: 3 classes; images: ")
    assert "95 % intervals in brackets" in out
    assert re.search(r"┃ +deterministic \(deterministic\) ┃ +bayesian \(mean_field\) ┃", out)
    for label in ("accuracy", "NLL (nats)", "Brier", "ECE", "AURC", "training seconds"):
        assert re.search(rf"│ {re.escape(label)} +│ +[0-9].*│ +[0-9].*│", out), label
    assert re.search(r"KL [0-9.]+ nats, KL/N [0-9.]+; median posterior sd [0-9.]+ -> [0-9.]+\n", out)
    tail = f"run: {shown}\nnext: bayesnet calibrate {shown}\n      bayesnet predict FILE_OR_FOLDER --run {shown}\n"
    assert out.endswith(tail)
    epochs = [line for line in err.splitlines() if " epoch " in line]
    assert [line.split()[:3] for line in epochs] == [
        [name, "epoch", f"{epoch}/3"] for name in ("deterministic", "bayesian") for epoch in (1, 2, 3)
    ]
    assert all(("KL/N" in line) == line.startswith("bayesian") for line in epochs)
    assert "carved from the training images" in err

    assert "not calibrated: run `bayesnet calibrate`" in run_cli("predict {photos}", photos=folder_data)[1]
    code, out, err = run_cli("calibrate")
    record = json.loads((run / "calibration.json").read_text())
    assert (code, err) == (0, "")
    assert "after (T = " in out
    assert "ECE if perfect" in out
    assert "label sets (lac) at 90%: coverage " in out
    assert out.endswith(f"report: {shown}/report.html\n{record['sentence']}\n")
    assert (run / "report.html").stat().st_size > 1000
    assert "label sets (lac) at 99.9%: " in run_cli("calibrate --alpha 0.001 --ood none --corrupt 0")[1]
    assert (run / "plots" / "reliability.png").read_bytes().startswith(b"\x89PNG")

    code, out, err = run_cli("predict {photos} --json", photos=folder_data)
    rows = json.loads(out)["predictions"]
    right = [Path(row["path"]).parent.name == row["label"] for row in rows]
    assert len(right) == 72
    assert sum(right) > 36
    assert all(row["label"] in row["set"] or not row["set"] for row in rows)

    code, out, _ = run_cli("compare {run}", run=run)
    assert (code, out.count("mean_field), calibrated"), out.count("bayesian (mean_field)")) == (0, 1, 2)


def test_predictions_say_what_the_interval_is(run_cli: RunCli, calibrated_run: Path) -> None:
    code, out, err = run_cli("predict {run}/examples/test-0000.png --run {run} --interval 0.8", run=calibrated_run)
    assert (code, err) == (0, "")
    text = squeezed(out)
    for header in ("image", "label", "probability", "80% interval", "entropy", "mutual inf.", "set"):
        assert header in text
    assert f"bayesian model of {calibrated_run}, calibrated\n" in out
    assert re.search(
        r"The interval \(equal-tailed, contains mean, 256 draws, widened for \d+% of the labels\) holds the class "
        r"probability under the posterior; it is no promise about the label\. Entropies in nats\.\n",
        out,
    )


def test_few_draws_are_said_to_be_coarse(run_cli: RunCli, calibrated_run: Path) -> None:
    code, out, err = run_cli("predict {run}/examples --run {run} --samples 16 --json", run=calibrated_run)
    assert (code, err) == (0, "16 draws: intervals are coarse below 128\n")
    assert json.loads(out)["interval"]["kind"] == "range of 16 draws"


def test_a_bench_shows_both_models_and_the_control(run_cli: RunCli, calibrated_run: Path) -> None:
    code, out, err = run_cli("bench {run} --devices cpu --seconds 0.1 --batch 8", run=calibrated_run)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:6]] for line in out.splitlines() if line.startswith("│ cpu")]
    assert rows == [
        ["cpu", "train", "deterministic (deterministic)", "8", "1"],
        ["cpu", "train", "bayesian (mean_field)", "8", "1"],
        ["cpu", "predict", "deterministic (deterministic)", "8", "1"],
        ["cpu", "predict", "bayesian (mean_field)", "8", "256"],
    ]
    assert out.count("the twin against itself") == 2


def test_doctor(run_cli: RunCli) -> None:
    code, out, err = run_cli("doctor")
    assert err == ""
    for name in ("packages", "python", "recipes", "arithmetic", "disk", "runs"):
        assert re.search(rf"^(ok  |FAIL) {name}: ", out, re.MULTILINE), name
    codes = {"packages": 2, "python": 2, "recipes": 2, "arithmetic": 5, "disk": 6, "runs": 6}
    failed = re.findall(r"^FAIL (\w+)", out, re.MULTILINE)
    assert code == (codes[failed[0]] if failed else 0)


def test_hostile_names_drive_no_terminal(run_cli: RunCli, folder_copy: Path) -> None:
    for name in ("red", "green"):
        (folder_copy / name).rename(folder_copy / f"{name}\x1b[31m\nbayesnet: error: \x07")
    bad = folder_copy / "blue" / "a\x1b]0;title\x07.png"
    bad.write_bytes(b"no image")
    train = f"train --data folder:{{photos}} {SMALL} --out run"
    code, _, shown = run_cli(train, photos=folder_copy)
    assert code == 3
    bad.unlink()
    for line in (train, "calibrate run", "predict {photos} --run run", "compare run"):
        code, out, err = run_cli(line, photos=folder_copy)
        assert code == 0
        shown += out + err
    assert "\\x1b[31m\\nbayesnet: error: \\x07" in shown
    assert {character for character in shown if not character.isprintable()} == {"\n"}


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train --help",
        "trian --json",
        pytest.param("predict {run}/examples --run {run}", marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_goes_away_is_no_bug(calibrated_run: Path, line: str) -> None:
    """As in `bayesnet predict ... | head -1`: no traceback, and the exit code that shells give a broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-c", CLI, *line.format(run=calibrated_run).split()]
    try:
        done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_the_console_script(tmp_path: Path) -> None:
    script = shutil.which("bayesnet", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True)
    assert done.stdout.startswith("bayesnet, version ")
