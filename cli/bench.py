"""`bayesnet bench`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import devices_option, json_option, run_argument


@click.command()
@run_argument
@devices_option
@click.option("--batch", type=int, metavar="B", help="Images per training step and per prediction.")
@click.option("--samples", type=int, metavar="S", help="Draws per image, a power of two up to 256.")
@click.option("--seconds", type=float, default=4.0, show_default=True, help="Measuring time per device and phase.")
@json_option
def bench(
    run: Path | None, devices: str, batch: int | None, samples: int | None, seconds: float, as_json: bool
) -> None:
    """Measure training and prediction, deterministic and Bayesian side by side, on each device.

    Takes the models of RUN (the newest finished one; without any, the default recipe's). The control row times the twin
    against itself: what departs from 1 there is noise.
    """
    from bayesnet import workflows

    from .render import print_bench, print_json

    record = workflows.bench(run, devices=devices, batch=batch, samples=samples, seconds=seconds)
    if as_json:
        print_json(record)
    else:
        print_bench(record)
