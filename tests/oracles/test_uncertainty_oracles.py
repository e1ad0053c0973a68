"""Calibration and selective metrics against netcal and torch-uncertainty (extra `oracles`) on generated cases.

Both bin as we do for three classes and more. netcal reads two classes as one probability, and its ACE averages classes,
not examples: neither is compared. torch-uncertainty computes in float32, hence 1e-5; its AURC is the trapezoid rule
over the coverages that we average over, so that the first and the last risk count half.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesnet import metrics
from bayesnet.metrics.counted import Scores
from bayesnet.metrics.selective import risk_curve
from tests.oracles.test_metrics_oracles import case

# Their own warnings, of memory and of their next versions, are not ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

SIZES = st.sampled_from([(30, 3), (50, 7), (400, 10)])


@pytest.fixture(scope="module")
def netcal() -> Any:  # noqa: ANN401 - it has no types
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import netcal.metrics

        return netcal.metrics


@pytest.fixture(scope="module")
def theirs() -> Any:  # noqa: ANN401 - it has no types
    """Give the metrics of torch-uncertainty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_uncertainty.metrics

        return torch_uncertainty.metrics


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=SIZES)
def test_binned_errors_are_those_of_netcal(netcal: Any, seed: int, size: tuple[int, int]) -> None:  # noqa: ANN401
    probabilities, labels = case(seed, *size)
    for ours, name in ((metrics.ece, "ECE"), (metrics.mce, "MCE")):
        expected = getattr(netcal, name)(metrics.NUM_BINS).measure(probabilities, labels)
        assert ours(probabilities, labels) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=SIZES)
def test_scores_and_risks_are_those_of_torch_uncertainty(theirs: Any, seed: int, size: tuple[int, int]) -> None:  # noqa: ANN401
    probabilities, labels = case(seed, *size)
    tensors = torch.from_numpy(probabilities), torch.from_numpy(labels)

    def value(metric: Any) -> float:  # noqa: ANN401
        metric.update(*tensors)
        return float(metric.compute())

    pairs: tuple[tuple[float, Callable[[], Any]], ...] = (
        (metrics.nll(probabilities, labels), theirs.CategoricalNLL),
        (metrics.brier(probabilities, labels), lambda: theirs.BrierScore(num_classes=size[1])),
        (metrics.risk_at_coverage(probabilities, labels, 0.8), theirs.RiskAt80Cov),
    )
    for ours, metric in pairs:
        assert ours == pytest.approx(value(metric()), abs=1e-5)
    risk_N = risk_curve(Scores.of(probabilities, labels))
    trapezoid = (risk_N.sum() - (risk_N[0] + risk_N[-1]) / 2) / (len(risk_N) - 1)
    assert metrics.aurc(probabilities, labels) == pytest.approx(risk_N.mean(), abs=1e-12)
    assert trapezoid == pytest.approx(value(theirs.AURC()), abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_known=st.integers(1, 80), num_unfamiliar=st.integers(20, 80))
def test_false_alarms_are_those_of_torch_uncertainty(
    theirs: Any,  # noqa: ANN401
    seed: int,
    num_known: int,
    num_unfamiliar: int,
) -> None:
    rng = np.random.default_rng(seed)
    known_N, unfamiliar_M = rng.normal(size=num_known), rng.normal(size=num_unfamiliar) + 1
    metric = theirs.FPR95(pos_label=1)
    labels = torch.cat([torch.zeros(num_known), torch.ones(num_unfamiliar)]).long()
    metric.update(torch.from_numpy(np.concatenate([known_N, unfamiliar_M])), labels)
    assert metrics.fpr_at_tpr(unfamiliar_M, known_N) == pytest.approx(float(metric.compute()), abs=1e-6)


def test_an_error_that_weighs_bins_alike_would_be_noticed(netcal: Any) -> None:  # noqa: ANN401
    """The control: the mean gap of the bins instead of the mean over examples."""
    probabilities, labels = case(0, 400, 10)
    bins = metrics.reliability_bins(probabilities, labels)
    wrong = float(np.nanmean(np.abs(bins.confidence_B - bins.accuracy_B)))
    assert abs(wrong - netcal.ECE(metrics.NUM_BINS).measure(probabilities, labels)) > 1e-3
