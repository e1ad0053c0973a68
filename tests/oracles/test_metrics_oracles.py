"""Metrics and predictive numerics against reference libraries (extra `oracles`) on generated cases.

torchmetrics puts a confidence of exactly 1.0 into a bin of its own (its issue 3510); cases here keep below 1. It bins
left-closed where we bin right-closed, which no random confidence can tell apart. What it has no counterpart of (smooth
ECE, the Brier score's parts, risk and coverage, the false positive rate) is checked by brute force in tests/metrics.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesnet import metrics
from bayesnet.predictive import log_mean_exp

pytestmark = pytest.mark.oracle

SIZES = st.sampled_from([(1, 2), (50, 2), (50, 7), (400, 10)])


def case(seed: int, num_examples: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(num_classes, 0.4), num_examples)
    labels = np.array([rng.choice(num_classes, p=row) for row in 0.8 * probabilities + 0.2 / num_classes])
    return probabilities, labels


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES)
def test_torchmetrics(seed: int, size: tuple[int, int]) -> None:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    num_classes = size[1]
    probabilities, labels = case(seed, *size)
    tensors = torch.from_numpy(probabilities), torch.from_numpy(labels)
    accuracy = multiclass_accuracy(*tensors, num_classes=num_classes, average="micro")
    assert metrics.accuracy(probabilities, labels) == pytest.approx(float(accuracy), abs=1e-6)
    if num_classes > 5:
        top5 = multiclass_accuracy(*tensors, num_classes=num_classes, average="micro", top_k=5)
        assert metrics.top5(probabilities, labels) == pytest.approx(float(top5), abs=1e-6)
    theirs = multiclass_confusion_matrix(*tensors, num_classes=num_classes)
    np.testing.assert_array_equal(metrics.confusion_matrix(probabilities, labels), theirs.numpy())
    for norm, ours in (("l1", metrics.ece), ("max", metrics.mce)):
        error = multiclass_calibration_error(*tensors, num_classes=num_classes, n_bins=15, norm=norm)  # type: ignore[arg-type]
        assert ours(probabilities, labels) == pytest.approx(float(error), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES)
def test_class_wise_ece_is_the_mean_of_binary_ones_of_torchmetrics(seed: int, size: tuple[int, int]) -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    probabilities, labels = case(seed, *size)
    each = []
    for label in range(size[1]):
        p_N, true_N = np.ascontiguousarray(probabilities[:, label]), (labels == label).astype(int)
        each.append(float(binary_calibration_error(torch.from_numpy(p_N), torch.from_numpy(true_N), n_bins=15)))
    assert metrics.ece_classwise(probabilities, labels) == pytest.approx(np.mean(each), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 1, 15]))
def test_detection_against_torchmetrics(seed: int, num_positive: int, num_negative: int, decimals: int) -> None:
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    rng = np.random.default_rng(seed)
    # Scores of 0 to 1: others would be passed through a sigmoid. Few decimals give heavy ties.
    positive, negative = (np.round(rng.random(each), decimals) for each in (num_positive, num_negative))
    scores = torch.from_numpy(np.concatenate((positive, negative)))
    truth = torch.cat((torch.ones(num_positive), torch.zeros(num_negative))).long()
    assert metrics.auroc(positive, negative) == pytest.approx(float(binary_auroc(scores, truth)), abs=1e-6)
    assert metrics.aupr(positive, negative) == pytest.approx(float(binary_average_precision(scores, truth)), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES)
def test_scikit_learn(seed: int, size: tuple[int, int]) -> None:
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    probabilities, labels = case(seed, *size)
    names = range(size[1])
    assert metrics.nll(probabilities, labels) == pytest.approx(log_loss(labels, probabilities, labels=names), abs=1e-12)
    expected = brier_score_loss(labels, probabilities, labels=names, scale_by_half=False)
    assert metrics.brier(probabilities, labels) == pytest.approx(expected, abs=1e-12)
    wrong = probabilities.argmax(1) != labels
    if 0 < wrong.sum() < len(wrong):
        area = roc_auc_score(wrong, -probabilities.max(1))
        assert metrics.auroc_error(probabilities, labels) == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("num_draws", [1, 7, 256])
def test_log_mean_exp_against_mpmath(num_draws: int) -> None:
    import mpmath

    mpmath.mp.dps = 50
    rng = np.random.default_rng(num_draws)
    for scale in (1.0, 100.0, 1e4):
        logits = scale * rng.standard_normal((num_draws, 4))
        exact = []
        for k in range(4):
            terms = [
                mpmath.exp(mpmath.mpf(row[k]) - max(row))
                / mpmath.fsum(mpmath.exp(mpmath.mpf(v) - max(row)) for v in row)
                for row in logits.tolist()
            ]
            exact.append(float(mpmath.log(mpmath.fsum(terms) / num_draws)))
        ours = log_mean_exp(torch.from_numpy(logits).log_softmax(-1), 0)
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-12, atol=1e-15)
