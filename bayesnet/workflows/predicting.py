"""The workflow behind `bayesnet predict`: image files in, one row with intervals out for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayesnet.calibration import abstains, image_uniforms, prediction_sets
from bayesnet.config import require
from bayesnet.data.images import image_paths, read_image
from bayesnet.engine import Engine
from bayesnet.errors import DataError
from bayesnet.predictive import interval_kind, summarize
from bayesnet.rundir import find_run
from bayesnet.types import JsonObject, Summary
from bayesnet.workflows.calibrated import load_calibrated
from bayesnet.workflows.trained import read_finished, trained_names


class ImageClassifier:
    """A trained and calibrated model of a run, applied to image files.

    Args:
        run: A run directory, or None for the newest finished one under ./runs.
        model: "deterministic" or "bayesian"; None takes the Bayesian one where there is one.
        level: Mass of the intervals, such as 0.9.
        samples: S, draws per image, a power of two up to 256; None takes the run's own.
        devices: "auto", "cpu", "cuda:0".

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
    ) -> None:
        require(0 < level < 1, "must lie between 0 and 1", where=f"interval = {level}")
        require(samples is None or samples >= 1, "must be a power of two from 1 to 256", where=f"samples = {samples}")
        directory = find_run(run)
        names = trained_names(read_finished(directory), directory.path)
        require(
            model is None or model in names, f"the run has no such model, it has {', '.join(names)}", where=f"{model}"
        )
        trained, calibrator, self.threshold, self.abstention = load_calibrated(directory, model or names[-1])
        self.run, self.model, self.level, self.classes = directory.path, trained.name, level, trained.classes
        self.predictor = trained.predictor(Engine.for_one(devices), calibrator=calibrator, num_samples=samples)
        self.calibrated = calibrator is not None
        self.preprocessing = trained.preprocessing
        self.kind = interval_kind(self.predictor.num_draws, level)
        self.skipped: list[JsonObject] = []
        self.num_rows = 0
        self.num_widened = 0

    def rows(self, paths: Iterable[Path]) -> Iterator[JsonObject]:
        """Yield one row per readable image, in order; what cannot be read is added to ``skipped`` with its reason.

        Args:
            paths: Image files.
        """
        chunk: list[tuple[Path, Tensor]] = []
        for path in paths:
            try:
                chunk.append((path, read_image(path, self.preprocessing)))
            except DataError as error:
                self.skipped.append({"path": str(path), "reason": str(error)})
                continue
            if len(chunk) == self.predictor.chunk_size:
                yield from self._chunk_rows(chunk)
                chunk = []
        if chunk:
            yield from self._chunk_rows(chunk)

    @property
    def interval(self) -> JsonObject:
        """What the intervals are: level, kind, draws, and how often one of the predicted class was widened so far."""
        return {
            "level": self.level,
            "kind": self.kind,
            "samples": self.predictor.num_draws,
            "widened": self.num_widened / self.num_rows if self.num_rows else 0.0,
        }

    def _chunk_rows(self, chunk: Sequence[tuple[Path, Tensor]]) -> Iterator[JsonObject]:
        images_BCHW = torch.stack([image for _, image in chunk])
        summary = summarize(self.predictor.log_probabilities(images_BCHW), self.level)
        p_BK, sets_BK, abstains_B = summary.probability_BK, None, None
        if self.threshold is not None:
            sets_BK = prediction_sets(p_BK, self.threshold, image_uniforms(images_BCHW))
        if self.abstention is not None:
            abstains_B = abstains(p_BK, self.abstention)
        for index, (path, _) in enumerate(chunk):
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
) -> JsonObject:
    """Classify image files and folders, with an interval on every class probability.

    Args:
        paths: Files and folders (searched for images, recursively).
        run: A run directory; the newest finished one by default.
        model: "deterministic" or "bayesian"; the Bayesian one by default where the run has it.
        interval: Mass of the intervals.
        samples: Draws per image, a power of two up to 256.
        devices: "auto", "cpu", "cuda:0".

    Returns:
        ``run``, ``model``, ``calibrated``, ``interval``, ``predictions`` (one row per image), ``skipped`` (path and
        reason). ``set`` is the conformal prediction set once the run is calibrated; ``abstain`` says whether the risk
        limit leaves the image unanswered, and is None until `calibrate` has been given one.

    Raises:
        DataError: No image could be read.
        BayesnetError: See `ImageClassifier`.
    """
    classifier = ImageClassifier(run, model=model, level=interval, samples=samples, devices=devices)
    sources = [paths] if isinstance(paths, str | Path) else paths
    predictions = list(classifier.rows(image_paths(sources)))
    check_any_read(classifier)
    return {
        "run": str(classifier.run),
        "model": classifier.model,
        "calibrated": classifier.calibrated,
        "interval": classifier.interval,
        "predictions": predictions,
        "skipped": classifier.skipped,
    }


def check_any_read(classifier: ImageClassifier) -> None:
    """Raise DataError where images were given and none could be read.

    Raises:
        DataError: Naming the first one and its reason.
    """
    if classifier.num_rows == 0 and classifier.skipped:
        more = len(classifier.skipped) - 1
        reason = classifier.skipped[0]["reason"] + (f"; and {more} more" if more else "")
        raise DataError("no image could be read", hint=reason)
