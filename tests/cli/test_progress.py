"""Signals and progress: Ctrl-C and SIGTERM save a checkpoint, say how to go on, and --resume does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bayesnet_cli.progress import TrainProgress

from bayesnet.checkpoint import load_checkpoint
from bayesnet.progress import EpochReport

RunCli = Callable[..., tuple[int, str, str]]

CLI = "from bayesnet_cli.main import main; main()"
TRAIN = "train --bayesian --data folder:{photos} --set backbone.width=4 --set training.batch_size=16 --epochs 2"
ERROR = re.compile(r"^bayesnet: error: interrupted, checkpoint saved \((.+)\): continue with `bayesnet (.+)`\n\Z", re.M)


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, call: int, *signals: int) -> None:
    """Let this process get signals during the given call, from 1, of a method of the training run's listener."""
    original, calls = getattr(TrainProgress, method), iter(range(1, 10_000))

    def patched(self: TrainProgress, *args: object) -> None:
        original(self, *args)
        if next(calls) == call:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.001)  # the handler runs before the next line

    monkeypatch.setattr(TrainProgress, method, patched)


@pytest.fixture
def straight(run_cli: RunCli, folder_data: Path) -> Path:
    """Give the run that nothing interrupted."""
    assert run_cli(f"{TRAIN} --out straight", photos=folder_data)[0] == 0
    return Path("straight").absolute()


def best(run: Path, model: str) -> dict[str, torch.Tensor]:
    summary = json.loads((run / "summary.json").read_text())
    step = summary["models"][model]["step"]
    return load_checkpoint(run / "models" / model / "checkpoints" / f"step-{step:08d}").tensors


# 3 steps per epoch, 2 epochs, 2 models: the last step of the first epoch, the first of the last, the second model.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_a_signal_saves_and_the_command_it_names_goes_on(
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
    folder_data: Path,
    straight: Path,
    number: int,
    code: int,
    step: int,
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt(patch, "on_step", step, number)
        found, out, err = run_cli(f"{TRAIN} --out run", photos=folder_data)
    assert (found, out) == (code, "")
    match = ERROR.search(err)
    assert match, err
    assert (match[1], match[2]) == ("run", "train --resume run")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (Path("run") / "summary.json").exists()

    assert run_cli(f"{match[2]} --json")[0] == 0
    for model in ("deterministic", "bayesian"):
        left, right = best(straight, model), best(Path("run"), model)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_second_signal_ends_at_once(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, folder_data: Path, workplace: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "on_step", 2, signal.SIGINT, signal.SIGTERM)
        code, out, err = run_cli(f"{TRAIN} --out run", photos=folder_data)
    # No checkpoint was there yet, so nothing is kept and nothing is promised.
    assert (code, out, err.splitlines()[-1]) == (143, "", "bayesnet: error: interrupted")
    assert list(workplace.iterdir()) == []
    with monkeypatch.context() as patch:
        interrupt(patch, "on_step", 5, signal.SIGINT, signal.SIGINT)
        code, out, err = run_cli(f"{TRAIN} --out run", photos=folder_data)
    assert (code, out) == (130, "")
    assert ERROR.search(err)
    assert run_cli("train --resume run")[0] == 0


def test_a_signal_before_the_first_step_leaves_nothing(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, folder_data: Path, workplace: Path
) -> None:
    for method in ("on_note", "on_model"):
        with monkeypatch.context() as patch:
            interrupt(patch, method, 1, signal.SIGTERM)
            code, out, err = run_cli(f"{TRAIN} --out run", photos=folder_data)
        assert (code, out, err.splitlines()[-1]) == (143, "", "bayesnet: error: interrupted")
        assert list(workplace.iterdir()) == []


def test_a_signal_after_the_last_epoch_ends_at_once_and_loses_nothing(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, folder_data: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "on_epoch", 4, signal.SIGTERM)
        code, out, err = run_cli(f"{TRAIN} --out run", photos=folder_data)
    assert (code, out) == (143, "")
    assert ERROR.search(err)
    steps: list[object] = []
    monkeypatch.setattr(TrainProgress, "on_step", lambda *args: steps.append(args))
    assert run_cli("train --resume run")[0] == 0
    assert steps == []


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    report = EpochReport(1, 3, 0.5, 20.0, 0.1, 0.4, 0.05, 0.06, 1.0)
    with TrainProgress() as progress:
        progress.on_note("decided\x1b[31m")
        progress.on_model("bayesian", "mean_field")
        progress.on_step(1, 3)
        progress.on_epoch(report, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "bayesian (mean_field)" in err
    assert "decided\\x1b[31m" in err
    assert "KL 20.0 nats  KL/N 0.1000  validation NLL 0.4000  posterior sd 0.0600  1.0 s" in err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_process(tmp_path: Path, number: int, code: int) -> None:
    """A command of its own gets a real signal in the middle of the training of the digits, and goes on after it."""
    arguments = [
        sys.executable,
        "-c",
        CLI,
        "train",
        "--bayesian",
        "--epochs",
        "2",
        "--out",
        "run",
        "--set",
        "backbone.width=8",
    ]
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run" / "models"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, "")
    match = ERROR.search(err)
    assert match, err
    done = subprocess.run(
        [sys.executable, "-c", CLI, *match[2].split(), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["finished"] is True
