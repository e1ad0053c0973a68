"""`bench`: which arms are timed, on what, and that the control is the twin entered twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesnet.benchmark import Timing
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError, ConfigError, DeviceError
from bayesnet.inference.deterministic import Deterministic
from bayesnet.inference.mean_field import MeanField
from bayesnet.predictive import Predictor
from bayesnet.workflows import bench

Arms = Mapping[str, Callable[[], object]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the clock: each arm is called twice, and the Bayesian one is said to be a quarter slower."""
    calls: list[dict[str, Any]] = []

    def measure(arms: Arms, **settings: Any) -> dict[str, Timing]:  # noqa: ANN401 - what measure takes
        calls.append({"arms": list(arms), **settings})
        for arm in arms.values():
            arm()
            arm()
        seconds = {"deterministic": 0.008, "bayesian": 0.010, "control": 0.0084}
        return {name: Timing(np.full(20, seconds[name]), 3) for name in arms}

    monkeypatch.setattr("bayesnet.workflows.benching.measure", measure)
    return calls


def test_rows(calibrated_run: Path, measured: list[dict[str, Any]]) -> None:
    record = bench(calibrated_run, devices="cpu,cpu", seconds=2.4)
    assert record["source"] == str(calibrated_run)
    heads = [(row["device"], row["phase"], row["model"], row["family"]) for row in record["rows"]]
    assert heads == 2 * [
        ("cpu", phase, name, family)
        for phase in ("train", "predict")
        for name, family in (("deterministic", "deterministic"), ("bayesian", "mean_field"))
    ]
    assert [(row["batch"], row["samples"]) for row in record["rows"][:4]] == [(128, 1), (128, 1), (32, 1), (32, 256)]
    for row in record["rows"]:
        bayesian = row["model"] == "bayesian"
        assert row["ratio_to_deterministic"] == pytest.approx(1.25 if bayesian else 1.0)
        assert row["ms_median"] == pytest.approx(10.0 if bayesian else 8.0)
        assert row["images_per_second"] == pytest.approx(row["batch"] / (0.010 if bayesian else 0.008))
        assert row["ci95"] == pytest.approx([row["ms_median"]] * 2)
        assert row["peak_memory_bytes"] is None
    assert record["control"]["ratio"] == pytest.approx(1.05)
    assert [(row["device"], row["phase"]) for row in record["control"]["rows"]] == 2 * [
        ("cpu", "train"),
        ("cpu", "predict"),
    ]
    # 2.4 seconds for 20 rounds of 3 arms.
    assert [call["arms"] for call in measured] == [["deterministic", "bayesian", "control"]] * 4
    assert {(call["rounds"], round(call["seconds_per_block"], 6)) for call in measured} == {(20, 0.04)}


def test_what_is_timed(calibrated_run: Path, measured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own training step and the predictor, on both models, the control being a twin of its own."""
    steps: list[tuple[type, int, torch.Size]] = []
    chunks: list[tuple[type, int, int, torch.Size]] = []
    train_step, log_probabilities = Engine.train_step, Predictor.log_probabilities

    def spy_step(self: Engine, posterior: Any, optimizers: Any, x_BCHW: Any, *rest: Any, **plan: Any) -> object:  # noqa: ANN401
        steps.append((type(posterior), id(posterior), x_BCHW.shape))
        return train_step(self, posterior, optimizers, x_BCHW, *rest, **plan)

    def spy_chunk(self: Predictor, x_BCHW: torch.Tensor) -> torch.Tensor:
        chunks.append((type(self.posterior), id(self.posterior), self.num_samples, x_BCHW.shape))
        return log_probabilities(self, x_BCHW)

    monkeypatch.setattr(Engine, "train_step", spy_step)
    monkeypatch.setattr(Predictor, "log_probabilities", spy_chunk)
    bench(calibrated_run, devices="cpu", batch=6, samples=64)
    assert [kind for kind, _, _ in steps] == [Deterministic] * 2 + [MeanField] * 2 + [Deterministic] * 2
    assert len({identity for _, identity, _ in steps}) == 3
    assert {shape for *_, shape in steps} == {(6, 1, 8, 8)}
    kinds = [(kind, samples) for kind, _, samples, _ in chunks]
    assert kinds == [(Deterministic, 1)] * 2 + [(MeanField, 64)] * 2 + [(Deterministic, 1)] * 2
    assert {shape for *_, shape in chunks} == {(6, 1, 8, 8)}


def test_without_a_run_the_default_recipe_is_measured(
    measured: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = bench(devices="cpu")
    assert record["source"] == "default recipe"
    assert {row["model"] for row in record["rows"]} == {"deterministic", "bayesian"}
    assert list(tmp_path.iterdir()) == []


def test_a_twin_alone_is_measured_beside_a_default_head(
    measured: list[dict[str, Any]], folder_data: Path, tmp_path: Path
) -> None:
    from bayesnet import workflows

    small = ("backbone.width=4", "training.batch_size=16")
    workflows.train(data=f"folder:{folder_data}", epochs=1, overrides=small, devices="cpu", out=tmp_path / "run")
    rows = bench(tmp_path / "run", devices="cpu")["rows"]
    assert [(row["model"], row["family"]) for row in rows[:2]] == [
        ("deterministic", "deterministic"),
        ("bayesian", "mean_field"),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "what"),
    [
        ({"batch": 1}, ConfigError, "must be from 2 to 65536 (batch = 1)"),
        ({"seconds": 0.0}, ConfigError, "must be from 0.1 to 3600 (seconds = 0.0)"),
        ({"samples": 5}, ConfigError, "draws must be a power of two from 1 to 256 (samples = 5)"),
        ({"devices": "cuda:99"}, DeviceError, "no such device (cuda:99): this machine has "),
    ],
)
def test_what_is_refused(
    calibrated_run: Path, measured: list[dict[str, Any]], arguments: dict[str, Any], error: type[Exception], what: str
) -> None:
    with pytest.raises(error) as caught:
        bench(calibrated_run, **{"devices": "cpu", **arguments})
    assert str(caught.value).startswith(what)


def test_a_given_run_must_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run directory does not exist"):
        bench(tmp_path / "absent", devices="cpu")
