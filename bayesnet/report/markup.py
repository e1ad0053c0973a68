"""The building blocks of the page: escaped text, numbers, sections, tables, figures, and the frame around them.

Every text of any origin passes through `text`; every image is a data URI; the page's own content policy forbids all
else.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from bayesnet import wording
from bayesnet.errors import printable

MISSING = "n/a"


def text(value: object) -> str:
    r"""Return a text of any origin for use between tags or in a quoted attribute.

    Example:
        >>> text("<b>" + chr(10))
        '&lt;b&gt;\\n'
    """
    return escape(printable(str(value)), quote=True)


def percent(value: float | None, decimals: int = 1) -> str:
    """Return a share as per cent in markup, or "n/a"; see `wording.percent`.

    Example:
        >>> percent(0.1234), percent(0.99999), percent(None)
        ('12.3%', '&gt;99.9%', 'n/a')
    """
    return MISSING if value is None else text(wording.percent(value, decimals))


def number(value: float | None, decimals: int = 4) -> str:
    """Return a number, or "n/a"."""
    return MISSING if value is None else f"{value:.{decimals}f}"


def interval(ends: Sequence[float | None], *, share: bool = False, decimals: int = 4) -> str:
    """Return "LOW to HIGH", or "n/a" where an end is missing."""
    low, high = ends
    if low is None or high is None:
        return MISSING
    return f"{percent(low)} to {percent(high)}" if share else f"{number(low, decimals)} to {number(high, decimals)}"


def section(title: str, *parts: str) -> str:
    """Return a section with its heading, or nothing if every part is empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(content: str, kind: str = "") -> str:
    """Return a paragraph of markup, or nothing if that is empty."""
    attribute = f" class={kind}" if kind else ""
    return f"<p{attribute}>{content}</p>" if content else ""


def notice(content: object) -> str:
    """Return a marked remark of any origin, or nothing if there is none."""
    return paragraph(f"{text(str(content).rstrip('.'))}.", "notice") if content else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return a table; the first cell of a row is its heading. Cells are markup: names must have passed `text`.

    Args:
        head: Headings of the columns.
        rows: As many cells each.
        caption: Markup over the table.
    """
    top = "".join(f"<th scope=col>{cell}</th>" if cell else "<td></td>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return f"<div class=scroll><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def beside(parts: Iterable[str]) -> str:
    """Return parts beside each other where the page is wide enough, or nothing if every part is empty."""
    cells = "".join(f"<div>{part}</div>" for part in parts if part)
    return f"<div class=beside>{cells}</div>" if cells else ""


def details(summary: str, *parts: str) -> str:
    """Return parts that a click opens, or nothing if every part is empty."""
    body = "".join(part for part in parts if part)
    return f"<details><summary>{summary}</summary>{body}</details>" if body else ""


def small(content: str) -> str:
    """Return a line in small type below a number."""
    return f"<small>{content}</small>"


def figure(png: bytes | None, caption: str, kind: str = "") -> str:
    """Return an image that travels inside the page, or nothing if there is none.

    Args:
        png: The bytes of a PNG file.
        caption: Plain text, which is the image's alternative too.
        kind: Class of the element.
    """
    if png is None:
        return ""
    data, words = base64.b64encode(png).decode("ascii"), text(caption)
    attribute = f" class={kind}" if kind else ""
    return (
        f'<figure{attribute}><img src="data:image/png;base64,{data}" alt="{words}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def thumbnail(png: bytes, words: str) -> str:
    """Return a small image that travels inside the page, its pixels sharp.

    Args:
        png: The bytes of a PNG file.
        words: Its alternative, of any origin.
    """
    data = base64.b64encode(png).decode("ascii")
    return f'<img class=thumbnail src="data:image/png;base64,{data}" alt="{text(words)}">'


def page(title: str, parts: Iterable[str]) -> str:
    """Return the whole document."""
    return _PAGE.format(title=text(title), style=_STYLE, body="\n".join(part for part in parts if part))


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
.stages td:nth-child(even) { border-left: 1px solid var(--line); }
small { display: block; color: var(--muted); font-weight: 400; font-size: .78rem; white-space: nowrap; }
small.null { white-space: normal; }
.notes { padding-left: 1.1rem; color: var(--muted); font-size: .88rem; }
.notice { padding: .5rem 1rem; border-left: 4px solid #d1495b; background: #fdf4f5; }
figure { margin: 2.5rem 0 0; }
img { display: block; max-width: min(100%, 46rem); margin: 0 auto; }
figcaption { margin-top: .5rem; color: var(--muted); font-size: .88rem; text-align: center; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.25rem; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
p { margin: .75rem 0; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; }
table { margin: .75rem 0; }
caption { padding: 0 0 .35rem; text-align: left; font-weight: 600; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; font-size: .92rem; }
header .notes { padding: 0; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 2.5rem; }
.beside td, .beside tbody th { padding: .3rem .5rem; }
.beside > div { min-width: 0; }
thead tr:only-child th:first-child { text-align: left; }
.grid { display: flex; flex-direction: column-reverse; }
.grid img { max-width: 100%; margin: 0; }
.grid figcaption { margin: 0 0 .5rem; text-align: left; color: var(--ink); }
.thumbnail { width: 5rem; max-width: none; image-rendering: pixelated; margin: 0; }
.wide img { max-width: min(100%, 56rem); }
@media (max-width: 40rem) { .beside { grid-template-columns: 1fr; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
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
