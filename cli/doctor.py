"""`bayesnet doctor`."""

from __future__ import annotations

import click

from .options import json_option


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Check this machine: versions, devices, arithmetic, disk.

    Where a check fails, the exit code is the one that training here would end with.
    """
    from bayesnet import workflows

    from .render import print_doctor, print_json

    record = workflows.doctor()
    if as_json:
        print_json(record)
    else:
        print_doctor(record)
    return next((int(check["exit_code"]) for check in record["checks"] if not check["ok"]), 0)
