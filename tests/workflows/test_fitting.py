"""Taking up a run again: from the newest checkpoint that is valid, to the very same end, every epoch on record once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnet import workflows
from bayesnet.checkpoint import newest_checkpoint
from bayesnet.errors import CheckpointError, InterruptedRunError
from bayesnet.progress import EpochReport
from bayesnet.rundir import RunDirectory
from bayesnet.workflows import TrainListener

SMALL = ("backbone.width=4", "training.batch_size=16")
MODELS = ("deterministic", "bayesian")


class Notes(TrainListener):
    """Remembers what it is told, and counts steps."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0

    def on_note(self, text: str) -> None:
        """Remember."""
        self.notes.append(text)

    def on_step(self, step: int, num_steps: int) -> None:
        """Count."""
        self.steps += 1


def train(folder: Path, out: Path, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - what train takes
    defaults = {"bayesian": True, "data": f"folder:{folder}", "epochs": 2, "devices": "cpu", "overrides": SMALL}
    return workflows.train(**{**defaults, **arguments}, out=out)


def interrupted(folder: Path, out: Path, step: int) -> None:
    """Start a run that ends after so many steps in all."""
    calls = iter(range(1, 10**6))
    with pytest.raises(InterruptedRunError) as caught:
        train(folder, out, stop_signal=lambda: 15 if next(calls) == step else None)
    line = f"interrupted, checkpoint saved ({out}): continue with `bayesnet train --resume {out}`"
    assert str(caught.value) == line


def newest(run: Path, name: str) -> dict[str, Tensor]:
    checkpoint, _ = newest_checkpoint(run / "models" / name / "checkpoints")
    assert checkpoint is not None
    return checkpoint.tensors


def metric_lines(run: Path) -> list[tuple[str, int]]:
    return [(line["model"], line["epoch"]) for line in RunDirectory(run).read_metrics()]


@pytest.fixture(scope="module")
def straight(folder_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the run that nothing interrupted. Do not write to it."""
    path = tmp_path_factory.mktemp("runs") / "straight"
    train(folder_data, path)
    return path


# 3 steps an epoch, 2 epochs, 2 models: in the first epoch, at an epoch's end, and in the second model.
@pytest.mark.parametrize("step", [1, 3, 6, 9])
def test_a_resumed_run_ends_as_the_straight_one(straight: Path, folder_data: Path, tmp_path: Path, step: int) -> None:
    interrupted(folder_data, tmp_path / "run", step)
    listener = Notes()
    resumed = workflows.train(resume=tmp_path / "run", listener=listener)
    assert listener.steps == 12 - step
    expected = json.loads((straight / "summary.json").read_text())
    for name in MODELS:
        left, right = newest(straight, name), newest(tmp_path / "run", name)
        assert all(torch.equal(left[key], right[key]) for key in left)
        same = set(expected["models"][name]) - {"seconds", "digest"}
        assert {key: expected["models"][name][key] for key in same} == {
            key: resumed["models"][name][key] for key in same
        }
    assert metric_lines(straight) == metric_lines(tmp_path / "run")


def test_a_crash_between_checkpoint_and_metrics_is_repaired(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: RunDirectory, record: dict[str, Any]) -> None:
        raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_metrics", crash)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(folder_data, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    workflows.train(resume=tmp_path / "run")
    assert metric_lines(tmp_path / "run") == [(name, epoch) for name in MODELS for epoch in (1, 2)]


def test_a_metrics_line_ahead_of_the_checkpoint_is_dropped(folder_data: Path, tmp_path: Path) -> None:
    """The newest checkpoint is damaged, so the one before it counts, and epoch 2 is trained again."""
    run = tmp_path / "run"
    straight = train(folder_data, run)
    (run / "summary.json").unlink()
    [damaged] = (run / "models" / "bayesian" / "checkpoints").glob("step-*6")
    (damaged / "state.json").write_text("{}")
    listener = Notes()
    resumed = workflows.train(resume=run, listener=listener)
    assert listener.notes[-1].startswith("passed over step-00000006: size differs")
    assert listener.steps == 3
    assert metric_lines(run) == [(name, epoch) for name in MODELS for epoch in (1, 2)]
    assert resumed["models"]["bayesian"]["nll"] == straight["models"]["bayesian"]["nll"]


@pytest.mark.parametrize(("old", "new"), [("momentum = 0.9", "momentum = 0.8"), ("width = 4", "width = 8")])
def test_a_run_goes_on_with_its_own_settings_alone(folder_data: Path, tmp_path: Path, old: str, new: str) -> None:
    interrupted(folder_data, tmp_path / "run", 2)
    config = tmp_path / "run" / "config.toml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match="the checkpoint was made with other settings"):
        workflows.train(resume=tmp_path / "run")


def test_reports_reach_the_listener_when_they_are_on_record(folder_data: Path, tmp_path: Path) -> None:
    class Checking(TrainListener):
        """Looks into metrics.jsonl at each report."""

        reports: list[EpochReport] = []  # noqa: RUF012 - one instance

        def on_epoch(self, report: EpochReport, num_epochs: int) -> None:
            """Compare."""
            line = RunDirectory(tmp_path / "run").read_metrics()[-1]
            assert line == {"model": line["model"], **report._asdict()}
            self.reports.append(report)

    train(folder_data, tmp_path / "run", listener=Checking())
    assert [report.epoch for report in Checking.reports] == [1, 2, 1, 2]
    assert all(math.isfinite(report.validation_nll) for report in Checking.reports)
