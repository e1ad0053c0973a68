"""A page of predictions: what a model says of each image, complete in itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bayesnet.report.markup import MISSING, interval, number, page, paragraph, percent, section, table, text, thumbnail
from bayesnet.types import JsonObject

MAX_IMAGES = 500
_HEAD = ("label", "probability", "interval", "entropy", "mutual information", "label set", "other classes")


def predictions_page(record: JsonObject, thumbnails: Mapping[int, bytes], *, title: str = "Predictions") -> str:
    """Return the page: one row an image, with its interval, and what could not be read.

    Args:
        record: What `predict` returns; names in it may be hostile.
        thumbnails: Place among the predictions to the bytes of a PNG file; rows without one have no picture.
        title: Heading.
    """
    spread, rows = record["interval"], record["predictions"][:MAX_IMAGES]
    state = "calibrated" if record["calibrated"] else "not calibrated"
    words = (
        f"Probabilities of the {text(record['model'])} model of {text(record['run'])}, {state}. The "
        f"{100 * spread['level']:.6g} % interval ({text(spread['kind'])}, {spread['samples']:d} draws, widened for "
        f"{percent(spread['widened'])} of the labels) holds the class probability under the posterior; it is no "
        "promise about the label. Entropy is the uncertainty in all, mutual information what more training data "
        "could remove of it; in nats."
    )
    head = ("image", "", *_HEAD)
    cells = [_row(row, thumbnails.get(index), spread["samples"]) for index, row in enumerate(rows)]
    missing = len(record["predictions"]) - len(rows)
    more = paragraph(f"{missing:,} more images are left out here.", "notice") if missing else ""
    skipped = [(text(entry["path"]), text(entry["reason"])) for entry in record["skipped"][:MAX_IMAGES]]
    unread = len(record["skipped"]) - len(skipped)
    parts = (
        f"<header><h1>{text(title)}</h1>{paragraph(words)}</header>",
        section(f"{len(rows):,} of {len(record['predictions']):,} images", table(head, cells), more),
        section(
            "Not read",
            table(("file", "why"), skipped) if skipped else "",
            paragraph(f"{unread:,} more files are left out here.", "notice") if unread else "",
        ),
    )
    return page(title, parts)


def _row(row: Mapping[str, Any], picture: bytes | None, num_draws: int) -> tuple[str, ...]:
    """Return the cells of one image."""
    others = sorted(row["classes"], key=lambda entry: -entry["probability"])[1:5]
    members = MISSING if row["set"] is None else ", ".join(map(text, row["set"])) or "empty"
    return (
        text(row["path"]),
        "" if picture is None else thumbnail(picture, row["label"]),
        f"<strong>{text(row['label'])}</strong>" + ("<br>gives no answer" if row["abstain"] else ""),
        percent(row["probability"]),
        interval([row["lower"], row["upper"]], share=True) if num_draws > 1 else MISSING,
        number(row["entropy"], 3),
        number(row["mutual_information"], 3),
        members,
        "<br>".join(f"{text(entry['name'])} {percent(entry['probability'])}" for entry in others),
    )
