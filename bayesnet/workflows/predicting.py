"""The workflow behind `bayesnet predict`: image files in, one row with intervals out for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayesnet.calibration import abstains, image_uniforms, prediction_sets
from bayesnet.config import require
from bayesnet.data.ahead import map_ahead
from bayesnet.data.finding import find_images
from bayesnet.data.images import read_image
from bayesnet.engine import Engine
from bayesnet.errors import DataError
from bayesnet.inference.draw_table import TABLE_SIZE
from bayesnet.predictive import interval_kind, summarize
from bayesnet.rundir import find_run
from bayesnet.types import JsonObject, Summary
from bayesnet.workflows.calibrated import load_calibrated
from bayesnet.workflows.trained import NO_USER_CODE, UserCode, read_finished, trained_names

SHOWN = ("all", "top5")
TOP = 5


class ImageClassifier:
    """A trained and calibrated model of a run, applied to image files.

    Args:
        run: A run directory, or None for the newest finished one under ./runs.
        model: "deterministic" or "bayesian"; None takes the Bayesian one where there is one.
        level: Mass of the intervals, such as 0.9.
        samples: S, draws per image, a power of two up to 256; None takes the run's own.
        devices: "auto", "cpu", "cuda:0".
        user: The code that the run was trained with where that was the caller's own.

    Raises:
        BayesnetError: A missing or damaged run, a device that does not exist, a level or S out of range.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        model: str | None = None,
        level: float = 0.9,
        samples: int | None = None,
        devices: str = "auto",
        user: UserCode = NO_USER_CODE,
    ) -> None:
        require(0 < level < 1, "must lie between 0 and 1", where=f"interval = {level}")
        valid = samples is None or (1 <= samples <= TABLE_SIZE and samples.bit_count() == 1)
        require(valid, f"must be a power of two from 1 to {TABLE_SIZE}", where=f"samples = {samples}")
        directory = find_run(run)
        names = trained_names(read_finished(directory), directory.path)
        require(
            model is None or model in names, f"the run has no such model, it has {', '.join(names)}", where=f"{model}"
        )
        trained, calibrator, self.threshold, self.abstention = load_calibrated(directory, model or names[-1], user)
        self.trained = trained
        self.run, self.model, self.level, self.classes = directory.path, trained.name, level, trained.classes
        self.predictor = trained.predictor(Engine.for_one(devices), calibrator=calibrator, num_samples=samples)
        self.calibrated = calibrator is not None
        self.preprocessing = trained.preprocessing
        self.kind = interval_kind(self.predictor.num_draws, level)
        self.digest, self.samples = trained.digest, samples
        self.skipped: list[JsonObject] = []
        self.first_reason: str | None = None
        self.num_skipped = 0
        self.num_rows = 0
        self.num_widened = 0

    def outcomes(self, paths: Iterable[Path]) -> Iterator[JsonObject]:
        """Yield what came of each file, in order: its row, or where it cannot be read ``path`` and ``reason``.

        Files are decoded by threads, a chunk ahead of the model: no more than two chunks are held.

        Args:
            paths: Image files.
        """
        decoded = map_ahead(self._read, paths, ahead=self.predictor.chunk_size)
        while chunk := list(itertools.islice(decoded, self.predictor.chunk_size)):
            yield from self._chunk_outcomes(chunk)

    def rows(self, paths: Iterable[Path]) -> Iterator[JsonObject]:
        """Yield one row per readable image, in order; what cannot be read is added to ``skipped`` with its reason.

        Args:
            paths: Image files.
        """
        for outcome in self.outcomes(paths):
            if "reason" in outcome:
                self.skipped.append(outcome)
            else:
                yield outcome

    @property
    def interval(self) -> JsonObject:
        """What the intervals are: level, kind, draws, and how often one of the predicted class was widened so far."""
        return {
            "level": self.level,
            "kind": self.kind,
            "samples": self.predictor.num_draws,
            "widened": self.num_widened / self.num_rows if self.num_rows else 0.0,
        }

    def _read(self, path: Path) -> tuple[Path, Tensor | DataError]:
        """Return the pixels of a file, or why it cannot be read."""
        try:
            return path, read_image(path, self.preprocessing)
        except DataError as error:
            return path, error

    def _chunk_outcomes(self, chunk: Sequence[tuple[Path, Tensor | DataError]]) -> Iterator[JsonObject]:
        """Yield what came of the files of one chunk."""
        images = [(path, image) for path, image in chunk if isinstance(image, Tensor)]
        rows = self._rows(images) if images else iter(())
        for path, image in chunk:
            if isinstance(image, DataError):
                self.num_skipped += 1
                self.first_reason = self.first_reason or str(image)
                yield {"path": str(path), "reason": str(image)}
            else:
                yield next(rows)

    def _rows(self, images: Sequence[tuple[Path, Tensor]]) -> Iterator[JsonObject]:
        """Yield the rows of at most one chunk of images."""
        images_BCHW = torch.stack([image for _, image in images])
        summary = summarize(self.predictor.log_probabilities(images_BCHW), self.level)
        p_BK, sets_BK, abstains_B = summary.probability_BK, None, None
        if self.threshold is not None:
            sets_BK = prediction_sets(p_BK, self.threshold, image_uniforms(images_BCHW))
        if self.abstention is not None:
            abstains_B = abstains(p_BK, self.abstention)
        for index, (path, _) in enumerate(images):
            self.num_rows += 1
            row = self._row(path, summary, index)
            row["set"] = None if sets_BK is None else [self.classes[k] for k in np.flatnonzero(sets_BK[index])]
            row["abstain"] = None if abstains_B is None else bool(abstains_B[index])
            yield row

    def _row(self, path: Path, summary: Summary, index: int) -> JsonObject:
        """Return the row of one image; classes in the order of their index."""
        probability_K = summary.probability_BK[index]
        top = int(probability_K.argmax())
        self.num_widened += int(summary.widened_BK[index, top])
        bounds = zip(self.classes, probability_K, summary.lower_BK[index], summary.upper_BK[index], strict=True)
        classes = [
            {"name": name, "probability": float(p), "lower": float(low), "upper": float(high)}
            for name, p, low, high in bounds
        ]
        return {
            "path": str(path),
            "label": self.classes[top],
            "probability": classes[top]["probability"],
            "lower": classes[top]["lower"],
            "upper": classes[top]["upper"],
            "entropy": float(summary.entropy_B[index]),
            "mutual_information": float(summary.mutual_information_B[index]),
            "set": None,
            "abstain": None,
            "classes": classes,
        }


def predict(
    paths: Sequence[str | Path],
    *,
    run: str | Path | None = None,
    model: str | None = None,
    interval: float = 0.9,
    samples: int | None = None,
    devices: str = "auto",
    classes: str = "all",
    strict: bool = False,
) -> JsonObject:
    """Classify image files and folders, with an interval on every class probability.

    Args:
        paths: Files, folders (searched for images, recursively) and patterns such as ``photos/**/*.jpg``.
        run: A run directory; the newest finished one by default.
        model: "deterministic" or "bayesian"; the Bayesian one by default where the run has it.
        interval: Mass of the intervals.
        samples: Draws per image, a power of two up to 256.
        devices: "auto", "cpu", "cuda:0".
        classes: "all", or "top5" for the most probable, the most probable first.
        strict: Whether one file that cannot be read is an error.

    Returns:
        ``run``, ``model``, ``calibrated``, ``interval``, ``predictions`` (one row per image), ``skipped`` (path and
        reason). ``set`` is the conformal prediction set once the run is calibrated; ``abstain`` says whether the risk
        limit leaves the image unanswered, and is None until `calibrate` has been given one.

    Raises:
        DataError: No image could be read, or not all where ``strict``.
        BayesnetError: See `ImageClassifier`.
    """
    sources = [paths] if isinstance(paths, str | Path) else paths
    classifier = ImageClassifier(run, model=model, level=interval, samples=samples, devices=devices)
    return predict_images(find_images(sources), classifier, classes=classes, strict=strict)


def predict_images(
    images: Iterable[Path], classifier: ImageClassifier, *, classes: str = "all", strict: bool = False
) -> JsonObject:
    """Return what `predict` returns, for image files and a model that is there already.

    Args:
        images: Image files; those that do not exist are skipped too.
        classifier: The model.
        classes: "all" or "top5".
        strict: Whether one file that cannot be read is an error.

    Raises:
        ConfigError: There is no such choice of classes.
        DataError: No image could be read, or not all where ``strict``.
    """
    require(classes in SHOWN, "must be all or top5", where=f"classes = {classes}")
    rows = classifier.rows(images)
    predictions = list(rows if classes == "all" else map(most_probable, rows))
    check_any_read(classifier.num_rows, classifier.num_skipped, classifier.first_reason, strict=strict)
    return {
        "run": str(classifier.run),
        "model": classifier.model,
        "calibrated": classifier.calibrated,
        "interval": classifier.interval,
        "predictions": predictions,
        "skipped": classifier.skipped,
    }


def most_probable(row: JsonObject) -> JsonObject:
    """Return the row with its most probable classes alone, at most 5, the most probable first."""
    ranked = sorted(row["classes"], key=lambda entry: -entry["probability"])
    return {**row, "classes": ranked[:TOP]}


def check_any_read(num_read: int, num_skipped: int, first_reason: str | None, *, strict: bool = False) -> None:
    """Raise DataError where images were given and none could be read, or where not all could and ``strict`` is set.

    Args:
        num_read: Images with a prediction.
        num_skipped: Files without one.
        first_reason: Why the first of these has none.
        strict: Whether one is too many.

    Raises:
        DataError: Naming the first file and its reason.
    """
    if num_skipped == 0 or (num_read and not strict):
        return
    more = f"; and {num_skipped - 1} more" if num_skipped > 1 else ""
    what = (
        f"{num_skipped} of {num_read + num_skipped} images could not be read" if num_read else "no image could be read"
    )
    raise DataError(what, hint=f"{first_reason}{more}")
