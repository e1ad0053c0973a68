"""What may enter a metric and what may not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesnet import metrics
from bayesnet.metrics import METRICS, evaluate
from tests.metrics.models import draw_labels, draw_model

GOOD = [[0.5, 0.5], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([[0.5, 0.5], [math.nan, 1.0]], [0, 0], "row 1: probabilities contain NaN or infinity"),
        ([[math.inf, -math.inf], [0.5, 0.5]], [0, 0], "row 0: probabilities contain NaN or infinity"),
        ([[0.5, 0.5], [-0.5, 1.5]], [0, 0], "row 1: probability -0.5 is negative; are these logits?"),
        ([[0.5, 0.5], [0.5, 0.5002]], [0, 0], "row 1: probabilities sum to 1.0002, not 1"),
        ([[3.0, 1.0], [0.5, 0.5]], [0, 0], "row 0: probabilities sum to 4, not 1"),
        (GOOD, [0, 2], "row 1: label 2 is not in 0..1"),
        (GOOD, [-1, 0], "row 0: label -1 is not in 0..1"),
        (GOOD, [0], "labels must have shape (2,), one for each row; got (1,)"),
        (GOOD, [0.0, 1.0], "labels must be integers; got float64"),
        (GOOD, [True, False], "labels must be integers; got bool"),
        (np.empty((0, 3)), [], "probabilities must have shape (examples, classes), neither of them 0; got (0, 3)"),
        ([0.5, 0.5], [0, 0], "probabilities must have shape (examples, classes), neither of them 0; got (2,)"),
    ],
)
def test_wrong_input_names_the_row(p: list[list[float]], y: list[int], message: str) -> None:
    for function in (metrics.nll, evaluate):
        with pytest.raises(ValueError) as caught:
            function(p, y)
        assert str(caught.value) == message


def test_sums_within_tolerance_are_taken_as_they_are() -> None:
    assert metrics.nll([[0.50005, 0.49999]], [0]) == -math.log(0.50005)


def test_half_precision_is_computed_in_float64() -> None:
    p = np.full((5000, 2), 0.5, np.float16)
    assert metrics.nll(p, np.zeros(5000, np.uint8)) == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("name", list(METRICS))
def test_float16_moves_a_metric_by_no_more_than_its_rounding(name: str) -> None:
    """Rounding moves a probability by a part in 2^11, an NLL by as much, a Brier score by at most four times that.

    Binned errors may also move an example on an edge into the next bin; here none lies so near to one.
    """
    p = draw_model(2000, 5, 3) * 0.5 + 0.1  # no probability below .1, where rounding to float16 is relative
    y = draw_labels(p, 4)
    edges = np.arange(1, 15) / 15
    clear = np.abs(p.max(1)[:, None] - edges).min(1) > 2**-11
    p, y = p[clear], y[clear]
    half = p.astype(np.float16)
    assert half.sum(1, dtype=np.float64).max() > 1 + 1e-4  # beyond what float64 rows may sum to
    expected = METRICS[name].function(p, y)
    # Examples that tie after rounding change places: each pair of them at most once.
    bound = 4 * 2**-11 if name != "auroc_error" else 5e-3
    assert METRICS[name].function(half, y) == pytest.approx(expected, abs=bound)
    assert METRICS[name].function(half, y) != expected or name == "accuracy"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_precision_are_taken_or_refused(kind: torch.dtype) -> None:
    p = torch.from_numpy(draw_model(300, 6, 5)).to(kind)
    y = torch.from_numpy(draw_labels(draw_model(300, 6, 5), 6))
    if kind == torch.bfloat16:
        with pytest.raises(ValueError, match=r"cannot be read as an array, convert to float32 first: .*BFloat16"):
            evaluate(p, y, num_resamples=20)
        with pytest.raises(ValueError, match="convert to float32 first"):
            metrics.auroc(p[:, 0], p[:, 1])
    else:
        found = evaluate(p, y, num_resamples=20)
        assert all(math.isfinite(found[name]) for name in METRICS)
        assert 0 <= metrics.auroc(p[:, 0], p[:, 1]) <= 1
        assert metrics.confusion_matrix(p, y).sum() == 300


def test_bfloat16_softmax_in_float32_is_a_row_error_not_a_number() -> None:
    coarse = torch.full((1, 3), 1 / 3, dtype=torch.bfloat16).float().numpy()
    with pytest.raises(ValueError, match=r"row 0: probabilities sum to 1\.00195, not 1"):
        metrics.nll(coarse, [0])


def test_a_probability_that_float16_cannot_hold_is_counted() -> None:
    p = np.array([[1 - 1e-8, 1e-8]]).astype(np.float16)
    assert metrics.nll(p, [1]) == math.inf
    assert metrics.count_infinite(p, [1]) == 1


def test_numbers_only() -> None:
    with pytest.raises(ValueError, match="expected an array of real numbers; got complex128"):
        metrics.nll([[1j, 1 - 1j]], [0])
