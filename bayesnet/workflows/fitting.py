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
from bayesnet.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from bayesnet.data import ImageData
from bayesnet.data.augment import Augmentation
from bayesnet.data.sampling import effective_size
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError, DivergedError
from bayesnet.inference.base import Posterior
from bayesnet.progress import EpochReport, FitResult, Progress, whole_fit
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.training import MODEL_PREFIX, Listener, fit, median_scale, restore_model
from bayesnet.types import JsonObject
from bayesnet.workflows.environment import versions
from bayesnet.workflows.finalizing import DIVERGED_HINT, finalize_posterior, has_finalize
from bayesnet.workflows.trained import NO_USER_CODE, UserCode, make_predictor, new_posterior


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


def fit_model(name: str, settings: Settings, context: RunContext, *, profile: Path | None = None) -> FitResult:
    """Train one model of a run, member after member, and finalize it, going on where its checkpoints stand.

    A posterior that is its own only member and needs no finalizing is trained in ``models/NAME/checkpoints``, and the
    run uses one of its epochs. Otherwise members are trained in ``models/NAME/member-I/checkpoints``, and what becomes
    of them is the one checkpoint of ``models/NAME/checkpoints``: made again where a kill came before the run's end.

    Args:
        name: "deterministic" or "bayesian".
        settings: Of this model.
        context: Of the run.
        profile: File for a trace of a few steps, of the last member.

    Raises:
        CheckpointError: The checkpoint to go on from belongs to other settings or data.
        DivergedError: See `bayesnet.training.fit`; or finalizing gave something that is not finite.
        InterruptedRunError: A signal arrived; the checkpoint is committed.
    """
    num_examples = effective_size(context.data.train.labels_N, balanced=settings.training.balanced)
    metadata = _metadata(name, settings, context.data, num_examples)
    posterior, directories = _members(name, settings, context, num_examples)
    context.listener.on_model(name, settings.inference.family)
    fits = []
    for number, (member, directory) in enumerate(zip(posterior.members(), directories, strict=True), 1):
        last = number == len(directories)
        slot = _Slot(name, number, len(directories), directory)
        fits.append(_fit_member(member, slot, settings, context, metadata, profile if last else None))
    if directories == (context.run.model_checkpoints(name),):
        return fits[0]
    return _finish(posterior, fits, name, settings, context, metadata)


class _Slot(NamedTuple):
    """Which member of which model is trained, and where its checkpoints go."""

    name: str
    number: int
    num_members: int
    directory: Path

    @property
    def label(self) -> JsonObject:
        """What tells its lines in metrics.jsonl and its checkpoints from those of others."""
        return {"model": self.name} | ({"member": self.number} if self.num_members > 1 else {})


def _members(
    name: str, settings: Settings, context: RunContext, num_examples: int
) -> tuple[Posterior, tuple[Path, ...]]:
    """Return the untrained posterior and where each of its members keeps its checkpoints."""
    data, run = context.data, context.run

    def build(*, load_weights: bool) -> Posterior:
        classes = len(data.classes)
        return new_posterior(
            settings, data.preprocessing, classes, num_examples, context.user, load_weights=load_weights
        )

    own = run.model_checkpoints(name)
    begun = bool(list_checkpoints(own) or list_checkpoints(_member_checkpoints(run, name, 1)))
    posterior = build(load_weights=not begun)
    members = posterior.members()
    if len(members) == 1 and not has_finalize(settings):
        return posterior, (own,)
    directories = tuple(_member_checkpoints(run, name, number) for number in range(1, len(members) + 1))
    if begun and not all(list_checkpoints(directory) for directory in directories):
        posterior = build(load_weights=True)  # the members that have not begun start from the backbone's weights
    with storage.storage_errors("cannot create the directory", own.parent):
        storage.make_directories(own.parent, levels=2)  # save_checkpoint makes the rest
    return posterior, directories


def _fit_member(
    member: Posterior,
    slot: _Slot,
    settings: Settings,
    context: RunContext,
    metadata: JsonObject,
    profile: Path | None,
) -> FitResult:
    """Train one member from its newest valid checkpoint; the first one's seed is the run's, the next ones' follow."""
    run, data, engine, listener, stop_signal, user, workers = context
    checkpoint, rejected = newest_checkpoint(slot.directory)
    for reason in rejected:
        listener.on_note(reason)
    metadata = metadata | slot.label
    if checkpoint is not None:
        _check_same_run(checkpoint, metadata)
        _restore_metrics(run, slot.label, Progress.from_json(checkpoint.state.get("progress", {})))
    if slot.num_members > 1:
        listener.on_member(slot.number, slot.num_members)
    augmentation = Augmentation.from_config(settings.data)
    seed = (settings.training.seed + slot.number - 1) % 2**31
    return fit(
        member,
        TrainingData(data.train, data.preprocessing, augmentation, workers),
        _validator(settings, data, engine, workers),
        slot.directory,
        engine=engine,
        optimizer=settings.optimizer,
        training=replace(settings.training, seed=seed),
        metadata=metadata,
        resume=checkpoint,
        listener=_Recorder(run, slot.label, listener),
        stop_signal=stop_signal,
        optimizer_factory=user.optimizer,
        profile=profile,
    )


def _finish(
    posterior: Posterior,
    fits: Sequence[FitResult],
    name: str,
    settings: Settings,
    context: RunContext,
    metadata: JsonObject,
) -> FitResult:
    """Load each member's chosen checkpoint, finalize the whole, and commit it.

    Raises:
        DivergedError: What came out is not finite.
    """
    run, data, engine, listener, _, _, workers = context
    started = time.perf_counter()
    for member, fitted in zip(posterior.members(), fits, strict=True):
        restore_model(member, load_checkpoint(fitted.chosen))
    if has_finalize(settings):
        listener.on_note(f"Finalizing {name} ({settings.inference.family}) on the training images.")
    finalize_posterior(posterior, settings, data, engine)
    validation_nll = _validator(settings, data, engine, workers)(posterior)
    if not math.isfinite(validation_nll):
        what = "the finalized model has no finite validation loss"
        raise DivergedError(what, where=settings.inference.family, hint=DIVERGED_HINT)
    step = sum(fitted.report.step for fitted in fits)
    tensors = {MODEL_PREFIX + key: tensor for key, tensor in posterior.state_dict().items()}
    path = save_checkpoint(run.model_checkpoints(name), step, tensors, metadata)
    prune_checkpoints(path.parent, keep={step})
    return whole_fit(
        path,
        fits,
        validation_nll=validation_nll,
        posterior_scale=median_scale(posterior),
        finalize_seconds=time.perf_counter() - started,
    )


def has_checkpoint(run: RunDirectory) -> bool:
    """Return whether a checkpoint of any model or member is there, unverified."""
    return run.has_checkpoint or any(run.path.glob("models/*/member-*/checkpoints/step-*"))


def discard(run: RunDirectory) -> None:
    """Remove the run if this process made it and it holds no checkpoint yet."""
    if not has_checkpoint(run):
        folders = (*run.path.glob("models/*/member-*"), *run.path.glob("models/*/member-*/checkpoints"))
        storage.remove_empty(folders)
        run.discard()


def _member_checkpoints(run: RunDirectory, name: str, number: int) -> Path:
    """Return where the checkpoints of a member live, the first being number 1.

    Raises:
        CheckpointError: A link leads out of the run directory.
    """
    path = run.model_checkpoints(name).with_name(f"member-{number}") / "checkpoints"
    if not path.resolve().is_relative_to(run.path.resolve()):
        raise CheckpointError("a link leads out of the run directory", where=path, hint="remove it")
    return path


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
    for key in ("model", "member", "settings", "classes", "preprocessing", "fingerprint"):
        if strict_json.json_ready(metadata.get(key)) != checkpoint.state.get(key):
            hint = "restore the run's config.toml, or train again"
            raise CheckpointError(f"the checkpoint was made with other {key}", where=checkpoint.path, hint=hint)


def _restore_metrics(run: RunDirectory, label: JsonObject, progress: Progress) -> None:
    """Make metrics.jsonl agree with the checkpoint, which is the truth: a kill may fall between the two writes."""
    lines = run.read_metrics() if run.metrics.exists() else []
    others = [line for line in lines if any(line.get(key) != label.get(key) for key in ("model", "member"))]
    storage.write_lines(run.metrics, others + [label | report._asdict() for report in progress.reports])


def _validator(settings: Settings, data: ImageData, engine: Engine, workers: int) -> Callable[[Posterior], float]:
    """Return the function that gives a posterior's mean NLL on the validation split, nats."""

    def validate(posterior: Posterior) -> float:
        predictor = make_predictor(posterior, settings, data.preprocessing, engine, workers=workers)
        return predictor.mean_nll(data.validation)

    return validate
