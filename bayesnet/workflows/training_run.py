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
from bayesnet.data import ImageData, load_data
from bayesnet.data.images import write_png
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError, DataError, InterruptedRunError, StopRequest
from bayesnet.progress import FitResult
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings, resolve_settings
from bayesnet.types import JsonObject
from bayesnet.workflows.environment import environment
from bayesnet.workflows.fitting import RunContext, TrainListener, fit_model
from bayesnet.workflows.trained import load_model, model_name, read_finished, read_settings, resume_command

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
    out: str | Path | None = None,
    resume: str | Path | None = None,
    listener: TrainListener | None = None,
    stop_signal: Callable[[], int | None] = lambda: None,
) -> JsonObject:
    """Train a classifier, with ``bayesian`` also its Bayesian counterpart, and evaluate on the test split.

    Args:
        bayesian: Train the Bayesian model too, on the same data in the same order.
        data: "digits" or "folder:PATH".
        family: Posterior family; implies ``bayesian``.
        backbone: Name of the feature extractor.
        epochs: Passes over the training split.
        seed: Of initial weights, order, augmentation and posterior noise.
        devices: "auto", "cpu", "cuda:0".
        config: Recipe name or TOML file.
        overrides: Texts ``section.key=value``.
        out: The run directory, new or empty; without it one is made under ./runs.
        resume: A run directory to go on with; it brings its own settings, so only ``devices`` may be given beside it.
        listener: Hears of progress.
        stop_signal: Asked after each step; a number ends the run with a committed checkpoint.

    Returns:
        The run's summary: ``run``, ``data``, ``models`` with metrics and 95 % intervals, ``seconds``.

    Raises:
        BayesnetError: One of its children, for anything the caller can fix.
    """
    listener = listener or TrainListener()
    given: dict[str, dict[str, object]] = {
        "backbone": {"name": backbone},
        "training": {"epochs": epochs, "seed": seed},
        "engine": {"devices": devices},
    }
    kept = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in given.items()}
    flags = {section: values for section, values in kept.items() if values}
    if resume is not None:
        settled = (data, family, backbone, epochs, seed, config, out)
        if bayesian or overrides or any(value is not None for value in settled):
            raise ConfigError("--resume takes its settings from the run", where=resume, hint="give only --devices")
        return _resume(Path(resume), devices, listener, stop_signal)
    settings = resolve_settings(
        config=config, data=data, family=family, bayesian=bayesian, overrides=overrides, flags=flags
    )
    engine = Engine.for_one(settings.engine.devices)
    image_data = _load(settings, listener)
    # An absolute path, so that later commands find the data from any directory.
    settings = replace(settings, data=replace(settings.data, spec=image_data.spec))
    run = RunDirectory.create(None if out is None else Path(out), f"{image_data.name}-{settings.inference.family}")
    try:
        with run.lock():
            _write_head(run, settings, image_data)
            return _train(settings, RunContext(run, image_data, engine, listener, stop_signal))
    except BaseException:
        run.discard()
        raise


def _resume(
    path: Path, devices: str | None, listener: TrainListener, stop_signal: Callable[[], int | None]
) -> JsonObject:
    """Go on with a run; a finished one gives its summary."""
    run = RunDirectory.open(path)
    if run.is_finished:
        summary = read_finished(run)
        listener.on_note(f"{run.path} is finished; nothing to do")
        return summary
    settings = read_settings(run)
    engine = Engine.for_one(devices or settings.engine.devices)
    threads = run.read_json(run.environment.name).get("threads")
    if threads != torch.get_num_threads():
        listener.on_note(
            f"begun with {threads} threads, going on with {torch.get_num_threads()}: as good, but not bit-equal"
        )
    with run.lock():
        image_data = _load(settings, listener)
        if run.read_json(run.classes.name).get("fingerprint") != image_data.fingerprint:
            hint = "restore it, or train again"
            raise DataError("the data set has changed since the run began", where=image_data.spec, hint=hint)
        return _train(settings, RunContext(run, image_data, engine, listener, stop_signal))


def _load(settings: Settings, listener: TrainListener) -> ImageData:
    """Return the data, every image that training will read proven readable, and tell what was decided for the user."""
    data = load_data(settings.data)
    for note in data.notes:
        listener.on_note(note)
    for split in (data.train, data.validation, data.calibration, data.test):
        split.verify()
    return data


def _train(settings: Settings, context: RunContext) -> JsonObject:
    """Train and evaluate; where a signal ends it and a checkpoint is there, say how to go on.

    Raises:
        InterruptedRunError: A signal arrived.
    """
    run = context.run
    try:
        return _fit_and_evaluate(settings, context)
    except (InterruptedRunError, StopRequest) as error:
        if not run.has_checkpoint:
            raise
        hint = f"continue with `{resume_command(run)}`"
        raise InterruptedRunError(error.exit_code - 128, where=run.path, hint=hint) from None


def _fit_and_evaluate(settings: Settings, context: RunContext) -> JsonObject:
    """Train the twin and, where the settings are Bayesian, the Bayesian model; evaluate both; finish the run."""
    started = time.perf_counter()
    run, data = context.run, context.data
    variants = {model_name(each): each for each in (settings.twin(), settings)}
    fits = {name: fit_model(name, variant, context) for name, variant in variants.items()}
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
        probabilities = load_model(run, name).predictor(context.engine).probabilities(data.test)
        models[name] |= metrics.evaluate(probabilities, data.test.labels_N.numpy())
    summary["seconds"] = time.perf_counter() - started
    run.finish(summary)
    return run.read_summary()


def _write_head(run: RunDirectory, settings: Settings, data: ImageData) -> None:
    """Write what is known before training: configuration, environment, classes."""
    run.write_text(run.config.name, tomli_w.dumps(settings.to_mapping()))
    run.write_json(run.environment.name, environment())
    run.write_json(run.classes.name, {"classes": list(data.classes), "fingerprint": data.fingerprint})


def _write_example_images(run: RunDirectory, data: ImageData) -> None:
    """Write a few test images where the data set has no files of its own, so that `predict` has something to read."""
    if data.spec.startswith("folder:"):
        return
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
    """Return what the summary says of how a model was fitted: all of it about the chosen epoch, but for the seconds."""
    report = result.report
    return {
        "family": settings.inference.family,
        "epoch": report.epoch,
        "step": report.step,
        "digest": checkpoint_digest(result.chosen),
        "validation_nll": report.validation_nll,
        "train_nll": report.train_nll,
        "kl": report.kl,
        "kl_per_example": report.kl_per_example,
        "posterior_scale": {"initial": result.initial_scale, "final": report.posterior_scale},
        "seconds": result.reports[-1].seconds,
    }
