"""BayesNetClassifier and load: scikit-learn's habits over the same runs that the command line makes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesnet
from bayesnet import BayesNetClassifier
from bayesnet.errors import CheckpointError, ConfigError, DataError, InterruptedRunError, StorageError

NARROW = {"backbone": {"width": 4}, "training": {"batch_size": 128}}
NUM = 300


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    bunch = load_digits()
    return (bunch.images[:NUM] * 15).astype(np.uint8), bunch.target[:NUM]


def make(**arguments: Any) -> BayesNetClassifier:  # noqa: ANN401 - arguments of many types
    return BayesNetClassifier(**{"epochs": 2, "devices": "cpu", "settings": NARROW, **arguments})


@pytest.fixture(scope="module")
def fitted(digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> BayesNetClassifier:
    return make().fit(*digits)


def test_scikit_learns_habits(fitted: BayesNetClassifier, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    images, labels = digits
    probabilities = fitted.predict_proba(images)
    assert probabilities.shape == (NUM, 10)
    assert probabilities.sum(1) == pytest.approx(np.ones(NUM))
    assert fitted.classes_.tolist() == list(range(10))
    assert fitted.predict(images).tolist() == fitted.classes_[probabilities.argmax(1)].tolist()
    assert fitted.score(images, labels) == np.mean(fitted.predict(images) == labels)
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "classes_")
    with pytest.raises(NotFittedError):
        copy.predict(images)
    assert fitted.summary_["data"]["num_train"] == 179
    assert set(fitted.summary_["models"]) == {"bayesian"}
    assert "training.epochs" not in repr(fitted)


def test_cross_validation(digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    scores = cross_val_score(make(epochs=1), *digits, cv=2)
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)


def test_the_same_seed_gives_the_same_classifier_and_another_seed_another(
    fitted: BayesNetClassifier, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    images, labels = digits
    again, other = make().fit(images, labels), make(seed=1).fit(images, labels)
    assert np.array_equal(again.predict_proba(images), fitted.predict_proba(images))
    assert not np.array_equal(other.predict_proba(images), fitted.predict_proba(images))


def test_saved_and_loaded(
    fitted: BayesNetClassifier, digits: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path
) -> None:
    images = digits[0][:20]
    path = fitted.save(tmp_path / "run")
    loaded = bayesnet.load(path, devices="cpu")
    assert np.array_equal(loaded.predict_proba(images), fitted.predict_proba(images))
    assert loaded.classes_.tolist() == fitted.classes_.tolist()
    assert loaded.get_params()["family"] == "mean_field"
    with pytest.raises(ConfigError, match="the data were given to fit and are gone"):
        loaded.calibrate()
    with pytest.raises(StorageError, match="not an empty directory"):
        fitted.save(path)
    with pytest.raises(ConfigError, match=r"the run has bayesian \(model = deterministic\)"):
        bayesnet.load(path, model="deterministic")
    with pytest.raises(DataError, match="the run's data were given from Python"):
        bayesnet.calibrate(path)
    classes = json.loads((path / "classes.json").read_text())
    (path / "classes.json").write_text(json.dumps({**classes, "labels": list(range(9))}))
    with pytest.raises(CheckpointError, match="the labels differ from the run's classes"):
        bayesnet.load(path)


def test_calibrated_with_its_twin(digits: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path) -> None:
    images, labels = digits
    classifier = make(twin=True, epochs=3).fit(images, labels)
    before = classifier.predict_proba(images)
    with pytest.raises(ConfigError, match="there are no label sets yet"):
        classifier.predict_set(images)
    record = classifier.calibrate(alpha=0.2)
    assert set(record["models"]) == {"deterministic", "bayesian"}
    assert not np.array_equal(before, classifier.predict_proba(images))
    sets = classifier.predict_set(images)
    assert all(label in range(10) for members in sets for label in members)
    twin = bayesnet.load(classifier.save(tmp_path / "run"), model="deterministic", devices="cpu")
    interval = twin.predict_interval(images[:5])
    assert np.array_equal(interval.lower_NK, interval.upper_NK)
    assert interval.kind == "range of 1 draw"


def test_labels_of_any_kind_come_back(digits: tuple[NDArray[np.uint8], NDArray[np.int64]], tmp_path: Path) -> None:
    images, labels = digits[0], np.array(["zero", "one"])[(digits[1] % 2).astype(int)]
    classifier = make(epochs=1).fit(images, labels)
    assert classifier.classes_.tolist() == ["one", "zero"]
    assert set(classifier.predict(images)) <= {"one", "zero"}
    assert bayesnet.load(classifier.save(tmp_path / "run")).classes_.tolist() == ["one", "zero"]


def test_data_sets_loaders_floats_and_own_splits(digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    images, labels = torch.from_numpy(digits[0])[:, None].float() / 255, torch.from_numpy(digits[1])
    dataset = TensorDataset(images, labels)
    classifier = make(epochs=1, settings={"backbone": {"width": 4}})
    classifier.fit(DataLoader(dataset, batch_size=100, shuffle=True), test=(images[:60], labels[:60]))
    assert classifier.summary_["data"]["num_test"] == 60
    assert "batch_size = 100" in (classifier.run_ / "config.toml").read_text()
    assert np.array_equal(classifier.predict_proba(images[:10]), classifier.predict_proba(dataset)[:10])
    with pytest.raises(DataError, match="the images do not fit the model"):
        classifier.predict(digits[0][:3])  # uint8 for a model of floating-point images


def test_files_and_pil_images(folder_data: Path, tmp_path: Path) -> None:
    classifier = make(epochs=1, settings={"backbone": {"width": 4}}).fit(f"folder:{folder_data}")
    paths = sorted((folder_data / "red").iterdir())[:3]
    from_paths = classifier.predict_proba(paths)
    from_images = classifier.predict_proba([Image.open(path) for path in paths])
    assert np.array_equal(from_paths, from_images)
    assert np.array_equal(classifier.predict_proba(str(folder_data / "red"))[:3], from_paths)
    assert classifier.classes_.tolist() == ["blue", "green", "red"]
    rows = bayesnet.predict([str(path) for path in paths], run=classifier.run_, devices="cpu")["predictions"]
    assert [row["probability"] for row in rows] == from_paths.max(1).tolist()


def test_an_interrupted_fit_goes_on_bit_equal(
    digits: tuple[NDArray[np.uint8], NDArray[np.int64]], fitted: BayesNetClassifier, tmp_path: Path
) -> None:
    calls = iter(range(1, 1000))
    classifier = make(out=tmp_path / "run")
    with pytest.raises(InterruptedRunError):
        classifier.fit(*digits, stop_signal=lambda: 15 if next(calls) == 3 else None)
    with pytest.raises(DataError, match="the data set has changed since the run began"):
        classifier.fit(digits[0][:250], digits[1][:250], resume=True)
    classifier.fit(*digits, resume=True)
    assert np.array_equal(classifier.predict_proba(digits[0]), fitted.predict_proba(digits[0]))
    assert classifier.run_ == tmp_path / "run"


def test_an_own_optimizer(digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    made: list[torch.optim.Optimizer] = []

    def factory(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(torch.optim.RMSprop(groups, lr=0.01))
        return made[-1]

    make(epochs=1, optimizer=factory).fit(*digits)
    assert len(made) == 2, "one is tried before the training"
    assert made[-1].state


@contextlib.contextmanager
def refusal(kind: type[Exception], text: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert str(caught.value).startswith(text), str(caught.value)


def test_wrong_input(digits: tuple[NDArray[np.uint8], NDArray[np.int64]], fitted: BayesNetClassifier) -> None:
    images, labels = digits
    with refusal(ConfigError, "unknown family (mean_feild): did you mean 'mean_field'?"):
        make(family="mean_feild").fit(images, labels)
    with refusal(ConfigError, "unknown backbone (smal_cnn): did you mean 'small_cnn'?"):
        make(backbone="smal_cnn").fit(images, labels)
    with refusal(ConfigError, "unknown configuration key (data.flop): did you mean 'data.flip'?"):
        make(settings={"data": {"flop": True}}).fit(images, labels)
    with refusal(ConfigError, "the backbone must give features of shape (B, D)"):
        make(backbone=nn.Conv2d(1, 2, 3), settings={}).fit(images, labels)
    with refusal(DataError, "expected one label per image"):
        make().fit(images, labels[:-1])
    with refusal(ConfigError, "resume needs the run directory (out)"):
        make().fit(images, labels, resume=True)
    with refusal(ConfigError, "must lie between 0 and 1 (level = 1.5)"):
        fitted.predict_interval(images[:2], level=1.5)
    with refusal(DataError, "the images do not fit the model"):
        fitted.predict(np.zeros((2, 9, 9), np.uint8))
