"""The first sections: the answer, metrics before and after, what they mean, reliability; and the last, the glossary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from bayesnet.metrics import METRICS
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

_TITLES = {
    "accuracy": "Accuracy",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "ace": "ACE",
    "mce": "MCE",
    "aurc": "AURC",
    "auroc_error": "AUROC of errors",
}
_MORE = {
    "top5": ("Top-5 accuracy", "higher is better"),
    "ece_debiased": ("ECE, debiased", "less what chance alone gives"),
    "ece_smooth": ("Smooth ECE", "without bins"),
    "ece_classwise": ("Class-wise ECE", "of every class's probability"),
    "eaurc": ("Excess AURC", "above the best order of the same answers"),
}
_BRIER_PARTS = {
    "reliability": "miscalibration, lower is better",
    "resolution": "what the confidence tells apart, higher is better",
    "uncertainty": "of the labels, whatever the model",
    "within_bin": "lost to binning",
}
_SHARES = ("accuracy", "top5")
_STAGES = ("before", "after")


def answer(record: JsonObject, title: str) -> str:
    """Return the heading of the page with the answer in one sentence."""
    data = record["data"]
    halves = f"{data['num_half_a']:,} + {data['num_half_b']:,}"
    return (
        f"<header><p class=run>{text(PurePath(str(record['run'])).name)}</p><h1>{text(title)}</h1>"
        f"<p class=answer>{text(record['sentence'])}</p>"
        f"<p class=notes>{text(data['name'])}: {len(data['classes']):,} classes; calibrated on {halves} images (one "
        "half fits the calibration, the other sets the thresholds below), measured once on "
        f"{data['num_test']:,} test images that neither training nor calibration has seen.</p></header>"
    )


def metrics(record: JsonObject) -> str:
    """Return the metrics of each model, before and after calibration, with their intervals."""
    models = record["models"]
    names = "".join(f"<th colspan=2 scope=colgroup>{text(name)}</th>" for name in models)
    stages = "<th scope=col>before</th><th scope=col>after</th>" * len(models)
    rows = []
    for name, title in _TITLES.items():
        better = "higher is better" if METRICS[name].higher_is_better else "lower is better"
        cells = "".join(_cell(name, model[stage]) for model in models.values() for stage in _STAGES)
        rows.append(f"<tr><th scope=row>{title}{small(better)}</th>{cells}</tr>")
    main = (
        f"<div class=scroll><table class=stages><thead><tr><td rowspan=2></td>{names}</tr><tr>{stages}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    notices = "".join(notice(f"{name}: {model['notice']}") for name, model in models.items() if model["notice"])
    parts = main, notices, _difference(record), _notes(models), _more(models)
    return section("Before and after calibration", *parts)


def meaning(record: JsonObject) -> str:
    """Return in words how far each model can be believed, before and after."""
    return section("What it means", *(paragraph(_meaning(name, model)) for name, model in record["models"].items()))


def reliability(record: JsonObject, figures: Mapping[str, bytes]) -> str:
    """Return the reliability diagram with how to read it."""
    caption = (
        "Of the answers that were given with the confidence on the horizontal axis, the share that was right. On the "
        "dashed line confidence can be taken at its word; below it the model is too sure, above it not sure enough. "
        "A grey box is where chance would put a calibrated model's point; red points lie outside."
    )
    return section("Can the confidence be believed?", figure(figures.get("reliability"), caption, "wide"))


def glossary() -> str:
    """Return one plain sentence on each metric, from the table of metrics itself."""
    entries = "".join(f"<dt>{title}</dt><dd>{text(METRICS[name].description)}</dd>" for name, title in _TITLES.items())
    return section("What the numbers say", f"<dl>{entries}</dl>")


def _cell(name: str, values: JsonObject) -> str:
    """Return one value with its 95 % interval; ECE also with what a calibrated model would show."""
    share = name in _SHARES
    shown = _plain(name, values[name])
    ends = interval(values["ci95"][name], share=share) if values[name] is not None else "&nbsp;"
    null = ""
    if name == "ece":
        null = f"<small class=null>calibrated: {interval(values['ece_null95'])}</small>"
    return f"<td>{shown}{small(ends)}{null}</td>"


def _difference(record: JsonObject) -> str:
    """Return what the Bayesian model's metrics are less its twin's, where there are both."""
    if not record["differences"]:
        return ""
    found = ", ".join(
        f"{_TITLES[name]} {number(each['difference'])} ({interval(each['ci95'])}"
        + (")" if each["p_value_holm"] is None else f"; p {number(each['p_value_holm'])})")
        for name, each in record["differences"].items()
    )
    return paragraph(
        f"Bayesian less deterministic, both calibrated, on the same images, with 95 % intervals: {found}. Each p is "
        "the chance of so large a difference, or a larger one, if neither model were better, corrected for the number "
        "of comparisons (Holm); only where it is at most 0.05 is one called better."
    )


def _more(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the metrics without intervals, to unfold."""
    columns = [model[stage] for model in models.values() for stage in _STAGES]
    head = ("metric", *(f"{text(name)}, {stage}" for name in models for stage in _STAGES))
    rows = [
        (f"{title}{small(words)}", *(_plain(name, column[name]) for column in columns))
        for name, (title, words) in _MORE.items()
    ]
    rows += [
        (
            f"Brier score: {part.replace('_', ' ')}{small(words)}",
            *(number(column["brier_decomposition"][part]) for column in columns),
        )
        for part, words in _BRIER_PARTS.items()
    ]
    for key, title, words in (
        ("risk_at_coverage", "Risk at coverage", "wrong among the most confident"),
        ("coverage_at_risk", "Coverage at risk", "answered with at most so many wrong"),
    ):
        rows += [
            (f"{title} {float(at):.0%}{small(words)}", *(percent(column[key][at]) for column in columns))
            for at in columns[0][key]
        ]
    return details("more metrics, without intervals", table(head, rows))


def _plain(name: str, value: float | None) -> str:
    return percent(value) if name in _SHARES else number(value)


def _notes(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the table rests on: images, errors, temperatures, and why a value is missing."""
    items = [
        "Small figures are 95 % intervals: how far the value could move with other test images of the same kind. "
        "They say nothing of training again with another seed.",
        "Even a perfectly calibrated model has an ECE above 0 on so few images: <em>calibrated</em> gives the range "
        "that it would show.",
        *(f"{text(name)}: {_note(model)}." for name, model in models.items()),
    ]
    return f"<ul class=notes>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _note(model: Mapping[str, Any]) -> str:
    """Return what the numbers of one model rest on."""
    after, temperature = model["after"], model["temperature"]
    line = f"{text(model['family'])}, {after['num_errors']:d} errors on {after['num_test']:d} test images"
    if temperature is None:
        line += f"; calibrated by {text(model['calibrator']['name'].replace('_', ' '))}"
    else:
        effect = "unchanged" if temperature == 1 else "lowered" if temperature > 1 else "raised"
        line += f"; temperature {temperature:.3f} (confidence {effect})"
    if model["posterior_temperature"] != 1:
        line += f"; trained at posterior temperature {model['posterior_temperature']:g}"
    if after["num_infinite_nll"]:
        line += f"; NLL is infinite, as {after['num_infinite_nll']:d} true classes were given probability 0"
    if after["auroc_error"] is None:
        line += "; AUROC needs both errors and right answers"
    return line


def _meaning(name: str, model: Mapping[str, Any]) -> str:
    """Return what accuracy, calibration and ranking of one model come to, after calibration."""
    before, after = model["before"], model["after"]
    low, high = after["ece_null95"]
    fit = "more than" if after["ece"] > high else "less than" if after["ece"] < low else "no more than"
    ranking = (
        f" A mistake was less confident than a right answer in {percent(after['auroc_error'])} of the pairs of one of "
        "each (50% would be chance)."
        if after["auroc_error"] is not None
        else ""
    )
    return (
        f"The <strong>{text(name)}</strong> model is right on {percent(after['accuracy'])} of the test images "
        f"(95 % interval {interval(after['ci95']['accuracy'], share=True)}). Its stated confidence is off by "
        f"{percent(after['ece'])} on average after calibration ({percent(before['ece'])} before), {fit} chance alone "
        f"would give a perfectly calibrated model ({interval([low, high], share=True)}).{ranking}"
    )
