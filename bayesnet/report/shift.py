"""Images unlike those of training: unfamiliar sets and corruptions; and the trace of training itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bayesnet.report.markup import (
    beside,
    details,
    figure,
    interval,
    notice,
    number,
    paragraph,
    percent,
    section,
    small,
    table,
    text,
)
from bayesnet.types import JsonObject

_SCORES = {
    "max_probability": "low confidence",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "energy": "energy",
    "feature_density": "feature density",
}
_WHY_MISSING = {
    "mutual_information": "there is no mutual information where there is one draw, or all draws agree",
    "energy": "the energy needs the scale of the logits, which some models do not give",
    "feature_density": "the feature density needs features that all draws share",
}
_MAX_EPOCHS = 12


def unfamiliar(record: JsonObject) -> str:
    """Return how well each score tells unfamiliar images from test images."""
    parts = [
        _set(name, set_name, found)
        for name, model in record["models"].items()
        for set_name, found in model["unfamiliar"].items()
    ]
    if not parts:
        return ""
    words = paragraph(
        "Images that belong to none of the classes, and test images damaged until little is left of them, should look "
        "strange to the model. AUROC is the chance that such an "
        "unfamiliar image has the higher score of the two when it is set beside a test image: 100% is perfect, 50% is "
        "chance, and less than that means that the model finds these images more familiar than its own. FPR95 is the "
        "share of false alarms among the test images where 95 % of the unfamiliar images are found: lower is better."
    )
    missing = [_WHY_MISSING[score] for score in _SCORES if score in _WHY_MISSING and _is_missing(record, score)]
    reasons = paragraph(f"n/a: {'; '.join(missing)}.") if missing else ""
    return section("Does it notice unfamiliar images?", words, *parts, reasons)


def robustness(record: JsonObject, figures: Mapping[str, bytes]) -> str:
    """Return what corruption does to accuracy and calibration."""
    measured = {name: model["robustness"] for name, model in record["models"].items() if model["robustness"]}
    if not measured:
        return ""
    words = paragraph(
        "The same test images, damaged in standard ways (noise, blur, weather, compression) at five severities. "
        "Accuracy falls; a good model becomes less sure as it does, so that its ECE stays low."
    )
    caption = "Thick lines: the mean over the corruptions. Thin lines: one corruption each. Severity 0 is undamaged."
    tables = [
        table(
            ("severity", "accuracy", "NLL", "ECE"),
            [_severity(point) for point in found["mean"]],
            f"{text(name)}: mean over the corruptions, {found['num_images']:d} images",
        )
        for name, found in measured.items()
    ]
    folded = [
        details(f"{text(name)}: accuracy by corruption and severity", _corruptions(found["corruptions"]))
        for name, found in measured.items()
    ]
    return section(
        "What damaged images do to it", words, figure(figures.get("severity"), caption, "wide"), beside(tables), *folded
    )


def left_out(record: JsonObject) -> str:
    """Return what the images did not allow."""
    return "".join(notice(what) for what in record["left_out"])


def training(record: JsonObject, figures: Mapping[str, bytes]) -> str:
    """Return the trace of the training objective."""
    traces = {name: model["training"] for name, model in record["models"].items() if model["training"]}
    if not traces:
        return ""
    caption = (
        "The negative ELBO by epoch, in nats per example (of a model without a posterior, the NLL), its NLL part and, "
        "below, its KL part: the divergence from prior to posterior over the number of training images. The parts are "
        "added up as they are, also where training gave the KL another weight. The curves should have become flat."
    )
    folded = [details(f"{text(name)}: the numbers", _trace(trace)) for name, trace in traces.items()]
    return section("How training went", figure(figures.get("training"), caption), *folded)


def _set(name: str, set_name: str, found: Mapping[str, Any]) -> str:
    """Return the scores of one model on one unfamiliar set."""
    rows = [
        (
            text(_SCORES.get(score, score)),
            percent(each["auroc"])
            + ("" if each["auroc_ci95"][0] is None else small(interval(each["auroc_ci95"], share=True))),
            percent(each["fpr95"]),
            percent(each["aupr_in"]),
            percent(each["aupr_out"]),
        )
        for score, each in found["scores"].items()
    ]
    description = f": {text(found['description'])}" if found["description"] else ""
    caption = f"{text(name)} on {text(set_name)}{description} ({found['num_images']:d} images)"
    why = paragraph(f"No interval: {text(found['no_interval'])}.", "notes") if found["no_interval"] else ""
    return table(("score", "AUROC", "FPR95", "AUPR, test images", "AUPR, unfamiliar"), rows, caption) + why


def _is_missing(record: JsonObject, score: str) -> bool:
    """Return whether some model has no such score of some set."""
    sets = [found for model in record["models"].values() for found in model["unfamiliar"].values()]
    return any(found["scores"][score]["auroc"] is None for found in sets)


def _severity(point: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return the row of one severity."""
    severity = f"{point['severity']:d}" if point["severity"] else "0, undamaged"
    return severity, percent(point["accuracy"]), number(point["nll"]), number(point["ece"])


def _corruptions(corruptions: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return accuracy by corruption and severity."""
    rows = [
        (text(name.replace("_", " ")), *(percent(point["accuracy"]) for point in points))
        for name, points in corruptions.items()
    ]
    if not rows:
        return ""
    severities = [f"{point['severity']:d}" for point in next(iter(corruptions.values()))]
    return table(("corruption", *severities), rows)


def _trace(trace: Sequence[Mapping[str, Any]]) -> str:
    """Return the trace as a table, thinned to a few epochs that hold the first and the last."""
    step = max(1, -(-(len(trace) - 1) // (_MAX_EPOCHS - 1)))
    chosen = [*trace[:-1:step], trace[-1]]
    rows = [(f"{point['epoch']:d}", *(number(point[part]) for part in ("loss", "nll", "kl"))) for point in chosen]
    return table(("epoch", "objective", "NLL part", "KL part"), rows)
