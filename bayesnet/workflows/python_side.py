"""What Python callers give, made what the workflows take: settings, images, paths, labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bayesnet.config import merge, require
from bayesnet.data import Examples, FileExamples, ImageData, Preprocessing
from bayesnet.data.finding import image_paths
from bayesnet.data.python_data import unlabelled
from bayesnet.errors import CheckpointError
from bayesnet.rundir import RunDirectory
from bayesnet.settings import TWIN, Settings, build_settings, read_config
from bayesnet.types import JsonObject
from bayesnet.workflows.calibrated import CalibratedModel, load_calibrated
from bayesnet.workflows.trained import (
    PYTHON_DATA,
    UserCode,
    read_finished,
    trained_names,
)

_HASHED_AT_ONCE = 256


def fit_settings(
    X: object,
    *,
    family: str,
    backbone: str | nn.Module,
    guide: object,
    optimizer: object,
    training: Mapping[str, object],
    devices: str,
    settings: Mapping[str, Mapping[str, Any]] | None,
) -> Settings:
    """Return the settings of a fit: the recipe for own images without its augmentation, arguments, then ``settings``.

    Args:
        X: What is fitted: a text names data as the command line does.
        family: Posterior family; a guide overrules it.
        backbone: Its name, or the caller's own module.
        guide: The caller's own, or None.
        optimizer: The caller's own, or None.
        training: Keys of the section ``training``; None leaves the recipe's.
        devices: As in ``engine.devices``.
        settings: Sections that overrule all of it.

    Raises:
        ConfigError: Anything in it is unknown or out of range.
    """
    given = {} if settings is None else settings
    what = "settings must be sections of keys, such as {'data': {'flip': True}}"
    sections = isinstance(given, Mapping) and all(isinstance(each, Mapping) for each in given.values())
    require(sections, what, where=f"settings = {given!r}")
    require(optimizer is None or callable(optimizer), "the optimizer must be a function", where=f"{optimizer!r}")
    family = "guide" if guide is not None else family
    mapping = read_config(f"folder/{TWIN if family == TWIN else 'mean_field'}")
    arguments: dict[str, Mapping[str, Any]] = {
        "data": {"spec": X} if isinstance(X, str) else {"spec": PYTHON_DATA, "crop_padding": 0, "flip": False},
        "backbone": {"name": "custom" if isinstance(backbone, nn.Module) else backbone},
        "training": {k: v for k, v in training.items() if v is not None or k in ("seed", "twin")},
        "engine": {"devices": devices},
        "optimizer": {} if optimizer is None else {"name": "custom"},
    }
    inference = {"family": family} if guide is None else {"family": family, "guide": "custom"}
    whole = merge(merge(mapping | {"inference": inference}, arguments), given)
    return build_settings({section: _plain(values) for section, values in whole.items()})


def loaded_arguments(settings: Settings) -> dict[str, Any]:
    """Return the arguments of BayesNetClassifier that describe a run: named ones, and ``settings`` for the rest."""
    mapping = settings.to_mapping()
    mapping.pop("engine")
    mapping["data"].pop("spec")
    if mapping["optimizer"]["name"] == "custom":
        mapping["optimizer"].pop("name")
    named = {key: mapping["training"].pop(key) for key in ("epochs", "batch_size", "seed", "twin")}
    family, name = mapping["inference"].pop("family"), mapping["backbone"].pop("name")
    return {**named, "family": family, "backbone": name, "settings": mapping}


def images_of(X: object, preprocessing: Preprocessing) -> Examples:
    """Return images to predict: files where paths are given, else whatever `unlabelled` takes."""
    paths = [X] if isinstance(X, str | Path) else X
    if isinstance(paths, Sequence) and paths and all(isinstance(path, str | Path) for path in paths):
        files = image_paths(paths)
        return FileExamples(files, torch.zeros(len(files), dtype=torch.int64), preprocessing)
    return unlabelled(X, preprocessing)


def checked_path(path: object, where: str) -> Path:
    """Return a path that a caller gave."""
    valid = isinstance(path, str | Path) and "\0" not in str(path)
    require(valid, "expected a path", where=f"{where} = {path!r}")
    assert isinstance(path, str | Path)
    return Path(path)


def is_new(directory: Path) -> bool:
    """Return whether nothing is there yet, or an empty directory."""
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def _plain(values: object) -> object:
    """Return settings with NumPy's numbers as Python's, as parameter grids give them."""
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    return values.item() if isinstance(values, np.generic) else values


def held_out_digest(data: ImageData | None) -> str:
    """Return the SHA-256 of what `calibrate` will read: arrays are not copied, so their owner may write to them."""
    digest = hashlib.sha256()
    for split in () if data is None else (data.calibration, data.test):
        digest.update(split.labels_N.numpy().tobytes())
        for indices_B in torch.arange(len(split)).split(_HASHED_AT_ONCE):
            digest.update(split.read(indices_B).numpy().tobytes())
    return digest.hexdigest()


def read_labels(run: RunDirectory, classes: Sequence[str]) -> NDArray[Any]:
    """Return the labels (K,) in class order: those of `fit`, or the names of the classes.

    Raises:
        CheckpointError: They do not belong to these classes.
    """
    labels: object = run.read_json(run.classes.name).get("labels", list(classes))
    if not isinstance(labels, list) or [str(label) for label in labels] != list(classes):
        raise CheckpointError("the labels differ from the run's classes", where=run.classes)
    one_kind = len({type(label) for label in labels}) == 1 or all(type(label) in (int, float) for label in labels)
    return np.array(labels, dtype=None if one_kind else object)


def model_of(run: RunDirectory, model: str | None, user: UserCode) -> tuple[JsonObject, CalibratedModel]:
    """Return a finished run's summary, and the model that is named, or the Bayesian one where there is one."""
    summary = read_finished(run)
    names = trained_names(summary, run.path)
    require(model is None or model in names, f"the run has {', '.join(names)}", where=f"model = {model}")
    return summary, load_calibrated(run, model or names[-1], user._replace(optimizer=None))
