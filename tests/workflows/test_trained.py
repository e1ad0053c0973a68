"""From a run directory back to a model: everything must fit together, or it is a CheckpointError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesnet import storage
from bayesnet.checkpoint import checkpoint_digest, load_checkpoint, save_checkpoint
from bayesnet.data import Preprocessing
from bayesnet.errors import CheckpointError
from bayesnet.rundir import RunDirectory
from bayesnet.settings import resolve_settings
from bayesnet.workflows.trained import load_model, model_name, new_posterior, trained_names

Change = Callable[[dict[str, Any]], object]


def replace_state(run: Path, change: Change) -> None:
    """Save the Bayesian checkpoint with another state, and let the summary name it: a forgery without a flaw."""
    summary = json.loads((run / "summary.json").read_text())
    record = summary["models"]["bayesian"]
    directory = run / "models" / "bayesian" / "checkpoints"
    checkpoint = load_checkpoint(directory / f"step-{record['step']:08d}")
    change(checkpoint.state)
    path = save_checkpoint(directory, checkpoint.step, checkpoint.tensors, checkpoint.state)
    record["digest"] = checkpoint_digest(path)
    storage.write_json(run / "summary.json", summary)


def test_a_model(trained_run: Path) -> None:
    run = RunDirectory.open(trained_run)
    model = load_model(run, "bayesian")
    assert (model.name, model.num_examples) == ("bayesian", 1078)
    assert model.classes == tuple(str(digit) for digit in range(10))
    assert model.settings.inference.family == "mean_field"
    assert not model.posterior.training
    record = run.read_summary()["models"]["bayesian"]
    assert model.digest == record["digest"]
    assert trained_names(run.read_summary(), run.path) == ("deterministic", "bayesian")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: state.pop("settings"), "malformed checkpoint state"),
        (lambda state: state.pop("num_examples"), "malformed checkpoint state"),
        (lambda state: state.update(num_examples="many"), "malformed checkpoint state"),
        (lambda state: state.update(classes=3), "malformed checkpoint state"),
        (lambda state: state["settings"]["backbone"].update(name="os.system"), "unknown backbone (os.system)"),
        (lambda state: state["settings"]["inference"].update(family="mine"), "unknown family (mine)"),
        (lambda state: state["settings"].update(hook="x"), "unknown configuration section (hook)"),
        (lambda state: state["settings"]["backbone"].update(width=16), "tensor does not fit the model"),
        (lambda state: state["settings"].update(inference={"family": "deterministic"}), "tensor in the checkpoint"),
        (lambda state: state["preprocessing"].update(std=[0.0]), "must be above 0 (preprocessing.std)"),
        (lambda state: state["preprocessing"].update(channels=3), "expected 3 finite numbers (preprocessing.mean)"),
        (lambda state: state["classes"].append("10"), "classes.json differs from the checkpoint's classes"),
        (lambda state: state["classes"].reverse(), "classes.json differs from the checkpoint's classes"),
    ],
)
def test_a_state_that_does_not_fit(trained_copy: Path, change: Change, what: str) -> None:
    replace_state(trained_copy, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(RunDirectory.open(trained_copy), "bayesian")
    assert what in str(caught.value)


def test_an_unchanged_state_fits(trained_copy: Path) -> None:
    """The control of the test above."""
    replace_state(trained_copy, lambda state: None)
    assert load_model(RunDirectory.open(trained_copy), "bayesian").name == "bayesian"


def test_a_model_that_was_not_trained(trained_run: Path) -> None:
    with pytest.raises(CheckpointError, match="the run has no finished laplace model"):
        load_model(RunDirectory.open(trained_run), "laplace")
    strange: tuple[object, ...] = (None, {}, [], {"other": {}})
    for models in strange:
        with pytest.raises(CheckpointError, match="the run has no trained model"):
            trained_names({"models": models}, trained_run)


def test_a_new_posterior_is_a_function_of_the_seed() -> None:
    preprocessing = Preprocessing(1, 8, 8, mean=(0.5,), std=(0.5,))
    settings = resolve_settings(bayesian=True, overrides=["backbone.width=2"])
    other = resolve_settings(bayesian=True, overrides=["backbone.width=2", "training.seed=1"])
    before = torch.get_rng_state()
    first = new_posterior(settings, preprocessing, 3, 100).state_dict()
    torch.rand(7)
    again = new_posterior(settings, preprocessing, 3, 100).state_dict()
    third = new_posterior(other, preprocessing, 3, 100).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    different = {key for key in first if not torch.equal(first[key], third[key])}
    assert {"guide.loc", "table_SE", "model.backbone.layers.0.weight"} <= different
    torch.set_rng_state(before)
    new_posterior(settings, preprocessing, 3, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_twin_starts_from_the_same_backbone_and_head() -> None:
    preprocessing = Preprocessing(1, 8, 8, mean=(0.5,), std=(0.5,))
    settings = resolve_settings(bayesian=True, overrides=["backbone.width=2"])
    bayesian = new_posterior(settings, preprocessing, 3, 100).state_dict()
    twin = new_posterior(settings.twin(), preprocessing, 3, 100).state_dict()
    assert (model_name(settings), model_name(settings.twin())) == ("bayesian", "deterministic")
    for key in twin:
        if key.startswith("backbone."):
            assert torch.equal(twin[key], bayesian[f"model.{key}"])
    assert torch.equal(torch.cat([twin["head.weight"], twin["head.bias"][:, None]], 1), bayesian["guide.loc"])
