"""The report: complete, self-contained, deaf to hostile names, and with no number that the record does not hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from bayesnet import storage, strict_json
from bayesnet.metrics import METRICS
from bayesnet.plots import draw_figures, draw_grids
from bayesnet.report import calibration_report
from bayesnet.types import JsonObject
from tests.report_record import bare_record, report_record

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</title></style></head><body><h1>",
    "<!-- ",
    "]]><svg/onload=alert(1)>",
    "&lt;script&gt;",
    "{body}{0.__class__}%s",
    "$math$",
    "猫",
    "javascript:alert(1)\x00\n",
    "\udce9\u202e",
]
FIGURES = dict.fromkeys(
    ("reliability", "risk_coverage", "uncertainty", "severity", "training", "confusion", "most_uncertain"),
    b"\x89PNG png bytes",
)
MAX_BYTES = 3_000_000
NUMBER = re.compile(r"[<>]?-?\d+(?:\.\d+)?%?")


class Elements(HTMLParser):
    """The sequence of tags with the names of their attributes, comments included; all text; and the cells' alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.values: list[tuple[str, str]] = []
        self.text = ""
        self.cells: list[str] = []
        self.headings: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(name, value or "") for name, value in attrs]
        if tag in ("td", "th", "h2"):
            self._in = tag
            {"td": self.cells, "h2": self.headings}.get(tag, []).append("")

    def handle_comment(self, data: str) -> None:
        self.seen.append("comment")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in == "td":
            self.cells[-1] += f" {data}"
        elif self._in == "h2":
            self.headings[-1] += data


def parse(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    parser.close()
    return parser


def named(name: str) -> JsonObject:
    """Return a record in which every text of foreign origin is a name."""
    record = report_record(models=("bayesian", f"{name} twin"), classes=(name, f"{name} 2"), num_test=60)
    record |= {"sentence": name, "run": f"/runs/{name.replace('/', '')}"}
    record["data"]["name"] = name
    for model in record["models"].values():
        model |= {"notice": name, "family": name, "unfamiliar": {name: model["unfamiliar"]["photographs"]}}
        model["unfamiliar"][name] |= {"description": name, "no_interval": name}
        model["abstention"]["notice"] = name
        model["robustness"]["corruptions"] = {name: model["robustness"]["corruptions"]["fog"]}
        model["conformal"] = {f"{name}_": model["conformal"]["lac"], name: model["conformal"]["class_conditional"]}
        model["conformal"][name]["notice"] = name
    record["conformal"] |= {"method": name}
    return record


@pytest.fixture(scope="module")
def page() -> str:
    return calibration_report(report_record(), FIGURES, title="Calibration of simulated")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_add_no_element(name: str) -> None:
    page = calibration_report(named(name), FIGURES, title=name)
    assert parse(page).seen == parse(calibration_report(named("benign"), FIGURES, title="benign")).seen
    page.encode("utf-8")  # no lone surrogate is left


def test_every_foreign_text_is_shown() -> None:
    assert parse(calibration_report(named("benign"), FIGURES, title="benign")).text.count("benign") > 60


def test_the_guard_would_see_an_injection() -> None:
    page = calibration_report(named("benign"), FIGURES)
    assert parse(page.replace("benign", HOSTILE[1], 1)).seen != parse(page).seen


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    found = parse(page)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", page))
    assert {tag[0] for tag in found.seen}.isdisjoint(
        {"script", "iframe", "link", "object", "embed", "form", "a", "base"}
    )
    assert all(value.startswith("data:image/png;base64,") for name, value in found.values if name in ("src", "href"))
    assert not any(name.startswith("on") for name, _ in found.values)
    policy = [value for name, value in found.values if name == "content"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policy


def test_every_element_is_closed(page: str) -> None:
    tags = "table thead tbody tr td th p ul li dl dt dd figure header small div strong section details summary caption"
    for tag in tags.split():
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>") > 0, tag


def numbers_of(value: object) -> Iterator[float]:
    """Yield every number of a record."""
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers_of(each)
    elif isinstance(value, int | float):
        yield float(value)


def strangers(cells: list[str], record: JsonObject) -> list[str]:
    """Return the numbers in cells that are not a number of the record, rounded as they are."""
    known = np.array([*numbers_of(record)])
    found = []
    for token in (token for cell in cells for token in NUMBER.findall(cell)):
        digits = token.strip("<>%")
        scale = 100 if token.endswith("%") else 1
        if token[0] in "<>":  # beyond what one decimal can show, but not all or nothing
            low, high = (0, 0.05) if token[0] == "<" else (99.95, 100)
            if not ((known * 100 > low) & (known * 100 < high)).any():
                found.append(token)
            continue
        half = 0.5 * 10 ** -len(digits.partition(".")[2])
        if not (np.abs(known * scale - float(digits)) <= half + 1e-9).any():
            found.append(token)
    return found


def test_every_number_in_the_tables_stands_in_the_record(page: str) -> None:
    cells = parse(page).cells
    assert len([token for cell in cells for token in NUMBER.findall(cell)]) > 400
    assert strangers(cells, report_record()) == []


def test_a_number_from_elsewhere_would_be_noticed(page: str) -> None:
    assert strangers(["77.77% 0.98765", *parse(page).cells], report_record()) == ["77.77%", "0.98765"]
    other = report_record(seed=1)
    assert len(strangers(parse(page).cells, other)) > 50


def test_it_shows_every_metric_with_its_interval_and_meaning(page: str) -> None:
    record = report_record()
    text = parse(page).text
    after = record["models"]["deterministic"]["after"]
    for metric in METRICS.values():
        assert metric.description in text
    low, high = after["ci95"]["nll"]
    assert f"{after['nll']:.4f}{low:.4f} to {high:.4f}" in text
    assert f"{after['accuracy']:.1%}" in text
    assert "temperature 1.600 (confidence lowered)" in text
    assert "trained at posterior temperature 0.9" in text
    assert "deterministic: half A holds 7 errors: the temperature lies between 1.1 and 2.4." in text


def test_the_sections_follow_the_reader(page: str) -> None:
    assert parse(page).headings == [
        "Before and after calibration",
        "What it means",
        "Can the confidence be believed?",
        "Which classes fail",
        "Sets of labels",
        "When to give no answer",
        "Where the uncertainty lies",
        "Does it notice unfamiliar images?",
        "What damaged images do to it",
        "How training went",
        "What the numbers say",
    ]


def test_missing_parts_leave_no_heading_and_missing_numbers_say_so() -> None:
    page = calibration_report(bare_record(), {})
    found = parse(page)
    assert found.headings == [
        "Before and after calibration",
        "What it means",
        "Which classes fail",
        "Sets of labels",
        "Where the uncertainty lies",
        "What the numbers say",
    ]
    assert "n/a" in found.text
    assert "NLL is infinite, as 2 true classes were given probability 0; AUROC needs both" in found.text
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b", found.text)
    assert "<img" not in page


def test_abstention_in_words(page: str) -> None:
    text = parse(page).text
    assert "The bayesian model answers 62.3% of images, those with a confidence of at least 81.23%" in text
    assert "at most 5% of its answers are wrong with 95% confidence" in text
    assert "it answered 61.3%, 147 images, and 2 of the answers were wrong: 1.4%" in text
    assert (
        "The deterministic model gives no answers: no threshold was shown to keep the share of wrong ones at 5% or less"
        in text
    )
    assert "5 % needs at least 59 images without an error." in text


def test_the_worst_class_comes_first_and_one_without_images_last() -> None:
    record = bare_record(classes=("a", "b", "c"))
    for entry, recall in zip(record["models"]["bayesian"]["classes"][1:], (0.9, 0.3), strict=True):
        entry["recall"] = recall
    table = calibration_report(record, {}).partition("recall by class")[2]
    assert re.findall(r"<th scope=row>(\w)</th>", table)[:3] == ["c", "b", "a"]


def test_confusions_are_counted_with_their_class() -> None:
    record = report_record(models=("bayesian",), classes=("a", "b", "c"))
    record["models"]["bayesian"]["confusion"] = [[0, 0, 5], [0, 1, 7], [0, 2, 1], [1, 1, 9], [2, 0, 2], [2, 2, 3]]
    page = calibration_report(record, {})
    rows = re.findall(r"<th scope=row>(\w taken for \w)</th><td>([^<]*)</td>", page)
    assert rows == [("a taken for b", "7 of 13"), ("c taken for a", "2 of 5"), ("a taken for c", "1 of 13")]


def test_a_model_without_confusions_says_so() -> None:
    record = report_record(models=("bayesian",), classes=("a", "b"))
    record["models"]["bayesian"]["confusion"] = [[0, 0, 5], [1, 1, 9]]
    assert "bayesian: no test image was given a wrong class." in calibration_report(record, {})


def test_above_thirty_classes_twenty_confusions_stand_for_the_matrix() -> None:
    classes = [f"class {k}" for k in range(100)]
    record = report_record(models=("bayesian",), classes=classes, num_test=2000)
    page = calibration_report(record, draw_figures(record))
    assert page.count("class 9") > 10
    table = page.partition("most frequent confusions")[2].partition("</table>")[0]
    assert len(re.findall("taken for class [0-9]+</th>", table)) == 20
    assert strangers(parse(page).cells, record) == []


def test_a_whole_page_with_photographs_is_small() -> None:
    record = report_record(classes=[f"class {k}" for k in range(12)], num_test=400)
    photograph = load_sample_image("china.jpg").transpose(2, 0, 1)
    figures = draw_figures(record) | draw_grids(
        record, lambda indices: np.stack([photograph[:, i % 200 :, i % 400 :][:, :224, :224] for i in indices])
    )
    page = calibration_report(record, figures)
    assert page.count("<img") == len(figures) == 9
    assert len(page.encode()) < MAX_BYTES


def test_a_record_of_a_thousand_classes_can_be_stored_and_read(tmp_path: Path) -> None:
    record = report_record(classes=[f"class {k}" for k in range(1000)], num_test=5000)
    storage.write_json(tmp_path / "calibration.json", record)
    assert (tmp_path / "calibration.json").stat().st_size < 0.3 * strict_json.MAX_JSON_BYTES
    again = storage.read_json(tmp_path / "calibration.json")
    assert calibration_report(again, {}) == calibration_report(record, {})
