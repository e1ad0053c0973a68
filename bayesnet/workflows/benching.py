"""The workflow behind `bayesnet bench`: what uncertainty costs, deterministic and Bayesian side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnet.benchmark import Ratio, Timing, measure, ratio
from bayesnet.config import require
from bayesnet.data import Preprocessing, load_data
from bayesnet.data.features import feature_preprocessing
from bayesnet.engine import Engine, resolve_devices
from bayesnet.errors import CheckpointError, ConfigError
from bayesnet.optim import build_optimizers
from bayesnet.predictive import Predictor, summarize
from bayesnet.rundir import RunDirectory, find_run
from bayesnet.settings import Settings, build_settings, resolve_settings
from bayesnet.types import JsonObject
from bayesnet.workflows.environment import environment
from bayesnet.workflows.head_fitting import num_features_of, on_features
from bayesnet.workflows.trained import NO_USER_CODE, load_model, model_name, new_posterior, read_finished, trained_names

ROUNDS = 20
NUM_INPUTS = 4
CONTROL = "control"


class _Subject(NamedTuple):
    """What is measured: settings of one model and the sizes that its run had."""

    settings: Settings
    preprocessing: Preprocessing
    num_classes: int
    num_examples: int


Arm = Callable[[], object]


def bench(
    run: str | Path | None = None,
    *,
    devices: str = "auto",
    batch: int | None = None,
    samples: int | None = None,
    seconds: float = 4.0,
) -> JsonObject:
    """Measure training steps and predictions of the twin and of the Bayesian model on each device.

    The weights are fresh (times do not depend on them), the inputs random images of the run's size, and the code is the
    one that `train` and `predict` use. Arms are interleaved; the control is the twin entered twice.

    Args:
        run: A run directory; the newest finished one, or the default recipe where there is none.
        devices: "auto" or a comma-separated list; repeated names are measured again.
        batch: Images per training step and per prediction; by default those of the run.
        samples: Draws per image of the Bayesian model; by default the run's.
        seconds: Measuring time per device and phase, after warm-up.

    Returns:
        ``rows``, ``control`` (``ratio`` is the control's that is farthest from 1, ``rows`` holds all), ``environment``.

    Raises:
        DeviceError: A device does not exist.
        BayesnetError: A missing or damaged run, numbers out of range.
    """
    require(batch is None or 2 <= batch <= 65536, "must be from 2 to 65536", where=f"batch = {batch}")
    require(0.1 <= seconds <= 3600, "must be from 0.1 to 3600", where=f"seconds = {seconds}")
    targets = resolve_devices(devices)
    source, subjects = _subjects(run)
    rows: list[JsonObject] = []
    controls: list[JsonObject] = []
    for device in targets:
        engine = Engine(device)
        for phase, make_arm in (("train", _train_arm), ("predict", _predict_arm)):
            measured = {name: _Measured(subject, batch, samples) for name, subject in subjects.items()}
            arms = {name: make_arm(each, engine) for name, each in measured.items()}
            arms[CONTROL] = make_arm(measured["deterministic"], engine)
            timings = measure(
                arms, synchronize=engine.synchronize, rounds=ROUNDS, seconds_per_block=seconds / ROUNDS / len(arms)
            )
            twin = timings["deterministic"]
            controls.append({"device": str(device), "phase": phase, **_ratio_record(ratio(timings[CONTROL], twin))})
            for name, each in measured.items():
                peak = _peak_memory(arms[name], device)
                row = _row(each, phase, timings[name], ratio(timings[name], twin), peak)
                rows.append({"device": str(device), "model": name, **row})
    worst = max(controls, key=lambda row: abs(row["ratio"] - 1))
    return {
        "source": source,
        "rows": rows,
        "control": {"ratio": worst["ratio"], "ci95": worst["ci95"], "rows": controls},
        "environment": environment(),
    }


class _Measured:
    """A subject with the batch size and number of draws that are measured."""

    def __init__(self, subject: _Subject, batch: int | None, samples: int | None) -> None:
        settings = subject.settings
        self.subject = subject
        self.family = settings.inference.family
        self.train_batch = batch or settings.training.batch_size
        self.predict_batch = batch or settings.predict.chunk_size
        self.samples = samples or settings.predict.samples

    def batch(self, phase: str) -> int:
        """Return the images per call."""
        return self.train_batch if phase == "train" else self.predict_batch


def _subjects(run: str | Path | None) -> tuple[str, dict[str, _Subject]]:
    """Return where the models come from, and the twin and the Bayesian model of it."""
    try:
        directory = find_run(run)
    except CheckpointError:
        if run is not None:
            raise
        return "default recipe", _recipe_subjects()
    return str(directory.path), _run_subjects(directory)


def _recipe_subjects() -> dict[str, _Subject]:
    settings = resolve_settings(bayesian=True)
    data = load_data(settings.data)
    sizes = (data.preprocessing, len(data.classes), len(data.train))
    return {model_name(each): _Subject(each, *sizes) for each in (settings.twin(), settings)}


def _run_subjects(directory: RunDirectory) -> dict[str, _Subject]:
    """Return the run's models; where it has the twin alone, the default Bayesian head stands beside it."""
    models = [load_model(directory, name) for name in trained_names(read_finished(directory), directory.path)]
    subjects = {
        model.name: _Subject(model.settings, model.preprocessing, len(model.classes), model.num_examples)
        for model in models
    }
    if "deterministic" not in subjects:
        hint = "train it with its twin (training.twin = true)"
        raise ConfigError("the run has no twin to compare with", where=directory.path, hint=hint)
    twin = subjects["deterministic"]
    if "bayesian" not in subjects:
        mapping = twin.settings.to_mapping() | {"inference": resolve_settings(bayesian=True).to_mapping()["inference"]}
        subjects["bayesian"] = twin._replace(settings=build_settings(mapping))
    return subjects


def _train_arm(measured: _Measured, engine: Engine) -> Arm:
    """Return a function that takes one training step, the engine's own, on the next of a few rotated batches."""
    subject = measured.subject
    posterior = new_posterior(*subject, load_weights=False)
    if subject.settings.head.mode == "head":  # its steps are on features
        num_features = num_features_of(posterior)
        posterior = on_features(subject.settings, num_features, subject.num_classes, subject.num_examples, NO_USER_CODE)
        subject = subject._replace(preprocessing=feature_preprocessing(num_features))
    posterior = posterior.to(engine.device).train()
    optimizers = build_optimizers(posterior, subject.settings.optimizer, num_examples=subject.num_examples)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (
            subject.preprocessing.normalize(engine.put(image_BCHW)),
            engine.put(torch.randint(subject.num_classes, (measured.train_batch,), generator=generator)),
        )
        for image_BCHW in _random_images(subject, measured.train_batch, generator)
    ]
    calls = iter(range(10**9))

    def step() -> None:
        x_BCHW, y_B = inputs[next(calls) % NUM_INPUTS]
        engine.train_step(posterior, optimizers, x_BCHW, y_B, plan=subject.settings.training.plan)

    return step


def _predict_arm(measured: _Measured, engine: Engine) -> Arm:
    """Return a function that predicts one chunk, from uint8 pixels to intervals on the host, as `predict` does."""
    subject = measured.subject
    predictor = Predictor(
        new_posterior(*subject),
        subject.preprocessing,
        engine=engine,
        num_samples=measured.samples,
        chunk_size=measured.predict_batch,
    )
    inputs = _random_images(subject, measured.predict_batch, torch.Generator().manual_seed(0))
    calls = iter(range(10**9))

    def predict_chunk() -> None:
        summarize(predictor.log_probabilities(inputs[next(calls) % NUM_INPUTS]), 0.9)

    return predict_chunk


def _random_images(subject: _Subject, batch: int, generator: torch.Generator) -> list[Tensor]:
    shape = (batch, *subject.preprocessing.shape)
    return [torch.randint(256, shape, generator=generator).to(torch.uint8) for _ in range(NUM_INPUTS)]


def _row(measured: _Measured, phase: str, timing: Timing, to_twin: Ratio, peak: int | None) -> JsonObject:
    """Return the row of one arm; ``ci95`` is the interval of ``ms_median``."""
    images = measured.batch(phase)
    bayesian = measured.family != "deterministic"
    return {
        "phase": phase,
        "family": measured.family,
        "batch": images,
        "samples": measured.samples if bayesian and phase == "predict" else 1,
        "images_per_second": images / timing.median,
        "ms_median": 1e3 * timing.median,
        "ms_p95": 1e3 * timing.p95,
        "ci95": [1e3 * bound for bound in timing.median_interval()],
        "peak_memory_bytes": peak,
        "ratio_to_deterministic": to_twin.value if bayesian else 1.0,
        "ratio_ci95": [to_twin.low, to_twin.high] if bayesian else [1.0, 1.0],
    }


def _ratio_record(value: Ratio) -> JsonObject:
    return {"ratio": value.value, "ci95": [value.low, value.high]}


def _peak_memory(arm: Arm, device: torch.device) -> int | None:
    """Return the peak device memory of one call, bytes, in a pass of its own; None on a CPU, which keeps no count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    arm()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
