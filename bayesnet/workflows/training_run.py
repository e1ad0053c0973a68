"""The workflow behind `bayesnet train`: data, models, checkpoints, and one honest table on the test split."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import tomli_w
import torch

from bayesnet import metrics
from bayesnet.checkpoint import checkpoint_digest
from bayesnet.config import require
from bayesnet.data import ImageData, load_data
from bayesnet.data.images import write_png
from bayesnet.data.sampling import effective_size
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError, DataError, InterruptedRunError, StopRequest
from bayesnet.profiling import check_trace_path
from bayesnet.progress import FitResult
from bayesnet.rundir import RunDirectory
from bayesnet.settings import TWIN, Settings, resolve_settings
from bayesnet.types import JsonObject
from bayesnet.workflows.costs import facts_line
from bayesnet.workflows.environment import environment
from bayesnet.workflows.fitting import RunContext, TrainListener
from bayesnet.workflows.model_fitting import fit_model
from bayesnet.workflows.preparing import check_models, check_same_settings, decided, with_source
from bayesnet.workflows.trained import (
    NO_USER_CODE,
    PYTHON_DATA,
    UserCode,
    check_optimizer,
    check_user_code,
    load_again,
    load_model,
    model_name,
    read_finished,
    read_settings,
    resume_command,
)

NUM_EXAMPLE_IMAGES = 8


def train(
    *,
    bayesian: bool = False,
    data: str | None = None,
    family: str | None = None,
    backbone: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    devices: str | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    weights: str | None = None,
    freeze: bool | None = None,
    mode: str | None = None,
    workers: int | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    profile: str | Path | None = None,
    listener: TrainListener | None = None,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> JsonObject:
    """Train a classifier, with ``bayesian`` also its Bayesian counterpart, and evaluate on the test split.

    Args:
        bayesian: Train the Bayesian model too, on the same data in the same order.
        data: A registered name such as "digits", or "folder:PATH".
        family: Posterior family; implies ``bayesian``.
        backbone: Name of the feature extractor.
        epochs: Passes over the training split.
        seed: Of initial weights, order, augmentation and posterior noise.
        devices: "auto", "cpu", "cuda:0".
        config: Recipe name or TOML file.
        overrides: Texts ``section.key=value``.
        weights: Of the backbone: "none", "default" (the published ones) or a file.
        freeze: Whether the backbone stays as it is.
        mode: "joint", or "head": the posterior is fitted on stored features of the backbone that ``head.backbone``
            names, by default the run's twin.
        workers: Processes that read images ahead.
        out: The run directory, new or empty; without it one is made under ./runs.
        resume: A run directory to go on with; it brings its own settings, so only ``devices``, ``workers`` and
            ``profile`` may be given beside it.
        profile: File for a trace of a few steps of the last model, in Chrome's format.
        listener: Hears of progress.
        stop_signal: Asked after each step; a number ends the run with a committed checkpoint.

    Returns:
        The run's summary: ``run``, ``data``, ``models`` with metrics and 95 % intervals, ``seconds``.

    Raises:
        BayesnetError: One of its children, for anything the caller can fix.
    """
    trace = None if profile is None else Path(profile)
    given: dict[str, dict[str, object]] = {
        "backbone": {"name": backbone, "weights": weights, "freeze": freeze},
        "head": {"mode": mode},
        "training": {"epochs": epochs, "seed": seed},
        "engine": {"devices": devices},
        "data": {"workers": workers},
    }
    kept = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in given.items()}
    flags = {section: values for section, values in kept.items() if values}
    if resume is not None:
        settled = (data, family, backbone, epochs, seed, config, out, weights, freeze, mode)
        if bayesian or overrides or any(value is not None for value in settled):
            raise ConfigError(
                "--resume takes its settings from the run",
                where=resume,
                hint="give only --devices, --workers, --profile",
            )
        return resume_run(
            resume, devices=devices, workers=workers, profile=trace, listener=listener, stop_signal=stop_signal
        )
    settings = resolve_settings(
        config=config, data=data, family=family, bayesian=bayesian, overrides=overrides, flags=flags
    )
    return start_run(settings, out=out, profile=trace, listener=listener, stop_signal=stop_signal)


def start_run(
    settings: Settings,
    *,
    data: ImageData | None = None,
    user: UserCode = NO_USER_CODE,
    out: str | Path | None = None,
    profile: Path | None = None,
    listener: TrainListener | None = None,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> JsonObject:
    """Train and evaluate what the settings describe, in a new run directory.

    Args:
        settings: All of them.
        data: The data, where they are given from Python; else ``settings.data`` names them.
        user: Backbone, guide and optimizer, where they are given from Python.
        out: The run directory, new or empty; without it one is made under ./runs.
        profile: File for a trace of a few steps of the last model.
        listener: Hears of progress.
        stop_signal: Asked after each step; a number ends the run with a committed checkpoint.

    Returns:
        The run's summary, as `train` does.

    Raises:
        BayesnetError: One of its children, for anything the caller can fix.
    """
    listener = listener or TrainListener()
    engine = Engine.for_one(settings.engine.devices)
    settings = decided(settings, listener)
    what = "an optimizer of your own is optimizer.name = custom"
    require((user.optimizer is not None) == (settings.optimizer.name == "custom"), what, where="optimizer.name")
    if profile is not None:
        check_trace_path(profile)
    settings, preprocessing = with_source(settings, user, listener)
    image_data = _verified(data or load_data(settings.data, preprocessing), listener)
    # An absolute path, so that later commands find the data from any directory.
    settings = replace(settings, data=replace(settings.data, spec=image_data.spec))
    run = RunDirectory.create(None if out is None else Path(out), f"{image_data.name}-{settings.inference.family}")
    try:
        with run.lock():
            check_models(_variants(settings), image_data, user, engine, listener)
            _write_head(run, settings, image_data)
            context = RunContext(run, image_data, engine, listener, stop_signal, user, settings.data.workers)
            return _train(settings, context, profile)
    except BaseException:
        run.discard()
        raise


def resume_run(
    path: str | Path,
    *,
    data: ImageData | None = None,
    user: UserCode = NO_USER_CODE,
    settings: Settings | None = None,
    devices: str | None = None,
    workers: int | None = None,
    profile: Path | None = None,
    listener: TrainListener | None = None,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> JsonObject:
    """Go on with a run; a finished one gives its summary.

    Args:
        path: The run directory.
        data: The run's data, where they were given from Python.
        user: The run's own code, where it was given from Python.
        settings: Those that the caller believes the run to have; None asks nothing.
        devices: Other devices than the run began on.
        workers: Another number of processes that read ahead.
        profile: File for a trace of a few steps of the last model.
        listener: Hears of progress.
        stop_signal: Asked after each step; a number ends the run with a committed checkpoint.

    Raises:
        BayesnetError: The run is damaged, its data changed or its code is not given.
    """
    listener = listener or TrainListener()
    run = RunDirectory.open(Path(path))
    given, settings = settings, read_settings(run)
    if given is not None:
        given, _ = with_source(decided(given, TrainListener()), user, TrainListener())
        check_same_settings(settings, given, run.path)
    if data is not None:
        _check_data(run, data)
    if run.is_finished:
        summary = read_finished(run)
        listener.on_note(f"{run.path} is finished; nothing to do")
        return summary
    check_user_code(settings, user, run.path)
    check_optimizer(settings, user, run.path)
    if profile is not None:
        check_trace_path(profile)
    engine = Engine.for_one(devices or settings.engine.devices)
    threads = run.read_json(run.environment.name).get("threads")
    if threads != torch.get_num_threads():
        listener.on_note(
            f"begun with {threads} threads, going on with {torch.get_num_threads()}: as good, but not bit-equal"
        )
    with run.lock():
        _, preprocessing = with_source(settings, user, listener)
        image_data = _verified(data or load_again(settings.data, preprocessing), listener)
        _check_data(run, image_data)
        used = settings.data.workers if workers is None else workers
        context = RunContext(run, image_data, engine, listener, stop_signal, user, used)
        return _train(settings, context, profile)


def _check_data(run: RunDirectory, data: ImageData) -> None:
    """Raise DataError unless the data are those that the run began with."""
    if run.read_json(run.classes.name).get("fingerprint") != data.fingerprint:
        hint = "restore it, or train again"
        raise DataError("the data set has changed since the run began", where=data.spec, hint=hint)


def _variants(settings: Settings) -> tuple[Settings, ...]:
    """Return the settings of each model of a run: the twin's where it is trained too, and these."""
    wanted = settings.training.twin and model_name(settings) == "bayesian"
    return (settings.twin(), settings) if wanted else (settings,)


def _verified(data: ImageData, listener: TrainListener) -> ImageData:
    """Return the data, every image that will be read proven readable, and tell what was decided for the user."""
    for note in data.notes:
        listener.on_note(note)
    for split in (data.train, data.validation, data.calibration, data.test):
        split.verify()
    return data


def _train(settings: Settings, context: RunContext, profile: Path | None) -> JsonObject:
    """Train and evaluate; where a signal ends it and a checkpoint is there, say how to go on.

    Raises:
        InterruptedRunError: A signal arrived.
    """
    run = context.run
    try:
        return _fit_and_evaluate(settings, context, profile)
    except (InterruptedRunError, StopRequest) as error:
        if not run.has_checkpoint:
            raise
        in_files = context.user == NO_USER_CODE and settings.data.spec != PYTHON_DATA
        hint = f"continue with `{resume_command(run)}`" if in_files else "continue with fit(..., resume=True)"
        raise InterruptedRunError(error.exit_code - 128, where=run.path, hint=hint) from None


def _fit_and_evaluate(settings: Settings, context: RunContext, profile: Path | None) -> JsonObject:
    """Train the twin and, where the settings are Bayesian, the Bayesian model; evaluate both; finish the run."""
    started = time.perf_counter()
    run, data = context.run, context.data
    variants = {model_name(each): each for each in _variants(settings)}
    if settings.training.balanced:
        size = effective_size(data.train.labels_N, balanced=True)
        context.listener.on_note(
            f"Every class is shown equally often: {len(data.train)} images count as {size}, and the classifier takes "
            "the classes to be equally probable."
        )
    last = model_name(settings)
    fits: dict[str, FitResult] = {}
    for name, variant in variants.items():
        trace = profile if name == last else None
        fits[name] = fit_model(name, variant, context, twin=fits.get(TWIN), profile=trace)
    models: JsonObject = {name: _fit_record(variants[name], result) for name, result in fits.items()}
    _write_example_images(run, data)
    summary: JsonObject = {
        "run": str(run.path),
        "data": _data_record(data),
        "fingerprint": data.fingerprint,
        "models": models,
    }
    # load_model reads the checkpoints through the summary, so that what is evaluated is what later commands will use.
    run.write_json(run.summary.name, summary)
    for name in models:
        # The test split is read here and nowhere before: everything that could be selected by it is frozen.
        trained = load_model(run, name, context.user)
        models[name]["kl_is_exact"] = trained.posterior.kl_is_exact
        models[name]["facts"] = trained.posterior.facts()
        if models[name]["facts"]:
            context.listener.on_note(f"{name.capitalize()}: {facts_line(models[name]['facts'])}.")
        probabilities = trained.predictor(context.engine, workers=context.workers).probabilities(data.test)
        models[name] |= metrics.evaluate(probabilities, data.test.labels_N.numpy())
    summary["seconds"] = time.perf_counter() - started
    run.finish(summary)
    return run.read_summary()


def _write_head(run: RunDirectory, settings: Settings, data: ImageData) -> None:
    """Write what is known before training: configuration, environment, classes."""
    run.write_text(run.config.name, tomli_w.dumps(settings.to_mapping()))
    run.write_json(run.environment.name, environment())
    classes: JsonObject = {"classes": list(data.classes), "fingerprint": data.fingerprint}
    if data.labels:
        classes["labels"] = list(data.labels)
    run.write_json(run.classes.name, classes)


def _write_example_images(run: RunDirectory, data: ImageData) -> None:
    """Write a few test images where the data set has no files of its own, so that `predict` has something to read."""
    if (
        data.spec.startswith("folder:")
        or data.preprocessing.pixel_scale != 255
        or data.preprocessing.channels not in (1, 3)
    ):
        return  # there are files already, or no PNG file could hold the pixels
    folder = run.path / "examples"
    folder.mkdir(exist_ok=True)
    for index in range(min(NUM_EXAMPLE_IMAGES, len(data.test))):
        write_png(folder / f"test-{index:04d}.png", data.test.read([index])[0])


def _data_record(data: ImageData) -> JsonObject:
    """Return the summary's ``data``."""
    return {
        "name": data.name,
        "num_train": len(data.train),
        "num_validation": len(data.validation),
        "num_calibration": len(data.calibration),
        "num_test": len(data.test),
        "classes": list(data.classes),
    }


def _fit_record(settings: Settings, result: FitResult) -> JsonObject:
    """Return what the summary says of how a model was fitted: all of it about what the run uses, but for the seconds.

    Where that is made of several members, the entry ``members`` says the same of each.
    """
    report = result.report
    members = [_fit_record(settings, member) for member in result.members] if len(result.members) > 1 else []
    return {
        "family": settings.inference.family,
        "posterior_temperature": settings.training.temperature,
        "epoch": report.epoch,
        "step": report.step,
        "digest": checkpoint_digest(result.chosen),
        "validation_nll": report.validation_nll,
        "train_nll": report.train_nll,
        "kl": report.kl,
        "kl_per_example": report.kl_per_example,
        "posterior_scale": {"initial": result.initial_scale, "final": report.posterior_scale},
        "epochs": len(result.reports),
        "seconds": result.seconds,
    } | ({"members": members} if members else {})
