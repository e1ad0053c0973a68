"""The workflow behind `bayesnet export`: a model of a run as programs that need neither the run nor this library."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet import storage
from bayesnet.config import require
from bayesnet.data import ImageData, Preprocessing
from bayesnet.errors import BayesnetError, ConfigError, DataError
from bayesnet.exporting import (
    FORMATS,
    INPUT,
    JSON_NAME,
    KIND,
    OUTPUTS,
    Program,
    Run,
    claim,
    missing_packages,
    model_card,
    publish,
    trace,
)
from bayesnet.predictive import Predictor, summarize
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.strict_json import json_bytes, json_ready
from bayesnet.types import JsonObject
from bayesnet.workflows.calibrated import load_calibration
from bayesnet.workflows.predicting import ImageClassifier
from bayesnet.workflows.trained import NO_USER_CODE, UserCode, read_data

BOTH = "both"
MAX_DIFFERENCE = 1e-4
"""Of any output to that of `predict`; a program that is further away is not given to anybody."""

CARD = "README.md"
NUM_IMAGES = 64
_EVALUATED = ("accuracy", "nll", "brier", "ece", "aurc")


class _Images(NamedTuple):
    """Images to verify programs with, what they are, and what there is to say about it."""

    images_NCHW: Tensor
    source: str
    notes: list[str]


def export(
    run: str | Path | None = None,
    *,
    model: str | None = None,
    format: str = BOTH,
    interval: float = 0.9,
    samples: int | None = None,
    out: str | Path | None = None,
    data: ImageData | None = None,
    user: UserCode = NO_USER_CODE,
) -> JsonObject:
    """Write a model of a run as programs: network, posterior, calibrator and intervals in one, with a model card.

    Each program is read back from its file and compared with `predict` on test images before anybody sees it.

    Args:
        run: A run directory; the newest finished one by default.
        model: "deterministic" or "bayesian"; the Bayesian one by default where the run has it.
        format: "torch", "onnx" or "both"; both without the packages that ONNX needs is torch alone, with a note.
        interval: Mass of the intervals.
        samples: Draws per image, a power of two up to 256; the run's own by default.
        out: Directory, new, empty or an earlier export; ``export`` in the run by default.
        data: The run's data, where they were given from Python.
        user: The run's own code, where it was given from Python.

    Returns:
        ``run``, ``model``, ``family``, ``calibrated``, ``out``, ``files`` (format to path, or None), ``input`` (name,
        shape, dtype), ``outputs`` (name to shape), ``interval``, ``max_differences`` to `predict` by format and the
        largest as ``max_difference``, ``verified`` (images, their source, sizes of the batches), ``notes``.

    Raises:
        ConfigError: The family or network cannot be exported, packages are missing, ``out`` is not free, a value is out
            of range.
        BayesnetError: A missing or damaged run; or a program differs from `predict`.
    """
    names, notes = _formats(format)
    classifier = ImageClassifier(run, model=model, level=interval, samples=samples, devices="cpu", user=user)
    directory = RunDirectory.open(classifier.run)
    path = claim(directory.export if out is None else Path(out))
    with directory.lock() if out is None else contextlib.nullcontext():
        images = _images(directory, classifier, data)
        facts = _facts(directory, classifier)
        with publish(path) as building:
            differences, batches = _write_programs(names, building, facts, classifier, images.images_NCHW)
            verified = {"num_images": len(images.images_NCHW), "source": images.source, "batch_sizes": batches}
            found: JsonObject = {name: differences.get(name) for name in FORMATS}
            record = facts | {
                "files": {name: FORMATS[name].file if name in names else None for name in FORMATS},
                "max_difference": max(differences.values()),
                "max_differences": found,
                "verified": verified,
            }
            storage.write_json(building / JSON_NAME, record)
            card = model_card(record, classifier.preprocessing)
            storage.write_bytes(building / CARD, card.encode("utf-8", "backslashreplace"))
    shown = ("model", "family", "calibrated", "input", "outputs", "interval", "max_difference", "max_differences")
    return {
        "run": str(classifier.run),
        "out": str(path),
        "files": {name: str(path / file) if file else None for name, file in record["files"].items()},
        **{key: record[key] for key in (*shown, "verified")},
        "notes": [*notes, *images.notes],
    }


def _formats(wanted: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the formats to write, and what was decided about them.

    Raises:
        ConfigError: There is no such format, or it needs what is not installed.
    """
    require(wanted in (*FORMATS, BOTH), f"no such format, there is {', '.join(FORMATS)}, {BOTH}", where=wanted)
    names = tuple(FORMATS) if wanted == BOTH else (wanted,)
    missing = {name: ", ".join(missing_packages(FORMATS[name].packages)) for name in names}
    for name in names:
        if missing[name] and wanted != BOTH:
            hint = "pip install 'bayesnet[export]'"
            raise ConfigError(f"the format {name} needs what is not installed", where=missing[name], hint=hint)
    notes = [
        f"no {name} program: {packages} not installed; pip install 'bayesnet[export]'"
        for name, packages in missing.items()
        if packages
    ]
    return tuple(name for name in names if not missing[name]), notes


def _write_programs(
    names: Sequence[str], building: Path, facts: JsonObject, classifier: ImageClassifier, images_NCHW: Tensor
) -> tuple[dict[str, float], list[int]]:
    """Write a program in each format and return its difference to `predict`, and the sizes of the batches compared.

    Raises:
        ConfigError: It cannot be traced or written.
        BayesnetError: It is not what `predict` is.
    """
    predictor = classifier.predictor
    program = Program(
        predictor.posterior,
        predictor.preprocessing,
        predictor.calibrator,
        num_samples=predictor.num_samples,
        level=classifier.level,
    )
    batches = [images_NCHW[:1], images_NCHW[1:3], images_NCHW]
    expected = [_predicted(predictor, batch, classifier.level) for batch in batches]
    traced = trace(program, facts["family"])
    text = json_bytes(json_ready(facts)).decode()
    differences = {}
    for name in names:
        file = building / FORMATS[name].file
        FORMATS[name].write(traced, file, text)
        differences[name] = largest_difference(FORMATS[name].load(file), batches, expected)
        if not differences[name] <= MAX_DIFFERENCE:  # also where it is NaN
            what = f"the program differs from predict by {differences[name]:.2g}, more than {MAX_DIFFERENCE:g}"
            hint = "a steep calibrator (isotonic) makes rounding that large: calibrate with another one, or report it"
            raise BayesnetError(what, where=f"{FORMATS[name].file}, family {facts['family']}", hint=hint)
    return differences, [len(batch) for batch in batches]


def largest_difference(
    run: Run, batches: Sequence[Tensor], expected: Sequence[dict[str, NDArray[np.float64]]]
) -> float:
    """Return the largest absolute difference of any output, NaN where one is NaN or has another shape.

    Args:
        run: A program.
        batches: Pixels (N, C, H, W), of several N.
        expected: The outputs for each batch.
    """
    worst = [0.0]
    for images_NCHW, right in zip(batches, expected, strict=True):
        found = run(images_NCHW)
        for name, values in right.items():
            same_shape = found[name].shape == values.shape
            worst.append(float(np.abs(found[name] - values).max()) if same_shape else np.nan)
    return float(np.max(worst))


def _predicted(predictor: Predictor, images_NCHW: Tensor, level: float) -> dict[str, NDArray[np.float64]]:
    """Return what `predict` says of the images, by the names of a program's outputs."""
    rows = [summarize(predictor.log_probabilities(chunk), level) for chunk in images_NCHW.split(predictor.chunk_size)]
    parts = [(row.probability_BK, row.lower_BK, row.upper_BK, row.entropy_B, row.mutual_information_B) for row in rows]
    return {name: np.concatenate(column) for name, column in zip(OUTPUTS, zip(*parts, strict=True), strict=True)}


def _images(run: RunDirectory, classifier: ImageClassifier, given: ImageData | None) -> _Images:
    """Return images to verify with: of the test split where it can be read, more than fit into a chunk of `predict`."""
    settings, preprocessing = classifier.trained.settings, classifier.preprocessing
    num_images = max(NUM_IMAGES, classifier.predictor.chunk_size + 1)
    try:
        test = read_data(run, settings, preprocessing, given).test
        # Spread over the split, which is in the order of its classes; few images are taken more than once.
        chosen = torch.arange(num_images) * max(1, len(test) // num_images) % len(test)
        return _Images(test.read(chosen.tolist()), "of the test split", [])
    except DataError as error:
        note = f"verified on random pixels, the test split cannot be read: {error}"
        return _Images(_random_pixels(num_images, preprocessing), "random pixels", [note])


def _random_pixels(num_images: int, preprocessing: Preprocessing) -> Tensor:
    """Return pixels from a fixed seed, in the range of the training images."""
    generator, shape = torch.Generator().manual_seed(0), (num_images, *preprocessing.shape)
    if preprocessing.pixel_scale == 255:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mean_C11, std_C11 = (torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std))
    return mean_C11 + std_C11 * torch.randn(shape, generator=generator)


def _facts(run: RunDirectory, classifier: ImageClassifier) -> JsonObject:
    """Return what goes into model.json before anything is verified."""
    trained, predictor = classifier.trained, classifier.predictor
    summary, num_classes = run.read_summary(), len(trained.classes)
    calibration = load_calibration(run, trained)
    dtype = "uint8" if predictor.preprocessing.pixel_scale == 255 else "float32"
    evaluations = {
        "before": summary["models"][trained.name],
        "after": None if calibration is None else calibration["after"],
    }
    return {
        "kind": KIND,
        "run": run.path.resolve().name,
        "model": trained.name,
        "family": trained.settings.inference.family,
        "backbone": trained.settings.backbone.name,
        "weights": _origin(trained.settings),
        "digest": trained.digest,
        "versions": {name: metadata.version(name) for name in ("bayesnet", "torch")},
        "data": {key: value for key, value in summary["data"].items() if key != "classes"},
        "classes": list(trained.classes),
        "calibrated": calibration is not None,
        "calibrator": predictor.calibrator.to_json(),
        "threshold": None if calibration is None else calibration["threshold"],
        "abstention_threshold": None if calibration is None else calibration["abstention_threshold"],
        "preprocessing": predictor.preprocessing.to_json(),
        "input": {"name": INPUT, "shape": ["N", *predictor.preprocessing.shape], "dtype": dtype},
        "outputs": {name: ["N", num_classes] if name in OUTPUTS[:3] else ["N"] for name in OUTPUTS},
        "interval": {"level": classifier.level, "kind": classifier.kind, "samples": predictor.num_draws},
        "metrics": {
            name: None if values is None else {key: values[key] for key in (*_EVALUATED, "num_test", "ci95")}
            for name, values in evaluations.items()
        },
    }


def _origin(settings: Settings) -> list[str]:
    """Return in words what weights of others training began from; names of files and runs stay here."""
    weights, origin = settings.backbone.weights, []
    if weights == "default":
        origin.append(f"the published weights of {settings.backbone.name}")
    elif weights != "none":
        origin.append("a file of weights")
    if settings.head.mode == "head" and settings.head.backbone not in ("twin", "weights"):
        origin.append("the network of another run")
    return origin
