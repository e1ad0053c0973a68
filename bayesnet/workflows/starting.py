"""A family whose training starts at another one's optimum: the other is trained first, in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from bayesnet.checkpoint import load_checkpoint
from bayesnet.data.augment import Augmentation
from bayesnet.inference import FAMILIES, build_inference_config
from bayesnet.inference.base import Posterior, Start
from bayesnet.progress import FitResult
from bayesnet.settings import Settings
from bayesnet.training import restore_model
from bayesnet.types import JsonObject
from bayesnet.workflows.fitting import RunContext, Slot, fit_part, make_model_directory


def start_of(settings: Settings) -> Start | None:
    """Return where training starts, or None for scratch."""
    asked = getattr(settings.inference, "start", None) != "scratch"
    return FAMILIES[settings.inference.family].start if asked else None


def start_settings(settings: Settings, start: Start) -> Settings:
    """Return the settings of the family that is trained first: those that it has in common with this one."""
    known = {field.name for field in fields(FAMILIES[start.family].config)} - {"family"}
    common = {key: value for key, value in settings.to_mapping()["inference"].items() if key in known}
    return replace(settings, inference=build_inference_config(common | {"family": start.family}))


def fit_start(
    posterior: Posterior,
    build: Callable[[Settings], Posterior],
    name: str,
    settings: Settings,
    context: RunContext,
    metadata: JsonObject,
    *,
    augmentation: Augmentation | None = None,
) -> float:
    """Train the family that this one starts from and move the posterior to its optimum; return the seconds it took.

    Args:
        posterior: Untrained; left alone where its family starts from scratch.
        build: Makes the untrained posterior of other settings, over the same inputs.
        name: Of the model.
        settings: Of the model.
        context: Of the run.
        metadata: What the model's checkpoints say.
        augmentation: Of the training images; None takes that of the settings.

    Raises:
        CheckpointError: A checkpoint to go on from belongs to other settings or data.
        DivergedError: See `bayesnet.training.fit`.
        InterruptedRunError: A signal arrived; the checkpoint is committed.
    """
    start = start_of(settings)
    if start is None:
        return 0.0
    context.listener.on_note(f"First {start.family}, at whose optimum {settings.inference.family} starts.")
    make_model_directory(context.run, name)
    first = start_settings(settings, start)
    other = build(first)
    slot = Slot(
        {"model": name, "start": start.family}, context.run.model_checkpoints(name, "start"), settings.training.seed
    )
    described = metadata | {"settings": first.to_mapping()}
    fitted = fit_part(other, slot, first, context, described, augmentation=augmentation)
    restore_model(other, load_checkpoint(fitted.chosen))
    start.load(posterior, other)
    return fitted.seconds


def with_start(fitted: FitResult, seconds: float) -> FitResult:
    """Return how a fit ended, the seconds of what it started from added."""
    return fitted._replace(whole=fitted.report._replace(seconds=fitted.seconds + seconds)) if seconds else fitted
