"""The report: complete, self-contained, and deaf to hostile names."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from bayesnet.calibration import evaluate_sets, fit_lac
from bayesnet.metrics import METRICS, evaluate
from bayesnet.report import CalibrationReport, calibration_report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</title></style></head><body><h1>",
    "<!-- ",
    "]]><svg/onload=alert(1)>",
    "&lt;script&gt;",
    "{body}{0.__class__}%s",
    "javascript:alert(1)\x00\n",
    "\udce9\u202e",
]


class Elements(HTMLParser):
    """The sequence of tags with the names of their attributes, comments included; and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.values: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_comment(self, data: str) -> None:
        self.seen.append("comment")

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    parser.close()
    return parser


def content(name: str = "benign", *, conformal: bool = True) -> CalibrationReport:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.3] * 4, 200)
    labels = (rng.random((200, 1)) > p.cumsum(1)).sum(1).clip(max=3)
    metrics = evaluate(p, labels, num_resamples=50)
    models = {
        f"{name} {which}": {"before": metrics, "after": metrics, "temperature": temperature}
        for which, temperature in (("deterministic", 1.25), ("bayesian", 1))
    }
    sets = evaluate_sets(p, labels, fit_lac(p, labels, 0.1)) if conformal else None
    return CalibrationReport(name, name, name, models, sets, {name: b"\x89PNG png bytes"})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_add_no_element(name: str) -> None:
    page = calibration_report(content(name))
    assert parse(page).seen == parse(calibration_report(content())).seen
    page.encode("utf-8")  # no lone surrogate is left


def test_a_hostile_conformal_notice_adds_none_either() -> None:
    pages = []
    for notice in ("benign", HOSTILE[0]):
        report = content()
        assert report.conformal is not None
        pages.append(calibration_report(report._replace(conformal=report.conformal | {"notice": notice})))
    assert parse(pages[0]).seen == parse(pages[1]).seen
    assert "<p class=notice>benign.</p>" in pages[0]


def test_the_guard_would_see_an_injection() -> None:
    page = calibration_report(content())
    assert parse(page.replace("benign", HOSTILE[1], 1)).seen != parse(page).seen


def test_nothing_is_fetched_and_nothing_runs() -> None:
    page = calibration_report(content())
    found = parse(page)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", page))
    assert {tag[0] for tag in found.seen}.isdisjoint(
        {"script", "iframe", "link", "object", "embed", "form", "a", "base"}
    )
    assert all(value.startswith("data:image/png;base64,") for name, value in found.values if name in ("src", "href"))
    assert not any(name.startswith("on") for name, _ in found.values)
    policy = [value for name, value in found.values if name == "content"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policy


def test_every_element_is_closed() -> None:
    page = calibration_report(content())
    for tag in (
        "table",
        "tr",
        "td",
        "th",
        "p",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "figure",
        "header",
        "small",
        "div",
        "strong",
    ):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_it_shows_every_metric_with_its_interval_and_meaning() -> None:
    report = content()
    text = parse(calibration_report(report)).text
    [first, *_] = report.models.values()
    for metric in METRICS.values():
        assert metric.description in text
    low, high = first["after"]["ci95"]["nll"]
    assert f"{first['after']['nll']:.4f}{low:.4f} to {high:.4f}" in text
    assert f"{first['after']['accuracy']:.1%}" in text
    assert "temperature 1.250 (confidence lowered)" in text
    assert "temperature 1.000 (confidence unchanged)" in text
    assert report.conformal is not None
    assert f"{report.conformal['coverage']:.1%}" in text


def test_without_conformal_sets_and_with_missing_values() -> None:
    report = content(conformal=False)
    metrics = evaluate(np.array([[1.0, 0.0], [1.0, 0.0]]), [1, 1], num_resamples=20)
    page = calibration_report(report._replace(models={"m": {"before": metrics, "after": metrics, "temperature": None}}))
    text = parse(page).text
    assert "Prediction sets" not in text
    assert (
        "m: 2 errors on 2 test images; NLL is infinite, as 2 true classes were given probability 0; AUROC needs" in text
    )
    assert "n/a" in text
    assert "None" not in text
    assert "nan" not in text.lower().replace("n/a", "")
