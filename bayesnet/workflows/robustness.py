"""How models fare on test images that are worse than those they know: the common corruptions at five severities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bayesnet import metrics
from bayesnet.data import ArrayExamples, Examples
from bayesnet.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedExamples
from bayesnet.data.splits import random_choice
from bayesnet.types import JsonObject
from bayesnet.workflows.answering import Answering, mean_probabilities

MEASURED = ("accuracy", "nll", "ece")
SEED = 0


class SomeImages(NamedTuple):
    """Some images of a split, in order and in memory.

    Attributes:
        examples: The images with their labels.
        positions_N: Their places in the split, so that a corruption of one does not depend on how many were chosen.
    """

    examples: ArrayExamples
    positions_N: Tensor

    @classmethod
    def of(cls, examples: Examples, max_images: int, seed: int = SEED) -> SomeImages:
        """Return at most so many of the images, chosen by the seed."""
        indices_N = random_choice(len(examples), max_images, seed)
        return cls(ArrayExamples(examples.read(indices_N), examples.labels_N[indices_N]), indices_N)


def robustness_records(models: Mapping[str, Answering], images: SomeImages) -> dict[str, JsonObject]:
    """Return accuracy, NLL and ECE of each model under each corruption and severity.

    Every model sees the same images. An NLL that is infinite is None.

    Args:
        models: Calibrated.
        images: Clean, with their labels.

    Returns:
        For each model ``num_images``, ``corruptions`` (name to one entry per severity) and ``mean`` over the
        corruptions (severity 0: the clean images).
    """
    clean_images, positions_N = images
    labels_N = clean_images.labels_N.numpy()
    large = {name: model.predictor.in_large_chunks(len(clean_images)) for name, model in models.items()}
    models = {name: Answering(large[name], model.calibrator) for name, model in models.items()}

    def measured(examples: Examples) -> dict[str, JsonObject]:
        probabilities = mean_probabilities(models, examples)
        return {name: _measure(p_NK, labels_N) for name, p_NK in probabilities.items()}

    found = {
        (corruption, severity): measured(CorruptedExamples(clean_images, corruption, severity, SEED, positions_N))
        for corruption in CORRUPTIONS
        for severity in SEVERITIES
    }
    clean = measured(clean_images)
    records: dict[str, JsonObject] = {}
    for name in models:
        by_corruption = {
            corruption: [{"severity": severity, **found[corruption, severity][name]} for severity in SEVERITIES]
            for corruption in CORRUPTIONS
        }
        at_severity = {severity: [found[each, severity][name] for each in CORRUPTIONS] for severity in SEVERITIES}
        means = [{"severity": severity, **_mean(values)} for severity, values in at_severity.items()]
        records[name] = {
            "num_images": len(labels_N),
            "corruptions": by_corruption,
            "mean": [{"severity": 0, **clean[name]}, *means],
        }
    return records


def _measure(probabilities_NK: NDArray[np.float64], labels_N: NDArray[np.int64]) -> JsonObject:
    """Return the metrics, None where one is infinite."""
    values = {name: metrics.METRICS[name].function(probabilities_NK, labels_N) for name in MEASURED}
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def _mean(entries: list[JsonObject]) -> JsonObject:
    """Return the mean of each metric, None where one is missing."""
    columns = {name: [entry[name] for entry in entries] for name in MEASURED}
    return {name: None if None in values else float(np.mean(values)) for name, values in columns.items()}
