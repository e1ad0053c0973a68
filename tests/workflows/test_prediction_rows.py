"""Predictions as lines: one per file whatever its name, and what is written comes back."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayesnet.errors import ConfigError
from bayesnet.workflows import row_format

CLASSES = ("cat", "=dog()", "ox\n", "d", "e", "f")
NAMES = st.one_of(
    st.text(st.characters(codec=None, exclude_characters="\0"), min_size=1), st.sampled_from(["=1", "-x"])
)


def row(path: str = "a.png") -> dict[str, Any]:
    probabilities = (0.1, 0.3, 0.4, 0.05, 0.15, 0.0)
    classes = [
        {"name": name, "probability": p, "lower": p / 2, "upper": min(1.0, 2 * p)}
        for name, p in zip(CLASSES, probabilities, strict=True)
    ]
    return {
        "path": path,
        "label": "ox\n",
        "probability": 0.4,
        "lower": 0.2,
        "upper": 0.8,
        "entropy": 1.25,
        "mutual_information": 1e-05,
        "set": ["=dog()", "ox\n"],
        "abstain": False,
        "classes": classes,
    }


@given(name=NAMES, skipped=st.booleans(), form=st.sampled_from(["csv", "jsonl"]), safe=st.booleans())
def test_any_name_makes_one_line_that_is_recognised(name: str, skipped: bool, form: str, safe: bool) -> None:
    rows = row_format(form, CLASSES, "top5", spreadsheet_safe=safe and form == "csv")
    line = rows.line({"path": name, "reason": "damaged"} if skipped else row(name))
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert rows.parse(line[:-1]) == (rows.written_path(name), "damaged" if skipped else None)


def test_jsonl_is_what_predict_returns() -> None:
    rows = row_format("jsonl", CLASSES, None)
    name = b"\xff\n.png".decode(errors="surrogateescape")
    assert rows.header == b""
    assert json.loads(rows.line(row(name))) == row(name)
    top = json.loads(row_format("jsonl", CLASSES, "top5").line(row()))
    assert [entry["name"] for entry in top["classes"]] == ["ox\n", "=dog()", "e", "cat", "d"]


@pytest.mark.parametrize("shown", [None, "top5", "all"])
def test_csv_has_the_same_numbers(shown: str | None) -> None:
    rows = row_format("csv", CLASSES, shown)
    text = (rows.header + rows.line(row()) + rows.line({"path": "b.png", "reason": "no"})).decode()
    first, second = csv.DictReader(io.StringIO(text))
    assert float(first["mutual_information"]) == 1e-05
    assert (first["label"], first["abstain"], first["reason"]) == ("ox\\n", "false", "")
    assert json.loads(first["set"]) == ["=dog()", "ox\n"]
    assert [value for value in second.values() if value] == ["b.png", "no"]
    if shown == "all":
        assert float(first["upper[=dog()]"]) == 0.6
    elif shown == "top5":
        assert (first["class_2"], float(first["lower_2"])) == ("=dog()", 0.15)
        assert "class_6" not in first
    else:
        assert not any("class" in column for column in first)


def test_no_text_is_a_formula_where_that_is_asked() -> None:
    rows = row_format("csv", CLASSES, "top5", spreadsheet_safe=True)
    cells = next(csv.reader([rows.line(row("=cmd|' /C calc'!A0")).decode()]))
    assert cells[0] == "'=cmd|' /C calc'!A0"
    assert not any(cell.startswith(("=", "+", "@")) for cell in cells)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"path": 3}', b"a,b", b'"', b"\xff", b"a.png,cat,0.4"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_what_is_no_line_is_told(form: str, data: bytes) -> None:
    with pytest.raises(ValueError):
        row_format(form, CLASSES, None).parse(data)


@pytest.mark.parametrize(
    ("arguments", "safe", "what"),
    [
        (("xlsx", CLASSES, None), False, "no such format, there is csv, jsonl (format = xlsx)"),
        (("csv", CLASSES, "top3"), False, "must be all or top5 (classes = top3)"),
        (("jsonl", CLASSES, None), True, "is for csv (spreadsheet-safe)"),
    ],
)
def test_what_is_refused(arguments: tuple[str, tuple[str, ...], str | None], safe: bool, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        row_format(*arguments, spreadsheet_safe=safe)
    assert str(caught.value) == what
