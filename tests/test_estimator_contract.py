"""What scikit-learn and careful callers expect of BayesNetClassifier: labels, resumption, pickling, one-line errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GridSearchCV, cross_val_score
from torch import nn

import bayesnet
from bayesnet import BayesNetClassifier, workflows
from bayesnet.data.loading import read_batches
from bayesnet.errors import CheckpointError, ConfigError, DataError, InterruptedRunError, StorageError

NUM = 120
SETTINGS = {"backbone": {"width": 4}, "training": {"batch_size": 24}}


def make(**arguments: Any) -> BayesNetClassifier:  # noqa: ANN401 - arguments of many types
    return BayesNetClassifier(**{"epochs": 3, "devices": "cpu", "settings": SETTINGS, **arguments})


@pytest.fixture(scope="module")
def images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Give images of three classes that nobody can confuse."""
    labels = np.arange(NUM) % 3
    images = np.random.default_rng(0).integers(0, 60, (NUM, 1, 12, 12)).astype(np.uint8)
    for label in range(3):
        images[labels == label, :, 4 * label : 4 * label + 4] += 150
    return images, labels


@pytest.mark.parametrize(
    "convert",
    [
        lambda y: y.astype(float),
        lambda y: y > 0,
        lambda y: np.array(["b", "a", "c"])[y],
        lambda y: y.tolist(),
        lambda y: torch.from_numpy(y).float(),
        lambda y: [label / 2 if label else 0 for label in y.tolist()],
    ],
    ids=["float", "bool", "text", "list", "tensor", "int and float"],
)
def test_labels_of_every_kind_come_back(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]], convert: Callable[..., Any], tmp_path: Path
) -> None:
    X, y = images[0], convert(images[1])
    classifier = make().fit(X, y)
    assert classifier.score(X, y) > 0.8
    expected = np.unique(y.numpy() if isinstance(y, torch.Tensor) else np.asarray(y))
    assert classifier.classes_.tolist() == expected.tolist()
    loaded = bayesnet.load(classifier.save(tmp_path / "run"), devices="cpu")
    assert loaded.score(X, y) == classifier.score(X, y)
    assert loaded.classes_.dtype == classifier.classes_.dtype


def test_cross_validation_and_grids(images: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    X, y = images
    assert cross_val_score(make(), X, y.astype(float), cv=2).min() > 0.8
    search = GridSearchCV(make(), {"epochs": np.arange(1, 3)}, cv=2).fit(X, y)
    assert search.best_params_["epochs"] in (1, 2)


@contextlib.contextmanager
def refusal(kind: type[Exception], text: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert str(caught.value).startswith(text), str(caught.value)


@pytest.mark.parametrize("label", [b"a", ("a", 1), 1j, "a\0"], ids=repr)
def test_labels_that_could_not_come_back_are_refused(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]], label: object
) -> None:
    with refusal(DataError, "the labels are of a kind that a run cannot keep"):
        make().fit(images[0], [label if index % 2 else "other" for index in range(NUM)])


def test_scores_of_wrong_labels(images: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    X, y = images
    classifier = make().fit(X, y)
    weights = (classifier.predict(X) == y).astype(float)
    assert classifier.score(X, y, sample_weight=weights) == 1.0
    assert classifier.score(X, np.where(y == 0, 7, y)) < classifier.score(X, y), "an unknown label is a wrong one"
    with refusal(DataError, "expected one label per image (120 images, 1 labels)"):
        classifier.score(X, [1])
    with refusal(DataError, "the classifier knows none of these labels (y[0] = '0'): it has 0, 1, 2"):
        classifier.score(X, y.astype(str))
    for wrong in (1, None, y[:, None]):
        with pytest.raises(DataError):
            classifier.score(X, wrong)  # type: ignore[arg-type]


def interrupted(classifier: BayesNetClassifier, X: object, y: object) -> str:
    calls = iter(range(1, 1000))
    with pytest.raises(InterruptedRunError) as caught:
        classifier.fit(X, y, stop_signal=lambda: 15 if next(calls) == 4 else None)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_may_go_on_with_a_run(images: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path) -> None:
    X, y = images
    text = interrupted(make(out=tmp_path / "run"), X, y)
    assert text.endswith("continue with fit(..., resume=True)")
    with refusal(ConfigError, "the run was begun with another training.epochs"):
        make(out=tmp_path / "run", epochs=9).fit(X, y, resume=True)
    with refusal(ConfigError, "the run was begun with another inference.family"):
        make(out=tmp_path / "run", family="guide").fit(X, y, resume=True)
    with refusal(ConfigError, "the run directory is not empty"):
        make(out=tmp_path / "run").fit(X, y)
    classifier = make(out=tmp_path / "run").fit(X, y, resume=True)
    before = classifier.predict_proba(X)
    with refusal(DataError, "the data set has changed since the run began"):
        make(out=tmp_path / "run").fit(255 - X, y, resume=True)
    with refusal(DataError, "the data set has changed since the run began"):
        make(out=tmp_path / "run").fit(X, np.array(["a", "b", "c"])[y], resume=True)
    assert np.array_equal(bayesnet.load(tmp_path / "run", devices="cpu").predict_proba(X), before)
    lost = interrupted(make(), X, y)
    assert lost.endswith("the run is gone: give out=... to keep an interrupted fit and to resume it")


def test_a_run_with_an_own_optimizer_goes_on_with_it_alone(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = images

    def own(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr=0.01)

    straight = make(optimizer=own).fit(X, y)
    interrupted(make(optimizer=own, out=tmp_path / "run"), X, y)
    with refusal(ConfigError, "the run was begun with another optimizer.name"):
        make(out=tmp_path / "run").fit(X, y, resume=True)
    with refusal(CheckpointError, "the run's optimizer is its author's own"):
        workflows.train(resume=tmp_path / "run")
    with refusal(CheckpointError, "the checkpoint was made by another optimizer"):
        make(optimizer=lambda groups: torch.optim.Adam(groups), out=tmp_path / "run").fit(X, y, resume=True)
    resumed = make(optimizer=own, out=tmp_path / "run").fit(X, y, resume=True)
    assert np.array_equal(resumed.predict_proba(X), straight.predict_proba(X))


def test_a_fitted_classifier_survives_pickling_without_its_data(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]],
) -> None:
    X, y = images
    classifier = make().fit(X, y)
    classifier.calibrate()
    data = bytes(ForkingPickler.dumps(classifier))  # as parallel cross-validation does
    again = ForkingPickler.loads(data)
    assert np.array_equal(again.predict_proba(X), classifier.predict_proba(X))
    assert X.tobytes() not in data
    del classifier
    with refusal(StorageError, "the run directory is gone"):
        again.save("elsewhere")


def test_data_that_changed_since_fit_are_noticed(images: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    X, y = images[0].copy(), images[1]
    classifier = make().fit(X, y)
    X[:] = 0
    with refusal(DataError, "the data have changed since fit (calibration or test)"):
        classifier.calibrate()


def test_a_loaded_classifier_has_the_runs_settings(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = images
    settings = {
        "backbone": {"width": 4},
        "training": {"batch_size": 24, "mixup": 0.3, "label_smoothing": 0.2},
        "optimizer": {"name": "adamw", "learning_rate": 0.003},
        "data": {"rotate": 15.0, "erase": 0.1},
        "inference": {"prior_scale": 0.5},
        "predict": {"samples": 64},
    }
    first = make(settings=settings).fit(X, y)
    loaded = bayesnet.load(first.save(tmp_path / "run"), devices="cpu")
    before = loaded.predict_proba(X)
    assert np.array_equal(loaded.fit(X, y).predict_proba(X), before)
    assert (loaded.run_ / "config.toml").read_text() == (first.run_ / "config.toml").read_text()


def test_a_generator_of_labels_is_read_once(images: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    X, y = images
    assert make(epochs=1).fit(X, (label for label in y)).classes_.tolist() == [0, 1, 2]  # type: ignore[arg-type]


def test_own_code_that_does_not_fit_is_refused_before_training(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = images
    shared = nn.Linear(144, 144)
    tied = nn.Sequential(nn.Flatten(), shared, shared)
    with refusal(ConfigError, "two tensors of the model share memory (tied weights)"):
        make(backbone=tied, settings={}, out=tmp_path / "tied").fit(X, y)
    assert not (tmp_path / "tied").exists()

    def broken(head: object) -> object:
        def guide(features: object, y: object = None) -> None:
            raise KeyError("mine")

        return guide

    with refusal(ConfigError, "the code that was given fails (guide): KeyError: 'mine'"):
        make(guide=broken, twin=True, out=tmp_path / "guide").fit(X, y)
    assert not (tmp_path / "guide").exists()


def test_code_that_is_not_the_runs_is_refused(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = images

    def own(head: Any) -> object:  # noqa: ANN401 - the head's program
        def guide(features: object, y: object = None) -> None:
            loc = pyro.param("loc", torch.zeros(head.num_classes, head.num_features + 1))
            pyro.sample("weight", dist.Normal(loc, 0.1).to_event(2))

        return guide

    ours = make(epochs=1).fit(X, y).save(tmp_path / "ours")
    with refusal(ConfigError, "the code that was given does not fit the run"):
        bayesnet.load(ours, backbone=nn.Flatten())
    with refusal(ConfigError, "the code that was given does not fit the run"):
        bayesnet.load(ours, guide=own)
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 8))
    theirs = make(epochs=1, backbone=network, guide=own, settings={}).fit(X, y).save(tmp_path / "theirs")
    with refusal(ConfigError, "the code that was given does not fit the run"):
        bayesnet.load(theirs, backbone=3, guide=own)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "must be at least 2 (training.batch_size = 0)"),
        ({"seed": None}, "expected int (training.seed): got None"),
        ({"twin": None}, "expected bool (training.twin): got None"),
        ({"settings": 3}, "settings must be sections of keys"),
        ({"settings": []}, "settings must be sections of keys"),
        ({"optimizer": 3}, "the optimizer must be a function (3)"),
        ({"out": 3}, "expected a path (out = 3)"),
        (
            {"settings": {"inference": {"prior_scale": 0.0}}},
            "must be positive and finite (inference.prior_scale = 0.0)",
        ),
    ],
    ids=str,
)
def test_wrong_arguments(
    images: tuple[NDArray[np.uint8], NDArray[np.int64]], arguments: dict[str, Any], text: str
) -> None:
    with refusal(ConfigError, text):
        make(**{"twin": True, "settings": {}, **arguments}).fit(*images)


def test_wrong_calls(images: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    classifier = make(epochs=1).fit(*images)
    with refusal(ConfigError, "must lie between 0 and 1 (level = '0.9')"):
        classifier.predict_interval(images[0], level="0.9")  # type: ignore[arg-type]
    with refusal(ConfigError, "expected a path (path = None)"):
        classifier.save(None)  # type: ignore[arg-type]
    with refusal(ConfigError, "expected a path (run = 3)"):
        bayesnet.load(3)  # type: ignore[arg-type]


def test_a_wrong_setting_of_the_second_model_is_found_before_the_first_is_trained(tmp_path: Path) -> None:
    for override in ("inference.prior_scale=0", "inference.prior_bias_scale=nan"):
        with pytest.raises(ConfigError, match="must be positive and finite"):
            workflows.train(bayesian=True, overrides=(override,), out=tmp_path / "run", devices="cpu")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="the folder of the trace does not exist"):
        workflows.train(bayesian=True, profile=tmp_path / "no" / "trace.json", out=tmp_path / "run", devices="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_other_workers(folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("backbone.width=4", "training.batch_size=16", "data.cache_megabytes=0")
    calls = iter(range(1, 1000))
    with pytest.raises(InterruptedRunError):
        workflows.train(
            data=f"folder:{folder_data}",
            epochs=2,
            workers=2,
            overrides=options,
            out=tmp_path / "run",
            devices="cpu",
            stop_signal=lambda: 15 if next(calls) == 2 else None,
        )
    used = set()

    def reading(*arguments: Any, workers: int) -> object:  # noqa: ANN401 - passed on
        used.add(workers)
        return read_batches(*arguments, workers=workers)

    monkeypatch.setattr("bayesnet.predictive.read_batches", reading)
    resumed = workflows.train(resume=tmp_path / "run", workers=0)
    assert used == {0}, "validation or the test split was read by workers that were asked not to"
    straight = workflows.train(
        data=f"folder:{folder_data}", epochs=2, overrides=options, out=tmp_path / "straight", devices="cpu"
    )
    assert resumed["models"]["deterministic"]["nll"] == straight["models"]["deterministic"]["nll"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
