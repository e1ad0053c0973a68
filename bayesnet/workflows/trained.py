"""From settings to an untrained posterior, and from a run directory back to a trained one."""

from __future__ import annotations

import shlex
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bayesnet.backbones import build_backbone
from bayesnet.backbones.features import StandardizedFeatures
from bayesnet.calibration import Calibrator
from bayesnet.checkpoint import load_checkpoint, step_name
from bayesnet.config import read_toml, require
from bayesnet.data import DataConfig, ImageData, Preprocessing, load_data
from bayesnet.engine import Engine
from bayesnet.errors import BayesnetError, CheckpointError, ConfigError, DataError
from bayesnet.inference import FAMILIES, build_posterior
from bayesnet.inference.base import GuideFactory, Parts, Posterior
from bayesnet.optim import OptimizerFactory
from bayesnet.predictive import Predictor
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings, build_settings
from bayesnet.training import restore_model
from bayesnet.types import JsonObject

MODEL_NAMES = ("deterministic", "bayesian")
MEASURED = ("accuracy", "nll", "brier", "ece", "ace", "mce", "aurc", "auroc_error")
EVALUATION = (*MEASURED, "num_test", "ci95")
"""What every evaluation on the test split holds, before and after calibration: frozen, so old runs stay readable."""

PYTHON_DATA = "python"
"""The spec of data that were given from Python."""

_DATA_KEYS = ("name", "classes", "num_train", "num_validation", "num_calibration", "num_test")
_FIT_KEYS = (
    "family",
    "posterior_temperature",
    "step",
    "digest",
    "train_nll",
    "kl",
    "kl_is_exact",
    "kl_per_example",
    "posterior_scale",
    "seconds",
)


class UserCode(NamedTuple):
    """What a caller gives from Python: code, which no file of a run holds.

    Attributes:
        backbone: A module from images (B, C, H, W) to features (B, D), for ``backbone.name = "custom"``; copied.
        guide: A function from the head's Pyro program to a guide, for ``inference.guide = "custom"``.
        optimizer: Makes the optimizer of the parameters that are not variational.
    """

    backbone: nn.Module | None = None
    guide: GuideFactory | None = None
    optimizer: OptimizerFactory | None = None


NO_USER_CODE = UserCode()


class TrainedModel(NamedTuple):
    """A model read from a run, its checkpoint verified.

    Attributes:
        name: "deterministic" or "bayesian".
        settings: What it was trained with.
        posterior: In evaluation mode, on the CPU.
        preprocessing: Of its training images.
        classes: Names in index order.
        digest: Of its checkpoint.
        num_examples: N, training images.
    """

    name: str
    settings: Settings
    posterior: Posterior
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    digest: str
    num_examples: int

    def predictor(
        self,
        engine: Engine,
        *,
        calibrator: Calibrator | None = None,
        num_samples: int | None = None,
        workers: int | None = None,
    ) -> Predictor:
        """Return the predictor that the run's own settings describe, but for what is given."""
        return make_predictor(
            self.posterior,
            self.settings,
            self.preprocessing,
            engine,
            calibrator=calibrator,
            num_samples=num_samples,
            workers=workers,
        )


def make_predictor(
    posterior: Posterior,
    settings: Settings,
    preprocessing: Preprocessing,
    engine: Engine,
    *,
    calibrator: Calibrator | None = None,
    num_samples: int | None = None,
    workers: int | None = None,
) -> Predictor:
    """Return the predictor of a posterior with the draws, chunks and workers of its settings, but for what is given."""
    return Predictor(
        posterior,
        preprocessing,
        engine=engine,
        num_samples=num_samples or settings.predict.samples,
        chunk_size=settings.predict.chunk_size,
        calibrator=calibrator,
        workers=settings.data.workers if workers is None else workers,
    )


def model_name(settings: Settings) -> str:
    """Return under which name a run keeps the model that these settings describe."""
    return "bayesian" if FAMILIES[settings.inference.family].bayesian else "deterministic"


def new_posterior(
    settings: Settings,
    preprocessing: Preprocessing,
    num_classes: int,
    num_examples: int,
    user: UserCode = NO_USER_CODE,
    *,
    load_weights: bool = True,
) -> Posterior:
    """Return an untrained posterior, initialised from ``training.seed``; the caller's random state is left alone.

    Args:
        settings: Of the model.
        preprocessing: Says the size of its input.
        num_classes: K.
        num_examples: N of KL / N.
        user: The caller's own backbone and guide, where the settings name them.
        load_weights: Whether to read the backbone's pretrained weights; False where a checkpoint holds all of them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        channels, height, width = preprocessing.shape
        new_backbone = partial(
            build_backbone,
            settings.backbone,
            channels=channels,
            height=height,
            width=width,
            module=user.backbone,
            load_weights=load_weights,
        )
        seed = settings.training.seed

        def make() -> nn.Module:
            return StandardizedFeatures(new_backbone()) if settings.head.mode == "head" else new_backbone()

        parts = Parts(make(), num_classes, num_examples, seed, user.guide, make)
        return build_posterior(parts, settings.inference)


def read_settings(run: RunDirectory) -> Settings:
    """Return the settings of a run.

    Raises:
        CheckpointError: Its config.toml is missing or not valid.
    """
    try:
        return build_settings(read_toml(run.config))
    except ConfigError as error:
        raise CheckpointError("the run's configuration is not valid", where=run.config, hint=str(error)) from error


def read_data(
    run: RunDirectory, settings: Settings, preprocessing: Preprocessing, given: ImageData | None = None
) -> ImageData:
    """Return the data set of a run, made sure to be the one that it was trained on, preprocessed as it was then.

    Args:
        run: The run.
        settings: Its settings.
        preprocessing: Of its models.
        given: The data, where they were given from Python.

    Raises:
        DataError: The data set is gone, unreadable, or not what it was.
    """
    data = given or load_again(settings.data, preprocessing)
    if data.fingerprint != run.read_summary().get("fingerprint"):
        raise DataError("the data set has changed since training", where=data.spec, hint="restore it, or train again")
    return data


def load_again(config: DataConfig, preprocessing: Preprocessing | None = None) -> ImageData:
    """Return the data that a run's settings name.

    Raises:
        DataError: They were given from Python; no file says what they are.
    """
    if config.spec == PYTHON_DATA:
        hint = "go on in Python: BayesNetClassifier, or workflows with data=..."
        raise DataError("the run's data were given from Python", where=config.spec, hint=hint)
    return load_data(config, preprocessing)


def trained_names(summary: JsonObject, where: Path) -> tuple[str, ...]:
    """Return the names of the models in a run's summary, the twin first.

    Raises:
        CheckpointError: There are none.
    """
    models = summary.get("models")
    names = tuple(name for name in MODEL_NAMES if isinstance(models, dict) and name in models)
    if not names:
        raise CheckpointError("the run has no trained model", where=where, hint="train again")
    return names


def resume_command(run: RunDirectory) -> str:
    """Return the command that goes on with a run, ready to be pasted into a shell."""
    return f"bayesnet train --resume {shlex.quote(str(run.path))}"


def read_finished(run: RunDirectory) -> JsonObject:
    """Return the summary of a finished run, checked to have all that is shown of it.

    Raises:
        CheckpointError: The run is not finished, or its summary is damaged or lacks something that `train` writes.
    """
    if not run.is_finished:
        raise CheckpointError("the run is not finished", where=run.path, hint=f"finish it with `{resume_command(run)}`")
    summary = run.read_summary()
    names = trained_names(summary, run.path)
    try:
        parts = [(summary, ("run", "fingerprint", "seconds")), (summary["data"], _DATA_KEYS)]
        for model in (summary["models"][name] for name in names):
            parts += [(model, (*_FIT_KEYS, *EVALUATION)), (model["ci95"], MEASURED)]
            parts += [(model["posterior_scale"], ("initial", "final"))]
        for part, keys in parts:
            itemgetter(*keys)(part)
    except (KeyError, TypeError) as error:
        raise CheckpointError("the summary is not whole", where=run.summary, hint=f"it lacks {error}") from error
    return summary


def source_model(run: RunDirectory) -> str:
    """Return which model of a finished run lends its backbone: the twin where there is one.

    Raises:
        CheckpointError: The run is not finished, or has no model.
    """
    return trained_names(read_finished(run), run.path)[0]


def load_model(run: RunDirectory, name: str, user: UserCode = NO_USER_CODE) -> TrainedModel:
    """Return a model of a finished run.

    Its checkpoint must be the one that the run's summary names, byte for byte. Settings, classes and preprocessing come
    from inside it, and classes.json must agree.

    Args:
        run: The run.
        name: "deterministic" or "bayesian".
        user: The code that it was trained with where that was the caller's own.

    Raises:
        CheckpointError: Something is missing, damaged, tampered with, or does not fit together.
    """
    summary = run.read_summary()
    try:
        record = summary["models"][name]
        step, digest = step_name(int(record["step"])), str(record["digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the run has no finished {name} model", where=run.path) from error
    checkpoint = load_checkpoint(run.model_checkpoints(name) / step, digest=digest)
    try:
        state = checkpoint.state
        settings = build_settings(state["settings"])
        preprocessing = Preprocessing.from_json(state["preprocessing"])
        classes = tuple(str(entry) for entry in state["classes"])
        num_examples = int(state["num_examples"])
        check_user_code(settings, user, run.path)
        posterior = new_posterior(settings, preprocessing, len(classes), num_examples, user, load_weights=False)
    except CheckpointError:
        raise
    except (BayesnetError, KeyError, TypeError, ValueError) as error:
        if user != NO_USER_CODE:  # the file is not to blame
            raise ConfigError(
                "the code that was given does not fit the run", where=run.path, hint=str(error)
            ) from error
        raise CheckpointError("malformed checkpoint state", where=checkpoint.path, hint=str(error)) from error
    if run.read_json(run.classes.name).get("classes") != list(classes):
        raise CheckpointError("classes.json differs from the checkpoint's classes", where=run.classes)
    restore_model(posterior, checkpoint)
    return TrainedModel(name, settings, posterior.eval(), preprocessing, classes, checkpoint.digest, num_examples)


def check_user_code(settings: Settings, user: UserCode, path: Path) -> None:
    """Raise CheckpointError where a run was trained with code of the caller's that is not given."""
    hint = "use bayesnet.load(run, backbone=..., guide=...) in Python"
    own_backbone, own_guide = settings.backbone.name == "custom", getattr(settings.inference, "guide", None) == "custom"
    if own_backbone and user.backbone is None:
        raise CheckpointError("the run's backbone is its author's own module", where=path, hint=hint)
    if own_guide and user.guide is None and model_name(settings) == "bayesian":
        raise CheckpointError("the run's guide is its author's own", where=path, hint=hint)
    require(own_backbone or user.backbone is None, "the run has a backbone of ours", where=settings.backbone.name)
    unasked = user.guide is not None and not own_guide and model_name(settings) == "bayesian"
    require(not unasked, "the run has a guide of ours", where=settings.inference.family)


def check_optimizer(settings: Settings, user: UserCode, path: Path) -> None:
    """Raise CheckpointError where a run that is to go on was begun with an optimizer that is not given."""
    if (settings.optimizer.name == "custom") != (user.optimizer is not None):
        what = "the run's optimizer is its author's own" if user.optimizer is None else "the run has its own optimizer"
        raise CheckpointError(what, where=path, hint="give BayesNetClassifier the same optimizer=... and resume=True")
