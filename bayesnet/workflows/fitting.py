"""Training one model of a run: from its newest valid checkpoint where there is one, every epoch on record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bayesnet import storage, strict_json
from bayesnet.batches import TrainingData
from bayesnet.checkpoint import Checkpoint, newest_checkpoint
from bayesnet.data import ImageData
from bayesnet.data.augment import Augmentation
from bayesnet.data.sampling import effective_size
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError
from bayesnet.inference.base import Posterior
from bayesnet.progress import EpochReport, FitResult, Progress
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.training import Listener, fit
from bayesnet.types import JsonObject
from bayesnet.workflows.environment import versions
from bayesnet.workflows.trained import NO_USER_CODE, UserCode, make_predictor, new_posterior


class TrainListener(Listener):
    """Hears of a whole training run; the default does nothing."""

    def on_model(self, name: str, family: str) -> None:
        """Called before a model is trained."""


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

    def __init__(self, run: RunDirectory, name: str, listener: Listener) -> None:
        self.run, self.name, self.listener = run, name, listener

    def on_note(self, text: str) -> None:
        """Pass it on."""
        self.listener.on_note(text)

    def on_step(self, step: int, num_steps: int) -> None:
        """Pass it on."""
        self.listener.on_step(step, num_steps)

    def on_epoch(self, report: EpochReport, num_epochs: int) -> None:
        """Append the report to metrics.jsonl, then pass it on."""
        self.run.append_metrics(_metrics_line(self.name, report))
        self.listener.on_epoch(report, num_epochs)

    def on_fitted(self, num_epochs: int) -> None:
        """Pass it on."""
        self.listener.on_fitted(num_epochs)


def fit_model(name: str, settings: Settings, context: RunContext, *, profile: Path | None = None) -> FitResult:
    """Train one model of a run, going on where its newest valid checkpoint stands.

    Args:
        name: "deterministic" or "bayesian".
        settings: Of this model.
        context: Of the run.
        profile: File for a trace of a few steps.

    Raises:
        CheckpointError: The checkpoint to go on from belongs to other settings or data.
        DivergedError: See `bayesnet.training.fit`.
        InterruptedRunError: A signal arrived; the checkpoint is committed.
    """
    run, data, engine, listener, stop_signal, user, workers = context
    directory = run.model_checkpoints(name)
    checkpoint, rejected = newest_checkpoint(directory)
    for reason in rejected:
        listener.on_note(reason)
    num_examples = effective_size(data.train.labels_N, balanced=settings.training.balanced)
    metadata = _metadata(name, settings, data, num_examples)
    if checkpoint is not None:
        _check_same_run(checkpoint, metadata)
        _restore_metrics(run, name, Progress.from_json(checkpoint.state.get("progress", {})))
    listener.on_model(name, settings.inference.family)
    augmentation = Augmentation.from_config(settings.data)
    return fit(
        new_posterior(
            settings, data.preprocessing, len(data.classes), num_examples, user, load_weights=checkpoint is None
        ),
        TrainingData(data.train, data.preprocessing, augmentation, workers),
        _validator(settings, data, engine, workers),
        directory,
        engine=engine,
        optimizer=settings.optimizer,
        training=settings.training,
        metadata=metadata,
        resume=checkpoint,
        listener=_Recorder(run, name, listener),
        stop_signal=stop_signal,
        optimizer_factory=user.optimizer,
        profile=profile,
    )


def _metadata(name: str, settings: Settings, data: ImageData, num_examples: int) -> JsonObject:
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
    for key in ("model", "settings", "classes", "preprocessing", "fingerprint"):
        if strict_json.json_ready(metadata[key]) != checkpoint.state.get(key):
            hint = "restore the run's config.toml, or train again"
            raise CheckpointError(f"the checkpoint was made with other {key}", where=checkpoint.path, hint=hint)


def _restore_metrics(run: RunDirectory, name: str, progress: Progress) -> None:
    """Make metrics.jsonl agree with the checkpoint, which is the truth: a kill may fall between the two writes."""
    others = [line for line in run.read_metrics() if line.get("model") != name] if run.metrics.exists() else []
    lines = others + [_metrics_line(name, report) for report in progress.reports]
    storage.write_lines(run.metrics, lines)


def _metrics_line(name: str, report: EpochReport) -> JsonObject:
    return {"model": name, **report._asdict()}


def _validator(settings: Settings, data: ImageData, engine: Engine, workers: int) -> Callable[[Posterior], float]:
    """Return the function that gives a posterior's mean NLL on the validation split, nats."""

    def validate(posterior: Posterior) -> float:
        predictor = make_predictor(posterior, settings, data.preprocessing, engine, workers=workers)
        return predictor.mean_nll(data.validation)

    return validate
