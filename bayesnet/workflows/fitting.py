"""Training one model of a run: from its newest valid checkpoint where there is one, every epoch on record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bayesnet import storage, strict_json
from bayesnet.batches import TrainingData
from bayesnet.checkpoint import Checkpoint, newest_checkpoint, prune_checkpoints, save_checkpoint
from bayesnet.data import ImageData
from bayesnet.data.augment import Augmentation
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError, DivergedError
from bayesnet.inference.base import Posterior
from bayesnet.progress import EpochReport, FitResult, Progress, whole_fit
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.training import MODEL_PREFIX, Listener, fit, median_scale
from bayesnet.types import JsonObject
from bayesnet.workflows.environment import versions
from bayesnet.workflows.finalizing import DIVERGED_HINT
from bayesnet.workflows.trained import NO_USER_CODE, UserCode, make_predictor


class TrainListener(Listener):
    """Hears of a whole training run; the default does nothing."""

    def on_model(self, name: str, family: str) -> None:
        """Called before a model is trained."""

    def on_member(self, number: int, num_members: int) -> None:
        """Called before each member of a model of several is trained, from 1; the default says so in a note."""
        self.on_note(f"Member {number} of {num_members}.")


class RunContext(NamedTuple):
    """What training needs that is the same for all models of a run."""

    run: RunDirectory
    data: ImageData
    engine: Engine
    listener: TrainListener
    stop_signal: Callable[[], int | None]
    user: UserCode = NO_USER_CODE
    workers: int = 0


class _Recorder(Listener):
    """Writes each epoch to metrics.jsonl and passes everything on."""

    def __init__(self, run: RunDirectory, label: JsonObject, listener: Listener) -> None:
        self.run, self.label, self.listener = run, label, listener

    def on_note(self, text: str) -> None:
        """Pass it on."""
        self.listener.on_note(text)

    def on_step(self, step: int, num_steps: int) -> None:
        """Pass it on."""
        self.listener.on_step(step, num_steps)

    def on_epoch(self, report: EpochReport, num_epochs: int) -> None:
        """Append the report to metrics.jsonl, then pass it on."""
        self.run.append_metrics(self.label | report._asdict())
        self.listener.on_epoch(report, num_epochs)

    def on_fitted(self, num_epochs: int) -> None:
        """Pass it on."""
        self.listener.on_fitted(num_epochs)


class Slot(NamedTuple):
    """Which part of which model is trained, and where its checkpoints go.

    Attributes:
        label: What tells its lines in metrics.jsonl and its checkpoints from those of others: ``model`` and
            ``member``, ``fold`` or ``start``.
        directory: Of its checkpoints.
        seed: Of initial order, augmentation and posterior noise.
    """

    label: JsonObject
    directory: Path
    seed: int


def fit_part(
    posterior: Posterior,
    slot: Slot,
    settings: Settings,
    context: RunContext,
    metadata: JsonObject,
    *,
    augmentation: Augmentation | None = None,
    profile: Path | None = None,
) -> FitResult:
    """Train a posterior from the newest valid checkpoint of its slot.

    Args:
        posterior: Untrained.
        slot: Where it belongs.
        settings: Of its model.
        context: Of the run; its data are what is trained on.
        metadata: What its checkpoints say besides the slot's label.
        augmentation: Of the training images; None takes that of the settings.
        profile: File for a trace of a few steps.

    Raises:
        CheckpointError: The checkpoint to go on from belongs to other settings or data.
        DivergedError: See `bayesnet.training.fit`.
        InterruptedRunError: A signal arrived; the checkpoint is committed.
    """
    run, data, engine, listener, stop_signal, user, workers = context
    checkpoint, rejected = newest_checkpoint(slot.directory)
    for reason in rejected:
        listener.on_note(reason)
    metadata = metadata | slot.label
    if checkpoint is not None:
        _check_same_run(checkpoint, metadata)
        _restore_metrics(run, slot.label, Progress.from_json(checkpoint.state.get("progress", {})))
    if augmentation is None:
        augmentation = Augmentation.from_config(settings.data)
    return fit(
        posterior,
        TrainingData(data.train, data.preprocessing, augmentation, workers),
        validator(settings, data, engine, workers),
        slot.directory,
        engine=engine,
        optimizer=settings.optimizer,
        training=replace(settings.training, seed=slot.seed),
        metadata=metadata,
        resume=checkpoint,
        listener=_Recorder(run, slot.label, listener),
        stop_signal=stop_signal,
        optimizer_factory=user.optimizer,
        profile=profile,
    )


def commit_whole(
    posterior: Posterior,
    fits: Sequence[FitResult],
    name: str,
    settings: Settings,
    context: RunContext,
    metadata: JsonObject,
    *,
    seconds: float,
) -> FitResult:
    """Validate what became of a model's parts and make it the one checkpoint of the model.

    Args:
        posterior: As it is to be used.
        fits: How the parts were trained.
        name: Of the model.
        settings: Of the model.
        context: Of the run.
        metadata: What the checkpoint says.
        seconds: Time since the parts were trained.

    Raises:
        DivergedError: Its validation loss is not finite.
    """
    started = time.perf_counter()
    validation_nll = validator(settings, context.data, context.engine, context.workers)(posterior)
    if not math.isfinite(validation_nll):
        what = "the finalized model has no finite validation loss"
        raise DivergedError(what, where=settings.inference.family, hint=DIVERGED_HINT)
    step = sum(fitted.report.step for fitted in fits)
    tensors = {MODEL_PREFIX + key: tensor for key, tensor in posterior.state_dict().items()}
    path = save_checkpoint(context.run.model_checkpoints(name), step, tensors, metadata)
    prune_checkpoints(path.parent, keep={step})
    return whole_fit(
        path,
        fits,
        validation_nll=validation_nll,
        posterior_scale=median_scale(posterior),
        finalize_seconds=seconds + time.perf_counter() - started,
    )


def make_model_directory(run: RunDirectory, name: str) -> None:
    """Make the directory of a model and its parent, which writing a checkpoint of a part does not.

    Raises:
        StorageError: The file system refused.
    """
    directory = run.model_checkpoints(name).parent
    with storage.storage_errors("cannot create the directory", directory):
        storage.make_directories(directory, levels=2)


def model_metadata(name: str, settings: Settings, data: ImageData, num_examples: int) -> JsonObject:
    """Return what every checkpoint says of itself: all that is needed to use it without the rest of the run."""
    return {
        "model": name,
        "settings": settings.to_mapping(),
        "classes": list(data.classes),
        "preprocessing": data.preprocessing.to_json(),
        "num_examples": num_examples,
        "fingerprint": data.fingerprint,
        "versions": versions(),
    }


def _check_same_run(checkpoint: Checkpoint, metadata: JsonObject) -> None:
    """Raise CheckpointError where a checkpoint was made under other settings or from other data."""
    for key in ("model", "member", "fold", "start", "settings", "classes", "preprocessing", "fingerprint", "features"):
        if strict_json.json_ready(metadata.get(key)) != checkpoint.state.get(key):
            hint = "restore the run's config.toml, or train again"
            raise CheckpointError(f"the checkpoint was made with other {key}", where=checkpoint.path, hint=hint)


def _restore_metrics(run: RunDirectory, label: JsonObject, progress: Progress) -> None:
    """Make metrics.jsonl agree with the checkpoint, which is the truth: a kill may fall between the two writes."""
    lines = run.read_metrics() if run.metrics.exists() else []
    others = [
        line for line in lines if any(line.get(key) != label.get(key) for key in ("model", "member", "fold", "start"))
    ]
    storage.write_lines(run.metrics, others + [label | report._asdict() for report in progress.reports])


def validator(settings: Settings, data: ImageData, engine: Engine, workers: int) -> Callable[[Posterior], float]:
    """Return the function that gives a posterior's mean NLL on the validation split, nats."""

    def validate(posterior: Posterior) -> float:
        predictor = make_predictor(posterior, settings, data.preprocessing, engine, workers=workers)
        return predictor.mean_nll(data.validation)

    return validate
