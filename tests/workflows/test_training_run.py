"""`train`: what it leaves behind, how a run is taken up again, and that the test split is read last."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bayesnet import metrics, workflows
from bayesnet.checkpoint import checkpoint_digest, load_checkpoint, newest_checkpoint
from bayesnet.data import DataConfig, Examples, ImageData, Preprocessing, load_data
from bayesnet.engine import Engine
from bayesnet.errors import DataError, DivergedError
from bayesnet.progress import FitResult
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings, build_settings, resolve_settings
from bayesnet.workflows import TrainListener
from bayesnet.workflows.fitting import RunContext
from bayesnet.workflows.model_fitting import fit_model as original_fit
from bayesnet.workflows.trained import load_model

SMALL = ("backbone.width=4", "training.batch_size=16")
MODELS = ("deterministic", "bayesian")


class Poisoned(Examples):
    """A split that must not be read yet.

    Args:
        examples: The split.
        ready: Whether it may be read by now.
    """

    def __init__(self, examples: Examples, ready: list[bool]) -> None:
        self.examples, self.ready = examples, ready
        self.labels_N = examples.labels_N
        self.num_reads = 0

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pixels."""
        assert all(self.ready), "read too early"
        self.num_reads += 1
        return self.examples.read(indices)

    def name(self, index: int) -> str:
        """Return the name."""
        return self.examples.name(index)

    def verify(self) -> None:
        """Looking whether files are readable is allowed."""
        self.examples.verify()


class Notes(TrainListener):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.models: list[tuple[str, str]] = []
        self.steps = 0

    def on_note(self, text: str) -> None:
        """Remember."""
        self.notes.append(text)

    def on_model(self, name: str, family: str) -> None:
        """Remember."""
        self.models.append((name, family))

    def on_step(self, step: int, num_steps: int) -> None:
        """Count."""
        self.steps += 1


def train(folder: Path, out: Path, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - what train takes
    defaults = {"bayesian": True, "data": f"folder:{folder}", "epochs": 2, "devices": "cpu", "overrides": SMALL}
    return workflows.train(**{**defaults, **arguments}, out=out)


def newest(run: Path, name: str) -> dict[str, Tensor]:
    checkpoint, _ = newest_checkpoint(run / "models" / name / "checkpoints")
    assert checkpoint is not None
    return checkpoint.tensors


def metric_lines(run: Path) -> list[tuple[str, int]]:
    return [(line["model"], line["epoch"]) for line in RunDirectory(run).read_metrics()]


def test_the_files_of_a_run(trained_run: Path) -> None:
    top = {path.name for path in trained_run.iterdir()}
    files = {"config.toml", "environment.json", "classes.json", "metrics.jsonl", "summary.json", ".lock"}
    assert top == {*files, "models", "examples"}
    settings = build_settings(tomllib.loads((trained_run / "config.toml").read_text()))
    assert (settings.training.epochs, settings.backbone.width, settings.data.spec) == (3, 8, "digits")
    classes = json.loads((trained_run / "classes.json").read_text())
    assert classes["classes"] == [str(digit) for digit in range(10)]
    assert metric_lines(trained_run) == [(name, epoch) for name in MODELS for epoch in (1, 2, 3)]
    environment = json.loads((trained_run / "environment.json").read_text())
    assert str(torch.__version__).startswith(environment["versions"]["torch"])
    for name in MODELS:
        kept = sorted((trained_run / "models" / name / "checkpoints").iterdir())
        assert 2 <= len(kept) <= 3
        state = load_checkpoint(kept[-1]).state
        assert state["model"] == name
        assert state["classes"] == classes["classes"]
        assert state["fingerprint"] == classes["fingerprint"]


def test_the_summary_of_a_run(trained_run: Path) -> None:
    summary = RunDirectory.open(trained_run).read_summary()
    counts = {
        f"num_{split}": count
        for split, count in zip(("train", "validation", "calibration", "test"), (1078, 180, 179, 360), strict=True)
    }
    assert summary["data"] == {"name": "digits", "classes": [str(digit) for digit in range(10)], **counts}
    assert summary["run"] == str(trained_run)
    assert summary["finished"] is True
    assert list(summary["models"]) == list(MODELS)
    lines = RunDirectory(trained_run).read_metrics()
    for name, family in zip(MODELS, ("deterministic", "mean_field"), strict=True):
        record = summary["models"][name]
        own = [line for line in lines if line["model"] == name]
        best = min(own, key=lambda line: line["validation_nll"])
        assert record["family"] == family
        assert (record["epoch"], record["step"]) == (best["epoch"], best["step"])
        assert record["validation_nll"] == best["validation_nll"]
        assert (record["train_nll"], record["kl"]) == (own[-1]["train_nll"], own[-1]["kl"])
        assert record["kl_per_example"] == pytest.approx(record["kl"] / 1078)
        directory = trained_run / "models" / name / "checkpoints" / f"step-{best['step']:08d}"
        assert record["digest"] == checkpoint_digest(directory)
        assert record["num_test"] == 360
        for key in metrics.METRICS:
            low, high = record["ci95"][key]
            assert low <= record[key] <= high, key
        assert record["accuracy"] > 0.3
    assert summary["models"]["deterministic"]["posterior_scale"] == {"initial": None, "final": None}
    assert summary["models"]["deterministic"]["kl"] == 0
    scale = summary["models"]["bayesian"]["posterior_scale"]
    settings = resolve_settings(bayesian=True).to_mapping()["inference"]
    assert scale["initial"] == pytest.approx(settings["initial_scale"] * settings["prior_scale"])
    assert scale["final"] != scale["initial"]


def test_the_metrics_are_those_of_the_best_checkpoint(trained_run: Path) -> None:
    run = RunDirectory.open(trained_run)
    data = load_data(DataConfig())
    for name in MODELS:
        model = load_model(run, name)
        probabilities_NK = model.predictor(Engine.for_one("cpu")).probabilities(data.test)
        found = metrics.evaluate(probabilities_NK, data.test.labels_N.numpy())
        assert found.items() <= run.read_summary()["models"][name].items()


def test_example_images_are_the_first_of_the_test_split(trained_run: Path) -> None:
    data = load_data(DataConfig())
    files = sorted((trained_run / "examples").iterdir())
    assert [path.name for path in files] == [f"test-{index:04d}.png" for index in range(8)]
    for index, path in enumerate(files):
        assert np.array_equal(np.asarray(Image.open(path)), data.test.read([index])[0, 0].numpy())


def test_the_twin_alone(folder_data: Path, tmp_path: Path) -> None:
    summary = train(folder_data, tmp_path / "run", bayesian=False)
    assert list(summary["models"]) == ["deterministic"]
    assert [path.name for path in (tmp_path / "run" / "models").iterdir()] == ["deterministic"]
    assert not (tmp_path / "run" / "examples").exists()  # the folder has files of its own


def test_a_run_begins_alike_with_its_twin(folder_data: Path, tmp_path: Path) -> None:
    """The twin of a Bayesian run is, bit for bit, the model that is trained without --bayesian."""
    train(folder_data, tmp_path / "both")
    train(folder_data, tmp_path / "alone", bayesian=False)
    both, alone = newest(tmp_path / "both", "deterministic"), newest(tmp_path / "alone", "deterministic")
    assert both.keys() == alone.keys()
    assert [name for name in both if not torch.equal(both[name], alone[name])] == []


def test_the_seed_decides(folder_data: Path, tmp_path: Path) -> None:
    first, again, other = (
        train(folder_data, tmp_path / str(index), epochs=1, seed=seed) for index, seed in enumerate((3, 3, 4))
    )
    for name in MODELS:
        left, right = newest(tmp_path / "0", name), newest(tmp_path / "1", name)
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert first["models"][name]["nll"] == again["models"][name]["nll"] != other["models"][name]["nll"]
    assert first["fingerprint"] == other["fingerprint"]  # the splits have a seed of their own


def test_a_failed_start_leaves_nothing(folder_copy: Path, tmp_path: Path) -> None:
    image = next((folder_copy / "red").iterdir())
    image.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        train(folder_copy, tmp_path / "deep" / "run")
    image.unlink()
    with pytest.raises(DivergedError):
        train(folder_copy, tmp_path / "deep" / "run", overrides=(*SMALL, "optimizer.learning_rate=1e30"))
    assert not (tmp_path / "deep").exists()


def test_notes_are_passed_on(folder_data: Path, tmp_path: Path) -> None:
    listener = Notes()
    train(folder_data, tmp_path / "run", listener=listener)
    assert any("carved from the training images" in note for note in listener.notes)
    assert listener.models == [("deterministic", "deterministic"), ("bayesian", "mean_field")]


def test_a_finished_run_gives_its_summary(trained_run: Path) -> None:
    listener = Notes()
    summary = workflows.train(resume=trained_run, listener=listener)
    assert summary == json.loads((trained_run / "summary.json").read_text())
    assert listener.notes == [f"{trained_run} is finished; nothing to do"]
    assert listener.steps == 0


def poison(monkeypatch: pytest.MonkeyPatch, *, on_validation: bool = False) -> list[Poisoned]:
    """Make the test split unreadable until both models are fitted; return the splits that were handed out."""
    ready: list[bool] = []
    given: list[Poisoned] = []

    def load(config: DataConfig, preprocessing: Preprocessing | None) -> ImageData:
        data = load_data(config, preprocessing)
        given.append(Poisoned(data.test, ready))
        ready[:] = [False, False]
        return data._replace(test=given[-1], validation=given[-1] if on_validation else data.validation)

    def fit_model(
        name: str, settings: Settings, context: RunContext, *, twin: FitResult | None, profile: Path | None
    ) -> FitResult:
        result = original_fit(name, settings, context, twin=twin, profile=profile)
        ready[MODELS.index(name)] = True
        return result

    monkeypatch.setattr("bayesnet.workflows.training_run.load_data", load)
    monkeypatch.setattr("bayesnet.workflows.training_run.fit_model", fit_model)
    return given


def test_the_test_split_is_not_read_before_both_models_are_fitted(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = poison(monkeypatch)
    train(folder_data, tmp_path / "run")
    assert [split.num_reads for split in splits] == [2]  # once per model


def test_the_poison_works(folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: choosing the best checkpoint by the test split is noticed."""
    poison(monkeypatch, on_validation=True)
    with pytest.raises(AssertionError, match="read too early"):
        train(folder_data, tmp_path / "run")
