"""Predictions as lines of text, CSV or JSON: one line per file, whatever its name."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bayesnet.config import require
from bayesnet.errors import printable
from bayesnet.strict_json import json_line
from bayesnet.types import JsonObject
from bayesnet.workflows.predicting import SHOWN, TOP, most_probable

COLUMNS = (
    "path",
    "label",
    "probability",
    "lower",
    "upper",
    "entropy",
    "mutual_information",
    "set",
    "abstain",
    "reason",
)
BOUNDS = ("probability", "lower", "upper")
# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class RowFormat(NamedTuple):
    """How predictions are written, one line each.

    Attributes:
        header: The first line, empty where there is none.
        line: From what came of a file, `ImageClassifier.outcomes`, to its line.
        parse: From a line without its newline to the path as it is written there, and why the file has no prediction,
            None where it has one; ValueError for what is no such line.
        written_path: From a path to how it is written.
    """

    header: bytes
    line: Callable[[JsonObject], bytes]
    parse: Callable[[bytes], tuple[str, str | None]]
    written_path: Callable[[str], str]


def row_format(name: str, classes: Sequence[str], shown: str | None, *, spreadsheet_safe: bool = False) -> RowFormat:
    """Return a format.

    ``jsonl`` writes what `predict` returns for each image, or its ``path`` and ``reason``; names that are not UTF-8
    come back as they were. ``csv`` writes `COLUMNS` (``set`` as a JSON list), with control characters of names escaped.

    Args:
        name: "csv" or "jsonl".
        classes: Names of the classes.
        shown: "all" for every class, "top5" for the most probable; None for all in jsonl, and for none in csv.
        spreadsheet_safe: Whether a text that a spreadsheet would take for a formula is put behind an apostrophe; csv.

    Raises:
        ConfigError: There is no such format, or no such choice of classes.
    """
    require(name in FORMATS, f"no such format, there is {', '.join(FORMATS)}", where=f"format = {name}")
    require(shown is None or shown in SHOWN, "must be all or top5", where=f"classes = {shown}")
    require(name == "csv" or not spreadsheet_safe, "is for csv", where="spreadsheet-safe")
    return FORMATS[name](classes, shown, spreadsheet_safe)


def _jsonl(classes: Sequence[str], shown: str | None, spreadsheet_safe: bool) -> RowFormat:
    """Return the format of one JSON object a line."""

    def line(outcome: JsonObject) -> bytes:
        trimmed = shown == "top5" and "classes" in outcome
        return json_line(most_probable(outcome) if trimmed else outcome)

    def parse(data: bytes) -> tuple[str, str | None]:
        record = json.loads(data)
        if not isinstance(record, dict) or not isinstance(record.get("path"), str):
            raise ValueError("not a prediction")
        return record["path"], str(record["reason"]) if "reason" in record else None

    return RowFormat(b"", line, parse, lambda path: path)


def _csv(classes: Sequence[str], shown: str | None, spreadsheet_safe: bool) -> RowFormat:
    """Return the format of comma-separated values with a header."""

    def text(value: str) -> str:
        safe = printable(value)
        return f"'{safe}" if spreadsheet_safe and safe.startswith(_FORMULA) else safe

    def cell(value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return text(json.dumps(value, ensure_ascii=False))
        return text(value) if isinstance(value, str) else repr(value)

    def class_cells(outcome: JsonObject) -> list[object]:
        if shown is None:
            return []
        if "classes" not in outcome:
            return [None] * num_class_columns
        if shown == "all":
            return [entry[key] for entry in outcome["classes"] for key in BOUNDS]
        ranked: list[object] = [entry[key] for entry in most_probable(outcome)["classes"] for key in ("name", *BOUNDS)]
        return ranked

    def line(outcome: JsonObject) -> bytes:
        return _csv_line([*map(cell, [*map(outcome.get, COLUMNS), *class_cells(outcome)])])

    def parse(data: bytes) -> tuple[str, str | None]:
        try:
            [cells] = csv.reader([data.decode()], strict=True)
        except csv.Error as error:
            raise ValueError("not CSV") from error
        if len(cells) != len(columns):
            raise ValueError("other columns")
        return cells[0], cells[COLUMNS.index("reason")] or None

    class_columns = _class_columns(classes, shown)
    num_class_columns, columns = len(class_columns), [*COLUMNS, *map(printable, class_columns)]
    return RowFormat(_csv_line(columns), line, parse, text)


def _class_columns(classes: Sequence[str], shown: str | None) -> list[str]:
    """Return the names of the columns of the classes: by name, or by rank."""
    if shown == "all":
        return [f"{key}[{name}]" for name in classes for key in BOUNDS]
    if shown == "top5":
        return [f"{key}_{rank}" for rank in range(1, min(TOP, len(classes)) + 1) for key in ("class", *BOUNDS)]
    return []


def _csv_line(cells: Sequence[str]) -> bytes:
    with io.StringIO() as file:
        csv.writer(file, lineterminator="\n").writerow(cells)
        return file.getvalue().encode()


FORMATS: Mapping[str, Callable[[Sequence[str], str | None, bool], RowFormat]] = {"csv": _csv, "jsonl": _jsonl}
