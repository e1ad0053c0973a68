"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

run_argument = click.argument("run", required=False, type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
devices_option = click.option(
    "--devices", default="auto", show_default=True, metavar="LIST", help="auto, cpu, cuda:0, or a comma-separated list."
)
