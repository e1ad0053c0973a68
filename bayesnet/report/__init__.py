"""The calibration report: one HTML page that needs no network, runs no script and opens anywhere.

It is made from the calibration record and figures of it, so that every number on the page stands in the record.
"""

from __future__ import annotations

from collections.abc import Mapping

from bayesnet.report import decisions, errors, performance, shift, uncertainty
from bayesnet.report.markup import page
from bayesnet.types import JsonObject

__all__ = ["calibration_report"]


def calibration_report(record: JsonObject, figures: Mapping[str, bytes], *, title: str = "Calibration") -> str:
    """Return the page, complete in itself. Parts that the record or the figures lack are left out with their headings.

    Args:
        record: The whole calibration record, as stored; names in it may be hostile.
        figures: Name to the bytes of a PNG file, as from `plots.draw_figures` and `plots.draw_grids`.
        title: Heading.
    """
    sections = (
        performance.answer(record, title),
        performance.metrics(record),
        performance.meaning(record),
        performance.reliability(record, figures),
        errors.classes(record, figures),
        decisions.label_sets(record),
        decisions.abstention(record, figures),
        uncertainty.uncertainty(record, figures),
        shift.unfamiliar(record),
        shift.robustness(record, figures),
        shift.left_out(record),
        shift.training(record, figures),
        performance.glossary(),
    )
    return page(title, sections)
