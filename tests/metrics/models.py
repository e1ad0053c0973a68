"""Simulated models and labels that the tests of the metrics share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def draw_model(num_examples: int, num_classes: int, seed: int, *, decimals: int | None = None) -> Array:
    """Random probabilities; few decimals give heavy ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_examples, num_classes)) * 1.5
    if decimals is not None:
        logits = np.round(logits, decimals)
        logits[: num_examples // 2] = logits[0]
    p = np.exp(logits)
    return np.asarray(p / p.sum(1, keepdims=True), np.float64)


def draw_labels(p: Array, seed: int) -> Labels:
    """Labels drawn from the model's own probabilities: it is then perfectly calibrated."""
    u = np.random.default_rng(seed).random((len(p), 1))
    return np.asarray(np.minimum((u > p.cumsum(1)).sum(1), p.shape[1] - 1), np.int64)
