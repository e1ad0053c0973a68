"""`bayesnet list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .options import json_option

if TYPE_CHECKING:
    from bayesnet.types import JsonObject


TEXTS = ("description", "--data")


@click.command("list")
@click.argument("what", type=click.Choice(["backbones", "families", "datasets"]), metavar="WHAT")
@click.argument("pattern", required=False)
@json_option
def list_command(what: str, pattern: str | None, as_json: bool) -> None:
    """Show what there is: WHAT is backbones, families or datasets.

    PATTERN narrows it down. With torchvision:NAME or timm:NAME it is looked up in that collection, as in
    'torchvision:resnet*'. Backbones come with the parameters that are trained, the features that they give, the image
    size that they were published for, and their published accuracy.
    """
    from bayesnet import workflows

    from .render import print_json

    if what == "backbones":
        record = workflows.list_backbones(pattern)
    elif what == "families":
        record = workflows.list_families(pattern)
    else:
        record = workflows.list_datasets(pattern)
    if as_json:
        print_json(record)
    elif what == "backbones":
        _print_backbones(record)
    else:
        _print_rows(what, record)


def _print_backbones(record: JsonObject) -> None:
    """Print one row per backbone, and under them one line per collection."""
    from bayesnet.workflows.listing import MAX_COUNTED

    from .render import say, table

    rows = [
        [
            row["name"],
            "-" if row["parameters"] is None else f"{row['parameters']:,}",
            "-" if row["num_features"] is None else str(row["num_features"]),
            "any" if row["input_size"] is None else str(row["input_size"]),
            "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}",
            row["description"],
        ]
        for row in record["rows"]
    ]
    table(None, ["backbone", "parameters", "features", "published for", "accuracy", "description"], rows, texts=TEXTS)
    say("accuracy: top-1 on ImageNet-1k of the published weights (backbone.weights = default), as their publisher says")
    if any(row["parameters"] is None for row in record["rows"]):
        say(f"parameters are counted where at most {MAX_COUNTED} backbones match: narrow the pattern")
    for row in record["collections"]:
        number = "not installed" if row["num_names"] is None else f"{row['num_names']} names"
        prefix = row["name"].partition(":")[0]
        say(f"{row['name']}: {row['description']}; {number}, see `bayesnet list backbones '{prefix}:*'`")


def _print_rows(what: str, record: JsonObject) -> None:
    """Print one row per family or data set."""
    from .render import table

    if what == "families":
        headers = ["family", "bayesian", "description"]
        cells = ["yes" if row["bayesian"] else "no" for row in record["rows"]]
    else:
        headers = ["data set", "--data", "description"]
        cells = [row["spec"] for row in record["rows"]]
    rows = [[row["name"], cell, row["description"]] for row, cell in zip(record["rows"], cells, strict=True)]
    table(None, headers, rows, texts=TEXTS)
