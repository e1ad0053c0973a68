"""Which classes fail, and what they are taken for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bayesnet.report.markup import beside, details, figure, interval, paragraph, percent, section, table, text
from bayesnet.types import JsonObject

MAX_CONFUSIONS = 20
_FEW_CONFUSIONS = 8
_MAX_OPEN = 12  # rows up to which a table is not folded away


def classes(record: JsonObject, figures: Mapping[str, bytes]) -> str:
    """Return recall by class, worst first, the commonest confusions, and the confusion matrices."""
    names, heat_maps = record["data"]["classes"], figures.get("confusion")
    limit = _FEW_CONFUSIONS if heat_maps else MAX_CONFUSIONS
    models = record["models"]
    recalls = beside(_recalls(name, model["classes"]) for name, model in models.items())
    confusions = beside(_confusions(name, model["confusion"], names, limit) for name, model in models.items())
    words = paragraph(
        "Recall is the share of a class's test images that was answered with that class. With few test images the "
        "interval is wide, and the order of the classes says little where intervals overlap."
    )
    caption = (
        "Rows are the true classes, columns the answers; the numbers are test images and the shade is the share of the "
        "row. A perfect model has images on the diagonal alone."
    )
    return section("Which classes fail", words, recalls, confusions, figure(heat_maps, caption))


def _recalls(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the recall of every class of one model; those without test images last."""
    ordered = sorted(entries, key=lambda entry: 2.0 if entry["recall"] is None else entry["recall"])
    rows = [
        (
            text(entry["name"]),
            percent(entry["recall"]),
            interval(entry["ci95"], share=True),
            f"{entry['num_right']:d} of {entry['num_test']:d}",
        )
        for entry in ordered
    ]
    head = ("class", "recall", "95 % interval", "right")
    caption = f"{text(name)}: recall by class, worst first"
    if len(rows) <= _MAX_OPEN:
        return table(head, rows, caption)
    return table(head, rows[:_MAX_OPEN], caption) + details(
        f"the other {len(rows) - _MAX_OPEN:d} classes", table(head, rows[_MAX_OPEN:])
    )


def _confusions(name: str, cells: Sequence[Sequence[int]], names: Sequence[str], limit: int) -> str:
    """Return the pairs of classes that were confused most often, in the order of the classes where equal."""
    pairs = [(count, true, given) for true, given, count in cells if true != given]
    if not pairs:
        return paragraph(f"{text(name)}: no test image was given a wrong class.")
    num_images: Counter[int] = Counter()
    for true, _, count in cells:
        num_images[true] += count
    chosen = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:limit]
    rows = [
        (f"{text(names[true])} taken for {text(names[given])}", f"{count:d} of {num_images[true]:d}")
        for count, true, given in chosen
    ]
    return table(("confusion", "images of the class"), rows, f"{text(name)}: most frequent confusions")
