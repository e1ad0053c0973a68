"""A family that starts at another one's optimum: it ends with a bound no lower, and no kill changes where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bayesnet import workflows
from bayesnet.checkpoint import list_checkpoints, load_checkpoint
from bayesnet.data import load_data
from bayesnet.errors import InterruptedRunError
from bayesnet.inference.base import HeadPosterior, Posterior
from bayesnet.inference.full_rank import FullRank
from bayesnet.rundir import RunDirectory
from bayesnet.training import restore_model
from bayesnet.workflows import TrainListener
from bayesnet.workflows.head_fitting import on_features
from bayesnet.workflows.starting import start_of, start_settings
from bayesnet.workflows.trained import NO_USER_CODE, load_model

SMALL = ("backbone.width=2", "training.batch_size=16")


class Notes(TrainListener):
    """Remembers notes and counts steps."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        """Remember."""
        self.notes.append(text)


def train(folder: Path, out: Path, *overrides: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - of train
    defaults = {"family": "full_rank", "data": f"folder:{folder}", "epochs": 2, "devices": "cpu"}
    return workflows.train(**{**defaults, **arguments}, overrides=(*SMALL, *overrides), out=out)


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_model(RunDirectory(run), "bayesian").posterior.state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def bound(posterior: Posterior, x_BCHW: torch.Tensor, y_B: torch.Tensor, num_examples: int) -> float:
    """Return the ELBO of all images in nats, the expected log-likelihood from 512 draws of a fixed seed."""
    torch.manual_seed(0)
    posterior.eval()
    with torch.no_grad():
        losses = [float(posterior.loss(x_BCHW, y_B).total) for _ in range(512)]
    return -num_examples * sum(losses) / len(losses)


def test_it_ends_with_a_bound_no_lower_than_the_mean_field_optimum(folder_data: Path, tmp_path: Path) -> None:
    """On the same stored features. The draws' error is below 0.1 nat; the gain of correlations is several nats."""
    train(folder_data, tmp_path / "run", mode="head", epochs=60)
    run = RunDirectory(tmp_path / "run")
    trained = load_model(run, "bayesian")
    data = load_data(trained.settings.data, trained.preprocessing)
    x_NCHW = trained.preprocessing.normalize(data.train.read(range(len(data.train))))
    y_N, num = data.train.labels_N, len(data.train)
    with torch.no_grad():
        assert isinstance(trained.posterior, HeadPosterior)
        features_ND = trained.posterior.features(x_NCHW)[:, None, None]
    start = start_of(trained.settings)
    assert start is not None
    sizes = features_ND.shape[-1], len(data.classes), num, NO_USER_CODE
    first = on_features(start_settings(trained.settings, start), *sizes)
    restore_model(first, load_checkpoint(list_checkpoints(run.model_checkpoints("bayesian", "start"))[-1]))
    last = on_features(trained.settings, *sizes)
    restore_model(last, load_checkpoint(list_checkpoints(run.model_checkpoints("bayesian", "head"))[-1]))
    assert bound(last, features_ND, y_N, num) >= bound(first, features_ND, y_N, num) - 0.1
    # The control: every sd divided by 7 loses more than the test allows.
    assert isinstance(last, FullRank)
    last.guide.log_scale.data -= 2.0
    assert bound(last, features_ND, y_N, num) < bound(first, features_ND, y_N, num) - 0.1


def test_the_start_is_said_kept_and_counted(folder_data: Path, tmp_path: Path) -> None:
    listener = Notes()
    summary = train(folder_data, tmp_path / "run", listener=listener)
    assert "First mean_field, at whose optimum full_rank starts." in listener.notes
    run = RunDirectory(tmp_path / "run")
    lines = [line for line in run.read_metrics() if line["model"] == "bayesian"]
    assert [(line.get("start"), line["epoch"]) for line in lines] == [
        ("mean_field", 1),
        ("mean_field", 2),
        (None, 1),
        (None, 2),
    ]
    assert summary["models"]["bayesian"]["seconds"] > lines[-1]["seconds"]


def test_from_scratch_nothing_else_is_trained(folder_data: Path, tmp_path: Path) -> None:
    listener = Notes()
    train(folder_data, tmp_path / "run", "inference.start=scratch", listener=listener)
    assert not any("First" in note for note in listener.notes)
    assert not (tmp_path / "run" / "models" / "bayesian" / "start").exists()


@pytest.mark.parametrize("mode", ["joint", "head"])
def test_an_interrupted_start_ends_bit_equal(folder_data: Path, tmp_path: Path, mode: str) -> None:
    train(folder_data, tmp_path / "straight", mode=mode, epochs=1)
    for step in (5, 8):  # of 3 each: in the start, and after it
        calls = iter(range(1, 10**6))
        run = tmp_path / f"run{step}"
        with pytest.raises(InterruptedRunError):
            train(
                folder_data,
                run,
                mode=mode,
                epochs=1,
                stop_signal=lambda calls=calls, s=step: 15 if next(calls) == s else None,
            )
        workflows.train(resume=run)
        assert same(state(run), state(tmp_path / "straight"))
