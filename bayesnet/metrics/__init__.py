"""Metrics of a classifier: pure functions of (probabilities_NK, labels_N), in NumPy float64.

Probabilities are taken as they are: rows that are not a distribution are an error, never softmaxed, clipped or
rescaled. The predicted class is the most probable one (the first of equals), the confidence is its probability.
"""

from __future__ import annotations

from bayesnet.metrics.calibration_errors import (
    BrierDecomposition,
    NullBand,
    ReliabilityBins,
    brier_decomposition,
    ece_classwise,
    ece_debiased,
    ece_null_band,
    reliability_bins,
    reliability_record,
)
from bayesnet.metrics.checks import SUM_TOLERANCE, checked, checked_probabilities
from bayesnet.metrics.classes import confusion_cells, confusion_matrix, per_class
from bayesnet.metrics.counted import NUM_BINS
from bayesnet.metrics.detection import aupr, auroc, auroc_interval, fpr_at_tpr
from bayesnet.metrics.evaluation import METRICS, Metric, evaluate, paired_difference
from bayesnet.metrics.resampling import wilson_interval
from bayesnet.metrics.scalar import accuracy, ace, aurc, auroc_error, brier, count_infinite, ece, mce, nll, top5
from bayesnet.metrics.selective import coverage_at_risk, eaurc, risk_at_coverage, risk_coverage_record
from bayesnet.metrics.significance import holm, paired_p_value
from bayesnet.metrics.smooth import ece_smooth

__all__ = [
    "METRICS",
    "NUM_BINS",
    "SUM_TOLERANCE",
    "BrierDecomposition",
    "Metric",
    "NullBand",
    "ReliabilityBins",
    "accuracy",
    "ace",
    "aupr",
    "aurc",
    "auroc",
    "auroc_error",
    "auroc_interval",
    "brier",
    "brier_decomposition",
    "checked",
    "checked_probabilities",
    "confusion_cells",
    "confusion_matrix",
    "count_infinite",
    "coverage_at_risk",
    "eaurc",
    "ece",
    "ece_classwise",
    "ece_debiased",
    "ece_null_band",
    "ece_smooth",
    "evaluate",
    "fpr_at_tpr",
    "holm",
    "mce",
    "nll",
    "paired_difference",
    "paired_p_value",
    "per_class",
    "reliability_bins",
    "reliability_record",
    "risk_at_coverage",
    "risk_coverage_record",
    "top5",
    "wilson_interval",
]
