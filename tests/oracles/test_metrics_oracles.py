"""Metrics and predictive numerics against reference libraries (extra `oracles`) on generated cases.

torchmetrics puts a confidence of exactly 1.0 into a bin of its own (its issue 3510); cases here keep below 1. It bins
left-closed where we bin right-closed, which no random confidence can tell apart.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesnet import metrics
from bayesnet.predictive import log_mean_exp

pytestmark = pytest.mark.oracle

CASES = [(seed, num_examples, num_classes) for seed in range(5) for num_examples, num_classes in ((50, 2), (400, 10))]


def case(seed: int, num_examples: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(num_classes, 0.4), num_examples)
    labels = np.array([rng.choice(num_classes, p=row) for row in 0.8 * probabilities + 0.2 / num_classes])
    return probabilities, labels


@pytest.mark.parametrize(("seed", "num_examples", "num_classes"), CASES)
def test_torchmetrics(seed: int, num_examples: int, num_classes: int) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    probabilities, labels = case(seed, num_examples, num_classes)
    tensors = torch.from_numpy(probabilities), torch.from_numpy(labels)
    accuracy = multiclass_accuracy(*tensors, num_classes=num_classes, average="micro")
    assert metrics.accuracy(probabilities, labels) == pytest.approx(float(accuracy), abs=1e-6)
    for norm, ours in (("l1", metrics.ece), ("max", metrics.mce)):
        theirs = multiclass_calibration_error(*tensors, num_classes=num_classes, n_bins=15, norm=norm)  # type: ignore[arg-type]
        assert ours(probabilities, labels) == pytest.approx(float(theirs), abs=1e-6)


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
