"""`bayesnet predict`."""

from __future__ import annotations

from pathlib import Path

import click

from bayesnet.errors import printable

from .options import devices_option, json_option


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--run", type=click.Path(path_type=Path), metavar="RUN", help="A run directory; default: the newest.")
@click.option("--model", metavar="NAME", help="bayesian (the default where there is one) or deterministic.")
@click.option("--interval", type=float, default=0.9, show_default=True, help="Level of the intervals.")
@click.option("--samples", type=int, metavar="S", help="Draws per image, a power of two up to 256.")
@devices_option
@json_option
def predict(
    paths: tuple[Path, ...],
    run: Path | None,
    model: str | None,
    interval: float,
    samples: int | None,
    devices: str,
    as_json: bool,
) -> None:
    """Classify image files and folders, with an interval on every class probability.

    What cannot be read is named on stderr and skipped; if nothing could be read, the exit code is 3.
    """
    from bayesnet import workflows

    from .render import print_json, print_predictions

    record = workflows.predict(paths, run=run, model=model, interval=interval, samples=samples, devices=devices)
    if samples is not None and samples < 128:
        click.echo(f"{samples} draws: intervals are coarse below 128", err=True)
    for entry in record["skipped"]:
        click.echo(f"skipped {printable(entry['reason'])}", err=True)
    if as_json:
        print_json(record)
    else:
        print_predictions(record)
