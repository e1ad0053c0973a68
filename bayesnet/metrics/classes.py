"""Class by class: the confusion matrix, and how many images of each class are recognised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.metrics.checks import checked
from bayesnet.metrics.resampling import wilson_interval
from bayesnet.types import JsonObject


def confusion_matrix(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Return how many examples of each class (row) were taken for each class (column), (K, K).

    Example:
        >>> confusion_matrix([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [0, 1, 1]).tolist()
        [[1, 0], [1, 1]]
    """
    p_NK, labels_N = checked(probabilities, labels)
    num_classes = p_NK.shape[1]
    cells = np.bincount(labels_N * num_classes + p_NK.argmax(1), minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def confusion_cells(probabilities: ArrayLike, labels: ArrayLike) -> list[list[int]]:
    """Return the cells of `confusion_matrix` that are not 0, ready for JSON: at most one for each example.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.

    Returns:
        ``[true class, given class, number of examples]`` in the order of the classes.

    Example:
        >>> confusion_cells([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [0, 1, 1])
        [[0, 0, 1], [1, 0, 1], [1, 1, 1]]
    """
    matrix_KK = confusion_matrix(probabilities, labels)
    true_C, given_C = matrix_KK.nonzero()
    columns = true_C.tolist(), given_C.tolist(), matrix_KK[true_C, given_C].tolist()
    return [list(cell) for cell in zip(*columns, strict=True)]


def per_class(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str], *, level: float = 0.95
) -> list[JsonObject]:
    """Return the recall of each class with its Wilson interval, ready for JSON.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,), integers in 0..K-1.
        classes: Their K names in index order.
        level: Level of the intervals, which names their key: ``ci95`` at 0.95.

    Returns:
        For each class ``{"name", "num_test", "num_right", "recall", "ci95": [low, high]}``; recall and interval are
        None for a class without test images.

    Raises:
        ValueError: There are not K names, or the input is not probabilities and labels.
    """
    matrix_KK = confusion_matrix(probabilities, labels)
    if len(classes) != len(matrix_KK):
        raise ValueError(f"expected {len(matrix_KK)} names of classes; got {len(classes)}")
    key, records = f"ci{100 * level:g}", []
    for name, num_test, num_right in zip(
        classes, matrix_KK.sum(1).tolist(), matrix_KK.diagonal().tolist(), strict=True
    ):
        known: JsonObject = {"recall": None, key: [None, None]}
        if num_test:
            ends = wilson_interval(num_right, num_test, level=level)
            known = {"recall": num_right / num_test, key: list(ends)}
        records.append({"name": name, "num_test": num_test, "num_right": num_right, **known})
    return records
