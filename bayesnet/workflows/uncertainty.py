"""Where a model is uncertain, and whether it is for want of knowledge or because the image cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bayesnet.data import Examples
from bayesnet.metrics.detection import auroc
from bayesnet.types import JsonObject
from bayesnet.workflows.answering import Answers, Array

NUM_SHOWN = 12
NUM_BINS = 20


def uncertainty_record(
    answers: Answers, labels_N: NDArray[np.int64], examples: Examples, classes: Sequence[str]
) -> JsonObject:
    """Return how total, aleatoric and epistemic uncertainty are spread, and the images where they are highest.

    Args:
        answers: Of the test split.
        labels_N: Its labels.
        examples: Names its images.
        classes: Names in index order.

    Returns:
        ``total``, ``aleatoric``, ``epistemic`` (means in nats, over right and wrong answers, histogram, and how well
        each tells wrong from right), ``by_class``, ``most_uncertain``, ``most_epistemic`` and ``confidently_wrong``.
    """
    kinds = {
        "total": answers.entropy_N,
        "aleatoric": answers.expected_entropy_N,
        "epistemic": answers.mutual_information_N,
    }
    predicted_N = answers.after_NK.argmax(1)
    confidence_N = answers.after_NK.max(1)
    wrong_N = predicted_N != labels_N

    def shown(order_N: NDArray[np.intp], values_N: Array) -> list[JsonObject]:
        return [
            {
                "index": int(index),
                "name": examples.name(int(index)),
                "label": classes[labels_N[index]],
                "predicted": classes[predicted_N[index]],
                "probability": float(confidence_N[index]),
                "value": float(values_N[index]),
            }
            for index in order_N[:NUM_SHOWN]
        ]

    errors_N = np.flatnonzero(wrong_N)
    return {
        **{name: _kind(values_N, wrong_N) for name, values_N in kinds.items()},
        "by_class": [
            {"name": name, **{kind: _mean(values_N[labels_N == label]) for kind, values_N in kinds.items()}}
            for label, name in enumerate(classes)
        ],
        "most_uncertain": shown(_highest(kinds["total"]), kinds["total"]),
        "most_epistemic": shown(_highest(kinds["epistemic"]), kinds["epistemic"]) if kinds["epistemic"].any() else [],
        "confidently_wrong": shown(errors_N[_highest(confidence_N[errors_N])], confidence_N),
    }


def _kind(values_N: Array, wrong_N: NDArray[np.bool_]) -> JsonObject:
    """Return how one kind of uncertainty is spread over right and wrong answers."""
    edges = np.linspace(0.0, max(float(values_N.max()), 1e-12), NUM_BINS + 1)
    right, wrong = (np.histogram(values_N[chosen_N], edges)[0].tolist() for chosen_N in (~wrong_N, wrong_N))
    found = auroc(values_N[wrong_N], values_N[~wrong_N])
    return {
        "mean": _mean(values_N),
        "mean_right": _mean(values_N[~wrong_N]),
        "mean_wrong": _mean(values_N[wrong_N]),
        "auroc_error": None if np.isnan(found) else float(found),
        "histogram": {"edges": edges.tolist(), "right": right, "wrong": wrong},
    }


def _highest(values_N: Array) -> NDArray[np.intp]:
    """Return indices from the highest value down; equal values stay in order."""
    return np.argsort(-values_N, kind="stable")


def _mean(values_N: Array) -> float | None:
    return float(values_N.mean()) if len(values_N) else None
