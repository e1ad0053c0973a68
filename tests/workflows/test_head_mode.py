"""A head fitted on stored features: whose they are, what they hold, and that no kill changes what becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnet import workflows
from bayesnet.backbones.features import StandardizedFeatures
from bayesnet.data import load_data
from bayesnet.data.augment import Augmentation, augment, epoch_draws
from bayesnet.data.splits import stratified_split
from bayesnet.engine import Engine
from bayesnet.errors import BayesnetError, CheckpointError, ConfigError, InterruptedRunError
from bayesnet.inference.base import GaussianHeadPosterior
from bayesnet.progress import FitResult
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings, build_settings
from bayesnet.training import fit as original_fit
from bayesnet.workflows import TrainListener, head_features
from bayesnet.workflows.fitting import RunContext
from bayesnet.workflows.trained import load_model

SMALL = ("backbone.width=2", "training.batch_size=16")


class Notes(TrainListener):
    """Remembers notes and counts steps."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0

    def on_note(self, text: str) -> None:
        """Remember."""
        self.notes.append(text)

    def on_step(self, step: int, num_steps: int) -> None:
        """Count."""
        self.steps += 1


def train(folder: Path, out: Path, *overrides: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - of train
    defaults = {"family": "mean_field", "data": f"folder:{folder}", "epochs": 2, "devices": "cpu", "mode": "head"}
    return workflows.train(**{**defaults, **arguments}, overrides=(*SMALL, *overrides), out=out)


def posterior(run: Path, name: str = "bayesian") -> GaussianHeadPosterior:
    loaded = load_model(RunDirectory(run), name).posterior
    assert isinstance(loaded, GaussianHeadPosterior)
    return loaded


def backbone_state(run: Path) -> dict[str, Tensor]:
    """Return the tensors of the Bayesian model's backbone, without its standardisation."""
    standardized = posterior(run).model.backbone
    assert isinstance(standardized, StandardizedFeatures)
    return standardized.backbone.state_dict()


def twin_state(run: Path) -> dict[str, Tensor]:
    state = load_model(RunDirectory(run), "deterministic").posterior.state_dict()
    return {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def run(folder_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a finished run. Do not write to it."""
    path = tmp_path_factory.mktemp("head") / "run"
    train(folder_data, path)
    return path


def context(run: Path, listener: TrainListener | None = None) -> tuple[Settings, RunContext]:
    trained = load_model(RunDirectory(run), "bayesian")
    data = load_data(trained.settings.data, trained.preprocessing)
    engine = Engine(torch.device("cpu"))
    return trained.settings, RunContext(
        RunDirectory(run), data, engine, listener or Notes(), lambda: None, workflows.trained.NO_USER_CODE, 0
    )


# Whose features.


def test_the_backbone_is_the_twins_bit_for_bit(run: Path) -> None:
    assert same(backbone_state(run), twin_state(run))


def test_features_are_standardised_over_the_training_images(run: Path) -> None:
    _, given = context(run)
    x_NCHW = given.data.preprocessing.normalize(given.data.train.read(range(len(given.data.train))))
    with torch.no_grad():
        features_ND = posterior(run).features(x_NCHW)
    varying_D = features_ND.std(0) > 1e-3
    assert varying_D.any()
    assert features_ND.mean(0).abs().max() < 1e-4
    assert torch.allclose(features_ND.std(0, correction=0)[varying_D], torch.ones(int(varying_D.sum())), atol=1e-3)


def test_the_model_over_images_is_the_one_fitted_on_features(run: Path) -> None:
    """Its validation loss through the backbone is that of the chosen epoch on stored features."""
    record = RunDirectory(run).read_summary()["models"]["bayesian"]
    lines = [line for line in RunDirectory(run).read_metrics() if line["model"] == "bayesian"]
    assert record["validation_nll"] == pytest.approx(min(line["validation_nll"] for line in lines), rel=1e-5)


def test_another_run_lends_its_backbone(run: Path, folder_data: Path, tmp_path: Path) -> None:
    listener = Notes()
    summary = train(folder_data, tmp_path / "new", f"head.backbone={run}", family="matrix_normal", listener=listener)
    assert same(backbone_state(tmp_path / "new"), twin_state(run))
    # The twin gets the same treatment: a linear layer on the same features.
    twin = load_model(RunDirectory(tmp_path / "new"), "deterministic").posterior
    assert isinstance(twin.backbone, StandardizedFeatures)
    assert same(twin.backbone.backbone.state_dict(), twin_state(run))
    assert summary["models"]["bayesian"]["seconds"] > 0
    assert not any("too good" in note for note in listener.notes)


def test_a_run_of_a_head_lends_its_backbone_too(run: Path, folder_data: Path, tmp_path: Path) -> None:
    train(folder_data, tmp_path / "first", f"head.backbone={run}", "training.twin=false")
    train(folder_data, tmp_path / "second", f"head.backbone={tmp_path / 'first'}")
    assert same(backbone_state(tmp_path / "second"), twin_state(run))


def test_a_run_without_a_backbone_of_its_own_is_refused(folder_data: Path, tmp_path: Path) -> None:
    train(folder_data, tmp_path / "lender", "training.twin=false", family="mean_field_all", mode="joint", epochs=1)
    with pytest.raises(CheckpointError, match="the run's backbone is not a network of its own"):
        train(folder_data, tmp_path / "run", f"head.backbone={tmp_path / 'lender'}")


def test_a_run_of_a_head_is_timed_on_features(run: Path) -> None:
    record = workflows.bench(run, devices="cpu", batch=16, seconds=0.1)
    assert {row["model"] for row in record["rows"]} == {"deterministic", "bayesian"}


def test_a_backbone_that_may_know_the_test_images_is_said(run: Path, folder_data: Path, tmp_path: Path) -> None:
    listener = Notes()
    train(folder_data, tmp_path / "new", f"head.backbone={run}", "data.seed=1", listener=listener)
    assert any("its metrics are too good" in note for note in listener.notes)


def test_weights_of_a_file_lend_theirs(run: Path, folder_data: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(twin_state(run), tmp_path / "weights.safetensors")
    train(folder_data, tmp_path / "new", "head.backbone=weights", weights=str(tmp_path / "weights.safetensors"))
    assert same(backbone_state(tmp_path / "new"), twin_state(run))


# What they hold.


def test_an_augmented_pass_holds_the_features_of_the_images_that_joint_training_sees(run: Path) -> None:
    settings, given = context(run)
    settings = replace(settings, data=replace(settings.data, flip=True, crop_padding=2))
    rate = Augmentation.from_config(settings.data)
    backbone = posterior(run).model.backbone
    features = {
        epoch: head_features.compute_features(
            backbone, given.data.train, settings, given, augmentation=rate, epoch=epoch
        )
        for epoch in (0, 1)
    }
    num, seed = len(given.data.train), settings.training.seed
    images_NCHW = given.data.train.read(range(num))
    for epoch, features_ND in features.items():
        draws = epoch_draws(num, rate, seed=seed, epoch=epoch).select(torch.arange(num))
        with torch.no_grad():
            expected_ND = backbone(given.data.preprocessing.normalize(augment(images_NCHW, draws)))
        assert torch.allclose(features_ND, expected_ND, atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-2)


def test_epochs_train_on_the_passes_in_turn(folder_data: Path, tmp_path: Path) -> None:
    listener = Notes()
    train(folder_data, tmp_path / "run", "data.flip=true", "head.augmented_passes=2", listener=listener)
    assert any(note.startswith("Features: ") and "and 2 augmented passes" in note for note in listener.notes)


def cross_fitted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, leak: bool = False) -> list[bytes]:
    """Train with three folds; return the images that got features of a backbone that was trained on them.

    Images are told apart by their bytes: the folds are subsets of one training split.
    """
    from bayesnet.workflows import fitting

    trained_on: list[list[bytes]] = []
    given_by: list[list[bytes]] = []
    original_split = stratified_split

    def fit(posterior: Any, data: Any, *arguments: Any, **named: Any) -> FitResult:  # noqa: ANN401 - passed on
        if "fold" in named["metadata"]:
            trained_on.append([image.numpy().tobytes() for image in data.examples.read(range(len(data.examples)))])
        return original_fit(posterior, data, *arguments, **named)

    def split(labels_N: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - passed on
        folds = original_split(labels_N, *arguments, **named)
        data = load_data(build_settings({"data": {"spec": f"folder:{folder}"}}).data)
        given_by[:] = [[image.numpy().tobytes() for image in data.train.read(fold)] for fold in folds]
        return folds

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit", fit)
        patch.setattr(head_features, "stratified_split", split)
        if leak:
            patch.setattr(head_features, "SubsetExamples", lambda examples, indices_N: examples)
        train(folder, out, "head.folds=3", epochs=1)
    assert len(trained_on) == len(given_by) == 3
    return [image for fold, others in zip(given_by, trained_on, strict=True) for image in fold if image in others]


def test_no_image_gets_features_of_a_backbone_that_has_seen_it(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = cross_fitted(folder_data, tmp_path / "run", monkeypatch)
    assert seen == []


def test_planted_a_fold_whose_backbone_has_seen_it_is_noticed(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = cross_fitted(folder_data, tmp_path / "run", monkeypatch, leak=True)
    assert seen != []


def test_the_map_between_features_says_what_it_explains_of_rows_left_out() -> None:
    """Leave-one-out by formula equals leaving out one row after the other, and noise is not said to be explained."""
    generator = torch.Generator().manual_seed(0)
    inputs_ND = torch.randn(50, 4, generator=generator)
    targets_NE = inputs_ND @ torch.randn(4, 3, generator=generator) + 2
    align, explained = head_features.least_squares(inputs_ND, targets_NE)
    assert torch.allclose(align(inputs_ND), targets_NE, atol=1e-5)
    assert explained == pytest.approx(1)
    noise_NE, wide_ND = torch.randn(50, 3, generator=generator), torch.randn(50, 64, generator=generator)
    _, explained = head_features.least_squares(wide_ND, noise_NE)
    assert explained < 0.2  # an interpolating map would have said 1
    mixed_NE = targets_NE + noise_NE
    _, explained = head_features.least_squares(inputs_ND, mixed_NE)
    left_out = 0.0
    for row in range(50):
        keep = torch.arange(50) != row
        apply, _ = head_features.least_squares(inputs_ND[keep], mixed_NE[keep])
        left_out += float((apply(inputs_ND[row]) - mixed_NE[row]).square().sum())
    total = float((mixed_NE - mixed_NE.mean(0)).square().sum())
    assert explained == pytest.approx(1 - left_out / total, abs=0.01)


# Nothing is lost.


@pytest.mark.parametrize("step", [2, 8, 11])  # in the twin, in the head's first epoch, and in its last
def test_an_interrupted_run_ends_bit_equal(run: Path, folder_data: Path, tmp_path: Path, step: int) -> None:
    calls = iter(range(1, 10**6))
    with pytest.raises(InterruptedRunError, match="continue with"):
        train(folder_data, tmp_path / "run", stop_signal=lambda: 15 if next(calls) == step else None)
    workflows.train(resume=tmp_path / "run")
    assert same(posterior(tmp_path / "run").state_dict(), posterior(run).state_dict())


def test_an_interrupted_fold_goes_on(folder_data: Path, tmp_path: Path) -> None:
    train(folder_data, tmp_path / "straight", "head.folds=2", epochs=1)
    calls = iter(range(1, 10**6))
    with pytest.raises(InterruptedRunError):
        train(
            folder_data,
            tmp_path / "run",
            "head.folds=2",
            epochs=1,
            stop_signal=lambda: 15 if next(calls) == 5 else None,
        )
    workflows.train(resume=tmp_path / "run")
    assert same(posterior(tmp_path / "run").state_dict(), posterior(tmp_path / "straight").state_dict())


def test_a_head_does_not_go_on_with_another_backbone(run: Path, folder_data: Path, tmp_path: Path) -> None:
    train(folder_data, tmp_path / "lender", mode="joint", family="deterministic")
    calls = iter(range(1, 10**6))
    with pytest.raises(InterruptedRunError):
        train(
            folder_data,
            tmp_path / "run",
            f"head.backbone={tmp_path / 'lender'}",
            "training.twin=false",
            stop_signal=lambda: 15 if next(calls) == 4 else None,
        )
    (tmp_path / "lender").rename(tmp_path / "old")
    train(folder_data, tmp_path / "lender", mode="joint", family="deterministic", seed=5)
    with pytest.raises(CheckpointError, match="the checkpoint was made with other features"):
        workflows.train(resume=tmp_path / "run")


# Wrong input: one line that says what to do.


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (["inference.family=ensemble"], {"family": None}, "only a posterior over the last layer can be fitted"),
        (["training.twin=false"], {}, "the run trains no twin whose features could be used"),
        ([], {"family": "deterministic"}, "the run trains no twin whose features could be used"),
        (["head.backbone=weights"], {}, r"no weights are given .*: give --weights"),
        (["head.backbone=weights", "head.folds=2"], {}, "only the twin is cross-fitted"),
        (["head.folds=1"], {}, r"must be 0, or from 2 to 20 \(head.folds = 1\)"),
        (["head.augmented_passes=-1"], {}, "must be from 0 to 1000"),
        (["head.backbone=nowhere"], {}, "the run whose backbone is used is not there .*nowhere"),
        (["training.balanced=true"], {"family": "laplace"}, "sees the classes as often as they are"),
        (["head.mode=half"], {"mode": None}, "head.mode"),
        (
            ["head.folds=2"],
            {"mode": None},
            "only a head on stored features has it .*: give --mode head",
        ),
    ],
)
def test_wrong_settings(
    folder_data: Path, tmp_path: Path, overrides: list[str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BayesnetError, match=message) as caught:
        train(folder_data, tmp_path / "run", *overrides, **arguments)
    assert isinstance(caught.value, CheckpointError if message.startswith("the run whose") else ConfigError)
    assert not (tmp_path / "run").exists()


def test_features_that_do_not_fit_are_refused(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_features, "physical_memory", lambda: 10_000)
    with pytest.raises(ConfigError, match=r"features of .* images x .* x 1001 passes take .* MiB, of 4.9 KiB at most"):
        train(folder_data, tmp_path / "run", "head.augmented_passes=1000")
