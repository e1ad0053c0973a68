"""`bayesnet calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import devices_option, json_option, run_argument


@click.command()
@run_argument
@click.option("--alpha", type=float, default=0.1, show_default=True, help="Label sets miss the label this often.")
@devices_option
@json_option
def calibrate(run: Path | None, alpha: float, devices: str, as_json: bool) -> None:
    """Calibrate both models of RUN (the newest finished one) and say whether the Bayesian one is better.

    Fits on the calibration split, then reads the test split once. `predict` uses the result from then on.
    """
    from bayesnet import workflows

    from .render import print_calibration, print_json

    record = workflows.calibrate(run, alpha=alpha, devices=devices)
    if as_json:
        print_json(record)
    else:
        print_calibration(record)
