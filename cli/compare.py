"""`bayesnet compare`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@json_option
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show the test metrics of several runs side by side, each with its 95 % interval.

    Runs that differ by their seed alone are grouped too: mean, spread, and the Bayesian model less its twin.
    """
    from bayesnet import workflows

    from .render import print_comparison, print_json

    record = workflows.compare(runs)
    if as_json:
        print_json(record)
    else:
        print_comparison(record)
