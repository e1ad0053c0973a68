"""A calibration record of simulated models, complete: every part of the schema that the report and the figures read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayesnet.metrics import confusion_cells, evaluate, reliability_bins
from bayesnet.types import JsonObject

Array = NDArray[np.float64]

CORRUPTION_NAMES = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
NUM_RESAMPLES = 50
PLACE = 12  # images in a list of images


def report_record(
    *,
    models: Sequence[str] = ("deterministic", "bayesian"),
    classes: Sequence[str] = ("cat", "dog", "horse", "truck"),
    num_test: int = 240,
    seed: int = 0,
) -> JsonObject:
    """Return a record whose numbers hang together: metrics, bins and counts are of the same simulated predictions."""
    rng = np.random.default_rng(seed)
    made = {name: _model(name, list(classes), num_test, rng) for name in models}
    default = "bayesian" if "bayesian" in made else list(made)[-1]
    pair = {"difference": -0.0123, "ci95": [-0.0301, 0.0044], "p_value": 0.1234, "p_value_holm": 0.3702}
    return {
        "run": "/runs/simulated",
        "data": {
            "name": "simulated",
            "classes": list(classes),
            "num_half_a": 118,
            "num_half_b": 122,
            "num_test": num_test,
        },
        "models": made,
        "differences": dict.fromkeys(("nll", "brier", "accuracy"), pair) if len(made) > 1 else {},
        "conformal": made[default]["conformal"]["lac"],
        "sentence": "After calibration, neither model is shown to be better on NLL, Brier score and accuracy.",
        "report": "/runs/simulated/report.html",
        "alpha": 0.1,
        "left_out": [],
    }


def bare_record(*, models: Sequence[str] = ("bayesian",), classes: Sequence[str] = ("a", "b")) -> JsonObject:
    """Return a record without the parts that a run may lack, and with None where a number may be missing."""
    record = report_record(models=models, classes=classes, num_test=40)
    record["left_out"] = ["no corruptions: images have 2 channels, not 1 or 3"]
    nothing = {"mean": 0.0, "mean_right": 0.0, "mean_wrong": None, "auroc_error": None}
    for model in record["models"].values():
        model |= {"unfamiliar": {}, "robustness": None, "abstention": None, "training": [], "temperature": None}
        for stage in ("before", "after"):
            model[stage] |= {"nll": None, "auroc_error": None, "num_infinite_nll": 2}
            model[stage]["ci95"] |= {"nll": [None, None], "auroc_error": [None, None]}
        model["uncertainty"]["epistemic"] |= nothing
        model["uncertainty"] |= {"most_uncertain": [], "most_epistemic": [], "confidently_wrong": []}
        model["classes"][0] |= {"num_test": 0, "num_right": 0, "recall": None, "ci95": [None, None]}
    return record


def _model(name: str, classes: list[str], num_test: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the part of one model."""
    bayesian = name != "deterministic"
    p_NK = rng.dirichlet([0.25] * len(classes), num_test)
    labels_N = (rng.random((num_test, 1)) > p_NK.cumsum(1)).sum(1).clip(max=len(classes) - 1)
    sharp_NK = p_NK**1.6 / (p_NK**1.6).sum(1, keepdims=True)
    counts_KK = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts_KK, (labels_N, p_NK.argmax(1)), 1)
    return {
        "family": "mean_field" if bayesian else "deterministic",
        "posterior_temperature": 0.9 if bayesian else 1.0,
        "digest": "0" * 64,
        "calibrator": {"name": "temperature", "temperature": 1.25},
        "temperature": 1.25 if bayesian else 1.6,
        "notice": None if bayesian else "half A holds 7 errors: the temperature lies between 1.1 and 2.4",
        "threshold": {"method": "lac", "alpha": 0.1, "threshold": 0.83, "num_calibration": 122},
        "before": evaluate(sharp_NK, labels_N, num_resamples=NUM_RESAMPLES),
        "after": evaluate(p_NK, labels_N, num_resamples=NUM_RESAMPLES),
        "reliability": {"before": _bins(sharp_NK, labels_N), "after": _bins(p_NK, labels_N)},
        "risk_coverage": _risk_coverage(p_NK, labels_N),
        "confusion": confusion_cells(p_NK, labels_N),
        "classes": [_class(counts_KK, index, each) for index, each in enumerate(classes)],
        "conformal": _conformal(len(classes), num_test, rng),
        "abstention": _abstention(bayesian),
        "uncertainty": _uncertainty(p_NK, labels_N, classes, bayesian, rng),
        "unfamiliar": {
            "photographs": {
                "description": "crops of two photographs",
                "num_images": 300,
                "no_interval": None,
                "scores": {score: _detection(score, bayesian, rng) for score in _SCORES},
            }
        },
        "robustness": _robustness(rng),
        "training": [
            {"epoch": epoch, "loss": nll + kl, "nll": nll, "kl": kl}
            for epoch in range(1, 31)
            for nll, kl in [(0.2 + 1.5 / epoch, (0.1 + epoch / 300) * bayesian)]
        ],
    }


_SCORES = ("max_probability", "entropy", "mutual_information", "energy", "feature_density")


def _bins(p_NK: Array, labels_N: NDArray[np.int64]) -> JsonObject:
    """Return the reliability bins, None in empty ones."""
    found = reliability_bins(p_NK, labels_N)
    names = {"confidence": found.confidence_B, "accuracy": found.accuracy_B, "low": found.low_B, "high": found.high_B}
    listed = {key: [None if np.isnan(each) else float(each) for each in values] for key, values in names.items()}
    return {"count": found.count_B.tolist(), **listed}


def _risk_coverage(p_NK: Array, labels_N: NDArray[np.int64]) -> JsonObject:
    """Return the risk at up to 101 coverages."""
    wrong_N = (p_NK.argmax(1) != labels_N)[np.argsort(-p_NK.max(1), kind="stable")]
    kept = np.unique(np.linspace(1, len(wrong_N), 101).round().astype(int))
    return {"coverage": (kept / len(wrong_N)).tolist(), "risk": (wrong_N.cumsum()[kept - 1] / kept).tolist()}


def _class(counts_KK: NDArray[Any], index: int, name: str) -> JsonObject:
    """Return the recall of one class with Wilson's interval."""
    num_test, num_right = int(counts_KK[index].sum()), int(counts_KK[index, index])
    if not num_test:
        return {"name": name, "num_test": 0, "num_right": 0, "recall": None, "ci95": [None, None]}
    share, z2 = num_right / num_test, 1.96**2
    centre = (share + z2 / (2 * num_test)) / (1 + z2 / num_test)
    half = 1.96 * np.sqrt(share * (1 - share) / num_test + z2 / (4 * num_test**2)) / (1 + z2 / num_test)
    ci95 = [float(max(centre - half, 0)), float(min(centre + half, 1))]
    return {"name": name, "num_test": num_test, "num_right": num_right, "recall": share, "ci95": ci95}


def _conformal(num_classes: int, num_test: int, rng: np.random.Generator) -> JsonObject:
    """Return the sets of four methods."""
    common = {"alpha": 0.1, "threshold": 0.83, "coverage_band": [0.81, 0.96], "num_calibration": 122}
    found: JsonObject = {
        method: {
            **common,
            "method": method,
            "coverage": float(rng.uniform(0.85, 0.95)),
            "mean_set_size": float(rng.uniform(1.2, 2.0)),
            "num_empty": int(rng.integers(4)),
            "num_test": num_test,
            "notice": None,
        }
        for method in ("lac", "aps", "raps", "class_conditional")
    }
    found["class_conditional"] |= {
        "notice": "too few calibration images for 1 class, whose sets are full",
        "by_class": [
            {"coverage": float(rng.uniform(0.8, 1)), "band": [0.7, 1.0], "num_test": 40 + k, "num_calibration": 30 + k}
            for k in range(num_classes)
        ],
    }
    return found


def _abstention(attained: bool) -> JsonObject:
    """Return an abstention rule that keeps 62.3 %, or one that could not be found."""
    test = {"coverage": 0.6125, "num_kept": 147, "num_errors": 2, "risk": 2 / 147, "ci95": [0.0017, 0.0483]}
    nothing = {"coverage": 0.0, "num_kept": 0, "num_errors": 0, "risk": None, "ci95": [None, None]}
    return {
        "max_risk": 0.05,
        "confidence_level": 0.95,
        "num_fitted": 122,
        "attained": attained,
        "threshold": 0.8123 if attained else None,
        "coverage": 0.623 if attained else 0.0,
        "risk_bound": 0.0479 if attained else None,
        "notice": None if attained else "5 % needs at least 59 images without an error",
        "test": test if attained else nothing,
    }


def _uncertainty(
    p_NK: Array, labels_N: NDArray[np.int64], classes: list[str], bayesian: bool, rng: np.random.Generator
) -> JsonObject:
    """Return the split of uncertainty; a point estimate has no epistemic part."""
    total_N = -(p_NK * np.log(p_NK + 1e-300)).sum(1)
    epistemic_N = total_N * rng.uniform(0.05, 0.4, len(total_N)) if bayesian else np.zeros(len(total_N))
    parts = {"total": total_N, "aleatoric": total_N - epistemic_N, "epistemic": epistemic_N}
    given_N, wrong_N = p_NK.argmax(1), p_NK.argmax(1) != labels_N

    def images(order: NDArray[np.intp], value_N: Array) -> list[JsonObject]:
        return [
            {
                "index": int(i),
                "name": f"test/{classes[labels_N[i]]}/{i:05d}.png",
                "label": classes[labels_N[i]],
                "predicted": classes[given_N[i]],
                "probability": float(p_NK[i].max()),
                "value": float(value_N[i]),
            }
            for i in order[:PLACE]
        ]

    confidence_N = p_NK.max(1)
    by_class = [
        {"name": name, **{part: float(value_N[labels_N == k].sum()) / 50 for part, value_N in parts.items()}}
        for k, name in enumerate(classes)
    ]
    return {
        **{part: _part(value_N, wrong_N) for part, value_N in parts.items()},
        "by_class": by_class,
        "most_uncertain": images(np.argsort(-total_N), total_N),
        "most_epistemic": images(np.argsort(-epistemic_N), epistemic_N),
        "confidently_wrong": images(np.argsort(-np.where(wrong_N, confidence_N, -1))[: wrong_N.sum()], confidence_N),
    }


def _part(value_N: Array, wrong_N: NDArray[np.bool_]) -> JsonObject:
    """Return means and histograms of one part of uncertainty."""
    edges = np.linspace(0, max(float(value_N.max()), 0.1), 21)
    return {
        "mean": float(value_N.mean()),
        "mean_right": float(value_N[~wrong_N].mean()),
        "mean_wrong": float(value_N[wrong_N].mean()),
        "auroc_error": float(((value_N[wrong_N][:, None] - value_N[~wrong_N]) > 0).mean()),
        "histogram": {
            "edges": edges.tolist(),
            "right": np.histogram(value_N[~wrong_N], edges)[0].tolist(),
            "wrong": np.histogram(value_N[wrong_N], edges)[0].tolist(),
        },
    }


def _detection(score: str, bayesian: bool, rng: np.random.Generator) -> JsonObject:
    """Return how well a score finds unfamiliar images; a point estimate has no mutual information."""
    if score == "mutual_information" and not bayesian:
        return {"auroc": None, "auroc_ci95": [None, None], "aupr_in": None, "aupr_out": None, "fpr95": None}
    auroc = float(rng.uniform(0.7, 0.95))
    return {
        "auroc": auroc,
        "auroc_ci95": [auroc - 0.0321, auroc + 0.0289],
        "aupr_in": float(rng.uniform(0.6, 0.9)),
        "aupr_out": float(rng.uniform(0.6, 0.9)),
        "fpr95": float(rng.uniform(0.2, 0.6)),
    }


def _robustness(rng: np.random.Generator) -> JsonObject:
    """Return metrics that get worse with severity."""

    def point(severity: int, slope: float) -> JsonObject:
        accuracy, ece = 0.9 - slope * severity, 0.03 + slope / 2 * severity
        return {"severity": severity, "accuracy": accuracy, "nll": 0.4 + 2 * slope * severity, "ece": ece}

    slopes = {name: float(rng.uniform(0.02, 0.13)) for name in CORRUPTION_NAMES}
    mean = float(np.mean(list(slopes.values())))
    return {
        "num_images": 200,
        "corruptions": {name: [point(severity, slope) for severity in range(1, 6)] for name, slope in slopes.items()},
        "mean": [point(severity, mean) for severity in range(6)],
    }
