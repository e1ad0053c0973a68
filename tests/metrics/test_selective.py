"""Risk and coverage against brute force over the orders of ties."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesnet import metrics
from tests.metrics.models import Array, Labels, draw_labels, draw_model

CASES = (st.integers(1, 40), st.integers(2, 5), st.integers(0, 2**32 - 1), st.sampled_from([None, 0]))


def brute_risks(p: Array, y: Labels) -> list[float]:
    """Return the risk at every number kept: tied examples share their mean correctness."""
    pairs = sorted(((max(row), float(np.argmax(row) != label)) for row, label in zip(p, y, strict=True)), reverse=True)
    errors = [np.mean([error for other, error in pairs if other == confidence]) for confidence, _ in pairs]
    return [float(np.sum(errors[:k])) / k for k in range(1, len(errors) + 1)]


@settings(max_examples=60, deadline=None)
@given(*CASES)
def test_against_brute_force(n: int, k: int, seed: int, decimals: int | None) -> None:
    p = draw_model(n, k, seed, decimals=decimals)
    y = draw_labels(p, seed)
    risks = brute_risks(p, y)
    wrong = sorted(p.argmax(1) != y)
    best = np.mean([np.mean(wrong[:kept]) for kept in range(1, n + 1)])
    assert metrics.eaurc(p, y) == pytest.approx(np.mean(risks) - best, abs=1e-12)
    for share in (0.01, 0.5, 0.8, 1.0):
        kept = next(each for each in range(1, n + 1) if each >= share * n - 1e-9)
        assert metrics.risk_at_coverage(p, y, share) == pytest.approx(risks[kept - 1], abs=1e-12)
    for risk in (0.0, 0.1, 0.37, 1.0):
        shares = [each / n for each in range(1, n + 1) if risks[each - 1] <= risk + 1e-12]
        assert metrics.coverage_at_risk(p, y, risk) == max(shares, default=0.0)
    record = metrics.risk_coverage_record(p, y)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["coverage"] == [each / n for each in range(1, n + 1)]
    assert record["risk"] == pytest.approx(risks, abs=1e-12)


def test_the_record_of_many_examples_is_short_and_ends_at_all() -> None:
    p = draw_model(1234, 4, 1)
    y = draw_labels(p, 2)
    record = metrics.risk_coverage_record(p, y)
    assert len(record["coverage"]) == len(record["risk"]) == 101
    assert record["coverage"][-1] == 1
    assert record["risk"][-1] == pytest.approx(1 - metrics.accuracy(p, y), abs=1e-12)
    assert (np.diff(record["coverage"]) > 0).all()
    assert len(metrics.risk_coverage_record(p, y, points=11)["risk"]) == 11
    for share, risk in zip(record["coverage"], record["risk"], strict=True):
        assert metrics.risk_at_coverage(p, y, share) == risk


def test_a_perfect_order_has_no_excess_and_the_worst_has_the_most() -> None:
    p = np.array([[1 - each, each] for each in (0.1, 0.2, 0.3, 0.4)])
    assert metrics.eaurc(p, [0, 0, 1, 1]) == pytest.approx(0, abs=1e-12)
    assert metrics.eaurc(p, [0, 0, 0, 0]) == 0
    assert metrics.eaurc(p, [1, 1, 1, 1]) == pytest.approx(0, abs=1e-12)
    assert metrics.eaurc(p, [1, 1, 0, 0]) == pytest.approx((1 + 1 + 2 / 3 + 2 / 4) / 4 - (1 / 3 + 2 / 4) / 4, abs=1e-12)


def test_a_tie_is_not_cut_in_the_order_of_the_file() -> None:
    p = np.full((10, 2), 0.5)
    assert metrics.risk_at_coverage(p, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 0.5) == 0.5
    assert metrics.coverage_at_risk(p, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 0.4) == 0
    assert metrics.coverage_at_risk(p, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 0.5) == 1


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan])
def test_coverage_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match="coverage must be above 0 and at most 1; got"):
        metrics.risk_at_coverage([[1.0, 0.0]], [0], share)


@pytest.mark.parametrize("risk", [-0.1, 1.01, math.nan])
def test_risk_out_of_range(risk: float) -> None:
    with pytest.raises(ValueError, match="risk must be 0 to 1; got"):
        metrics.coverage_at_risk([[1.0, 0.0]], [0], risk)
