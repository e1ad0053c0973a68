"""What `bayesnet check-data` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bayesnet.errors import printable
from bayesnet.types import JsonObject

from .render import say, table

SHOWN = 10
DUPLICATES = {
    "across_classes": "the same image in two classes",
    "across_splits": "the same image in two splits",
    "within_class": "the same image twice in a class",
}


def print_audit(record: JsonObject) -> None:
    """Print the counts, what the images are, then everything that is wrong."""
    splits = record["splits"]
    classes = list(dict.fromkeys(name for by_class in splits.values() for name in by_class))
    rows = [[printable(name), *(str(by_class.get(name, "-")) for by_class in splits.values())] for name in classes]
    rows.append(["all", *(str(sum(by_class.values())) for by_class in splits.values())])
    table(f"{record['num_images']} images", ["class", *splits], rows)
    for what in ("formats", "modes"):
        if record[what]:
            say(f"{what}: {_counts(record[what])}")
    if record["num_animated"]:
        say(f"{record['num_animated']} animated or of several pages: the first is read")
    if record["num_rotated"]:
        say(f"{record['num_rotated']} turned by their EXIF data: they are read upright")
    _print_sizes(record["sizes"])
    for note in record["notes"]:
        say(note)
    _print_some([f"unreadable: {entry['reason']}" for entry in record["unreadable"]])
    for kind, words in DUPLICATES.items():
        _print_some([f"{words}: {', '.join(group)}" for group in record["duplicates"][kind]])
    for problem in record["problems"]:
        say(f"problem: {problem}")
    if record["ok"]:
        say("ready to train: every image can be read and none is in two splits or classes")


def _print_sizes(sizes: JsonObject) -> None:
    """Print the range of the sides and the histogram of the shorter one."""
    if sizes["height"] is None:
        return
    sides = [f"{side} {sizes[side]['min']} to {sizes[side]['max']}" for side in ("height", "width")]
    say(f"sizes in pixels: {', '.join(sides)}; median {sizes['height']['median']:g} x {sizes['width']['median']:g}")
    bins = [f"{each['low']}-{each['high'] or ''}: {each['count']}" for each in sizes["short_side"]]
    say(f"short side: {', '.join(bins)}")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _print_some(lines: Sequence[str]) -> None:
    """Print the first lines, and how many more there are in the JSON."""
    for line in lines[:SHOWN]:
        say(printable(line))
    if len(lines) > SHOWN:
        say(f"... and {len(lines) - SHOWN} more: see --json")
