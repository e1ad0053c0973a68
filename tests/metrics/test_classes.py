"""The confusion matrix, recall by class and top-5 accuracy against scikit-learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score

from bayesnet import metrics
from tests.metrics.models import draw_labels, draw_model


@pytest.mark.parametrize("decimals", [None, 0])
def test_against_scikit_learn(decimals: int | None) -> None:
    p = draw_model(300, 7, 3, decimals=decimals)
    y = draw_labels(p, 4)
    matrix = metrics.confusion_matrix(p, y)
    np.testing.assert_array_equal(matrix, confusion_matrix(y, p.argmax(1), labels=range(7)))
    assert matrix.diagonal().sum() == round(300 * metrics.accuracy(p, y))
    records = metrics.per_class(p, y, list("abcdefg"))
    recalls = recall_score(y, p.argmax(1), labels=range(7), average=None)
    assert [record["recall"] for record in records] == pytest.approx(recalls.tolist(), abs=1e-12)
    assert [record["name"] for record in records] == list("abcdefg")
    for record in records:
        assert tuple(record["ci95"]) == metrics.wilson_interval(record["num_right"], record["num_test"])
    if decimals is None:  # scikit-learn cuts ties by the last class first
        assert metrics.top5(p, y) == pytest.approx(top_k_accuracy_score(y, p, k=5, labels=range(7)), abs=1e-12)


def test_a_class_without_test_images() -> None:
    records = metrics.per_class([[0.2, 0.8], [0.4, 0.6]], [1, 1], ["ant", "bee"], level=0.9)
    assert records[0] == {"name": "ant", "num_test": 0, "num_right": 0, "recall": None, "ci90": [None, None]}
    assert (records[1]["recall"], records[1]["ci90"][1]) == (1.0, 1.0)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert all(type(record["num_test"]) is int for record in records)


def test_names_must_be_those_of_the_classes() -> None:
    with pytest.raises(ValueError, match="expected 2 names of classes; got 3"):
        metrics.per_class([[0.2, 0.8]], [1], ["ant", "bee", "cat"])


def test_top5_of_ties_takes_the_first_and_needs_six_classes() -> None:
    tied = np.full((6, 6), 1 / 6)
    assert metrics.top5(tied, np.arange(6)) == pytest.approx(5 / 6, abs=1e-12)
    assert math.isnan(metrics.top5(np.full((5, 5), 0.2), np.arange(5)))


def test_many_classes_do_not_overflow_small_labels() -> None:
    p = np.full((1, 300), 1 / 300)
    assert metrics.confusion_matrix(p, np.array([255], np.uint8))[255, 0] == 1
