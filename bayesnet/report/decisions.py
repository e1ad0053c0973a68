"""What a user can decide with: sets of labels that hold the right one, and when to give no answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bayesnet.report.markup import (
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

_METHODS = {
    "lac": "smallest sets on average",
    "aps": "larger sets for harder images",
    "raps": "as APS, long sets discouraged",
    "class_conditional": "a promise for each class",
}


def label_sets(record: JsonObject) -> str:
    """Return what the sets of each method promise and what they did."""
    asked = f"{100 * (1 - record['alpha']):.6g}"
    words = paragraph(
        "Instead of one class the model can answer with a set of classes. The sets are made to hold the right class "
        f"for at least {asked}% of images like those of the calibration split; a clear image gets a set of one, a "
        "doubtful one a larger set. The share that they held on the test images should lie in the range that "
        "chance allows."
    )
    default = record["conformal"]
    low, high = default["coverage_band"]
    inside = low <= default["coverage"] <= high
    used = paragraph(
        f"The default method, {text(_title(default['method']))}, held the right class for "
        f"<strong>{percent(default['coverage'])}</strong> of the test images, "
        f"{'inside' if inside else 'outside'} that range, with <strong>{default['mean_set_size']:.2f}</strong> classes "
        "to a set on average. The promise holds on average over images, not for each class; only the class-conditional "
        "method promises it for each."
    )
    parts = [_methods(name, model["conformal"]) for name, model in record["models"].items()]
    remarks = dict.fromkeys(
        f"{_title(method)}: {entry['notice']}"
        for model in record["models"].values()
        for method, entry in model["conformal"].items()
        if entry["notice"]
    )
    folded = [
        details(f"{text(name)}: sets by class", _by_class(entry, record["data"]["classes"]))
        for name, model in record["models"].items()
        for entry in model["conformal"].values()
    ]
    return section("Sets of labels", words, used, *parts, *(notice(remark) for remark in remarks), *folded)


def abstention(record: JsonObject, figures: Mapping[str, bytes]) -> str:
    """Return how often the model answers if it may keep silent, and the risk-coverage curves."""
    parts = [
        part
        for name, model in record["models"].items()
        if model["abstention"] is not None
        for part in (_promise(name, model["abstention"]), notice(model["abstention"]["notice"]))
    ]
    caption = (
        "If only the most confident share of the images is answered (horizontal axis), this share of the answers is "
        "wrong. A curve that stays low to the right is better; at 100 % it is the error rate on all test images."
    )
    return section("When to give no answer", *parts, figure(figures.get("risk_coverage"), caption))


def _methods(name: str, conformal: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of the methods of one model."""
    rows = [
        (
            f"{text(_title(method))}{small(_METHODS.get(method, ''))}",
            percent(entry["coverage"]),
            interval(entry["coverage_band"], share=True),
            number(entry["mean_set_size"], 2),
            f"{entry['num_empty']:d}",
        )
        for method, entry in conformal.items()
    ]
    head = ("method", "held the right class", "range of chance (99 %)", "mean size", "empty sets")
    return table(head, rows, text(name)) if rows else ""


def _by_class(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return coverage by class where the method gives it."""
    rows = [
        (
            text(names[index]),
            percent(each["coverage"]),
            interval(each["band"], share=True) if each["band"] else "n/a",
            f"{each['num_test']:d}",
            f"{each['num_calibration']:d}",
        )
        for index, each in enumerate(entry.get("by_class") or ())
    ]
    head = ("class", "held the right class", "range of chance (99 %)", "test images", "calibration images")
    return table(head, rows) if rows else ""


def _promise(name: str, found: Mapping[str, Any]) -> str:
    """Return what abstention promises of one model, and what it did on the test images."""
    risk, level = f"{100 * found['max_risk']:.6g}%", f"{100 * found['confidence_level']:.6g}%"
    who = f"The <strong>{text(name)}</strong> model"
    if not found["attained"]:
        return paragraph(
            f"{who} gives no answers: no threshold was shown to keep the share of wrong ones at {risk} or less with "
            f"{level} confidence, from {found['num_fitted']:d} images."
        )
    test = found["test"]
    did = (
        f"On the test images it answered {percent(test['coverage'])}, {test['num_kept']:d} images, and "
        f"{test['num_errors']:d} of the answers were wrong: {percent(test['risk'])} "
        f"(95 % interval {interval(test['ci95'], share=True)})."
        if test["num_kept"]
        else "It answered none of the test images."
    )
    return paragraph(
        f"{who} answers {percent(found['coverage'])} of images, those with a confidence of at least "
        f"{percent(found['threshold'], 2)}, and then at most {risk} of its answers are wrong with {level} confidence "
        f"(bound {percent(found['risk_bound'], 2)}, from {found['num_fitted']:d} images). {did}"
    )


def _title(method: str) -> str:
    """Return the name that a reader sees: an abbreviation in capitals, words as they are."""
    return method.replace("_", "-") if "_" in method else method.upper()
