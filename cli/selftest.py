"""`bayesnet selftest`."""

from __future__ import annotations

import click

from .options import json_option


@click.command()
@click.option("--full", is_flag=True, help="Run the checks that take minutes too; half an hour.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the noise, where a test is not frozen at seed 0.")
@json_option
def selftest(full: bool, seed: int, as_json: bool) -> int:
    """Prove the statistics of this installation.

    Compares every approximation with exact answers and long reference runs, plants the field's bugs and sees that each
    is caught. The exit code is 1 where a check fails.

    \b
    bayesnet selftest
    bayesnet selftest --full --json
    """
    from bayesnet import workflows

    from .progress import SelftestProgress
    from .render import print_json, print_selftest

    record = workflows.selftest(full=full, seed=seed, listener=SelftestProgress())
    if as_json:
        print_json(record)
    else:
        print_selftest(record)
    return 0 if record["passed"] else 1
