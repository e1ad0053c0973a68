"""How one model of a run is fitted: with its backbone, or as a head on a backbone's features; then finalized."""

from __future__ import annotations

import time
from pathlib import Path

from bayesnet.checkpoint import list_checkpoints, load_checkpoint
from bayesnet.data.sampling import effective_size
from bayesnet.inference.base import Posterior
from bayesnet.progress import FitResult
from bayesnet.settings import Settings
from bayesnet.training import restore_model
from bayesnet.types import JsonObject
from bayesnet.workflows.finalizing import finalize_posterior, has_finalize
from bayesnet.workflows.fitting import RunContext, Slot, commit_whole, fit_part, make_model_directory, model_metadata
from bayesnet.workflows.head_fitting import fit_head
from bayesnet.workflows.starting import fit_start, with_start
from bayesnet.workflows.trained import new_posterior


def fit_model(
    name: str,
    settings: Settings,
    context: RunContext,
    *,
    twin: FitResult | None = None,
    profile: Path | None = None,
) -> FitResult:
    """Train one model of a run and finalize it, going on where its checkpoints stand.

    A posterior that is its own only member and needs no finalizing is trained in ``models/NAME/checkpoints``, and the
    run uses one of its epochs. Otherwise its parts are trained in ``models/NAME/PART/checkpoints``, and what becomes of
    them is the one checkpoint of ``models/NAME/checkpoints``: made again where a kill came before the run's end.

    Args:
        name: "deterministic" or "bayesian".
        settings: Of this model.
        context: Of the run.
        twin: How the run's deterministic twin was fitted, for a head on its features.
        profile: File for a trace of a few steps, of the last part.

    Raises:
        CheckpointError: The checkpoint to go on from belongs to other settings or data.
        DivergedError: See `bayesnet.training.fit`; or finalizing gave something that is not finite.
        InterruptedRunError: A signal arrived; the checkpoint is committed.
    """
    num_examples = effective_size(context.data.train.labels_N, balanced=settings.training.balanced)
    metadata = model_metadata(name, settings, context.data, num_examples)
    context.listener.on_model(name, settings.inference.family)
    if settings.head.mode == "head":
        return fit_head(name, settings, context, metadata, num_examples, twin=twin, profile=profile)
    return _fit_jointly(name, settings, context, metadata, num_examples, profile)


def _fit_jointly(
    name: str,
    settings: Settings,
    context: RunContext,
    metadata: JsonObject,
    num_examples: int,
    profile: Path | None,
) -> FitResult:
    """Train member after member, finalize the whole where its family does, and commit it."""
    posterior, directories = _members(name, settings, context, num_examples)
    data = context.data

    def build(other: Settings) -> Posterior:
        return new_posterior(other, data.preprocessing, len(data.classes), num_examples, context.user)

    first = fit_start(posterior, build, name, settings, context, metadata)
    fits, num_members = [], len(directories)
    for number, (member, directory) in enumerate(zip(posterior.members(), directories, strict=True), 1):
        label: JsonObject = {"model": name}
        if num_members > 1:
            label["member"] = number
            context.listener.on_member(number, num_members)
        # The first member's seed is the run's, the next ones' follow.
        slot = Slot(label, directory, (settings.training.seed + number - 1) % 2**31)
        trace = profile if number == num_members else None
        fits.append(fit_part(member, slot, settings, context, metadata, profile=trace))
    if directories == (context.run.model_checkpoints(name),):
        return with_start(fits[0], first)
    started = time.perf_counter() - first
    for member, fitted in zip(posterior.members(), fits, strict=True):
        restore_model(member, load_checkpoint(fitted.chosen))
    if has_finalize(settings):
        context.listener.on_note(f"Finalizing {name} ({settings.inference.family}) on the training images.")
    finalize_posterior(posterior, settings, context.data, context.engine, workers=context.workers)
    seconds = time.perf_counter() - started
    return commit_whole(posterior, fits, name, settings, context, metadata, seconds=seconds)


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
    begun = bool(list_checkpoints(own) or list_checkpoints(run.model_checkpoints(name, "member-1")))
    posterior = build(load_weights=not begun)
    members = posterior.members()
    if len(members) == 1 and not has_finalize(settings):
        return posterior, (own,)
    directories = tuple(run.model_checkpoints(name, f"member-{number}") for number in range(1, len(members) + 1))
    if begun and not all(list_checkpoints(directory) for directory in directories):
        posterior = build(load_weights=True)  # the members that have not begun start from the backbone's weights
    make_model_directory(run, name)
    return posterior, directories
