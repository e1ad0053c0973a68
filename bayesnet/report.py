"""The calibration report: one HTML page that needs no network, runs no script and opens anywhere.

Every text passes through `html.escape` and every image is a data URI; the page's own content policy forbids the rest.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from bayesnet.errors import printable
from bayesnet.metrics import METRICS
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


class CalibrationReport(NamedTuple):
    """What the page shows, as plain data.

    Attributes:
        title: Heading.
        sentence: The answer in one sentence, as from `calibration.verdict`.
        run: Name of the run directory.
        models: Model name to "before" and "after" (each from `metrics.evaluate`) and "temperature" (a number, or None).
        conformal: What `calibration.evaluate_sets` returns, or None.
        images: Caption to the bytes of a PNG file.
    """

    title: str
    sentence: str
    run: str
    models: Mapping[str, Mapping[str, Any]]
    conformal: JsonObject | None
    images: Mapping[str, bytes]


def calibration_report(content: CalibrationReport) -> str:
    """Return the page, complete in itself.

    Args:
        content: What to show; names in it may be hostile.
    """
    body = [
        f"<header><p class=run>{_text(content.run)}</p><h1>{_text(content.title)}</h1>",
        f"<p class=answer>{_text(content.sentence)}</p></header>",
        "<h2>Before and after calibration</h2>",
        _table(content.models),
        _notes(content.models),
        *(_figure(caption, png) for caption, png in content.images.items()),
        _conformal(content.conformal),
        _glossary(),
    ]
    return _PAGE.format(title=_text(content.title), style=_STYLE, body="\n".join(part for part in body if part))


def _table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the metrics of each model, before and after, with their intervals."""
    names = "".join(f"<th colspan=2 scope=colgroup>{_text(name)}</th>" for name in models)
    stages = "<th scope=col>before</th><th scope=col>after</th>" * len(models)
    rows = []
    for name, title in _TITLES.items():
        better = "higher is better" if METRICS[name].higher_is_better else "lower is better"
        cells = "".join(_cell(name, model[stage]) for model in models.values() for stage in ("before", "after"))
        rows.append(f"<tr><th scope=row>{title}<small>{better}</small></th>{cells}</tr>")
    return (
        f"<div class=scroll><table><thead><tr><td rowspan=2></td>{names}</tr><tr>{stages}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(name: str, metrics: JsonObject) -> str:
    """Return one value with its 95 % interval; ECE also with what a calibrated model would show."""
    low, high = metrics["ci95"][name]
    interval = f"{_number(name, low)} to {_number(name, high)}" if metrics[name] is not None else "&nbsp;"
    extra = ""
    if name == "ece":
        null_low, null_high = metrics["ece_null95"]
        extra = f"<small class=null>calibrated: {_number(name, null_low)} to {_number(name, null_high)}</small>"
    return f"<td>{_number(name, metrics[name])}<small>{interval}</small>{extra}</td>"


def _notes(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the table rests on: images, errors, temperatures, and why a value is missing."""
    items = [
        "Small figures are 95 % intervals: how far the value could move with other test images of the same kind. "
        "They say nothing of training again with another seed.",
        "Even a perfectly calibrated model has an ECE above 0 on so few images: <em>calibrated</em> gives the range "
        "that it would show.",
    ]
    for name, model in models.items():
        after, temperature = model["after"], model["temperature"]
        line = f"{_text(name)}: {after['num_errors']:d} errors on {after['num_test']:d} test images"
        if temperature is not None:
            effect = "confidence unchanged" if temperature == 1 else "lowered" if temperature > 1 else "raised"
            effect = effect if temperature == 1 else f"confidence {effect}"
            line += f"; temperature {temperature:.3f} ({effect})"
        if model.get("posterior_temperature", 1) != 1:
            line += f"; trained at posterior temperature {model['posterior_temperature']:g}"
        if after["num_infinite_nll"]:
            line += f"; NLL is infinite, as {after['num_infinite_nll']:d} true classes were given probability 0"
        if after["auroc_error"] is None:
            line += "; AUROC needs both errors and right answers"
        items.append(line + ".")
    return f"<ul class=notes>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _figure(caption: str, png: bytes) -> str:
    """Return an image that travels inside the page."""
    data = base64.b64encode(png).decode("ascii")
    text = _text(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _conformal(conformal: JsonObject | None) -> str:
    """Return what the prediction sets promise and what they did."""
    if conformal is None:
        return ""
    low, high = conformal["coverage_band"]
    inside = low <= conformal["coverage"] <= high
    asked = round(100 * (1 - conformal["alpha"]), 6)
    text = (
        f"Asked for sets of classes that hold the right one for {asked:g}% of images, the "
        f"{_text(conformal['method'].upper())} method held it for <strong>{conformal['coverage']:.1%}</strong> of the "
        f"test images, with <strong>{conformal['mean_set_size']:.2f}</strong> classes to a set on average. That is "
        f"{'inside' if inside else 'outside'} the range that chance allows (99 %: {low:.1%} to {high:.1%}). "
        "The promise holds on average over images like those of the calibration split, not for each class."
    )
    notice = f"<p class=notice>{_text(conformal['notice'])}.</p>" if conformal.get("notice") else ""
    return f"<h2>Prediction sets</h2><p>{text}</p>{notice}"


def _glossary() -> str:
    """Return one plain sentence on each metric, from the table of metrics itself."""
    entries = "".join(f"<dt>{title}</dt><dd>{_text(METRICS[name].description)}</dd>" for name, title in _TITLES.items())
    return f"<h2>What the numbers say</h2><dl>{entries}</dl>"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4f}"


def _text(value: object) -> str:
    """Return a text of any origin for use between tags or in a quoted attribute."""
    return escape(printable(str(value)), quote=True)


_STYLE = """
:root { color-scheme: light; --ink: #22303c; --muted: #6b7a88; --line: #e3e8ec; --accent: #2a6f97; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
.run { margin: 0 0 .25rem; color: var(--muted); font: .85rem ui-monospace, "DejaVu Sans Mono", monospace; }
.answer { margin: 0; padding: 1rem 1.25rem; border-left: 4px solid var(--accent); background: #f4f8fa;
  font-size: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .5rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; font-size: .9rem; }
thead th[colspan] { color: var(--ink); text-align: center; font-size: 1rem; border-left: 1px solid var(--line); }
tbody th { text-align: left; }
td:nth-child(even) { border-left: 1px solid var(--line); }
small { display: block; color: var(--muted); font-weight: 400; font-size: .78rem; white-space: nowrap; }
small.null { white-space: normal; }
.notes { padding-left: 1.1rem; color: var(--muted); font-size: .88rem; }
.notice { padding: .5rem 1rem; border-left: 4px solid #d1495b; background: #fdf4f5; }
figure { margin: 2.5rem 0 0; }
img { display: block; width: 100%; max-width: 46rem; margin: 0 auto; }
figcaption { margin-top: .5rem; color: var(--muted); font-size: .88rem; text-align: center; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.25rem; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { body { padding: 0; max-width: none; } figure, tr { break-inside: avoid; }
  table { font-size: .75rem; } th, td { padding: .3rem .4rem; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
