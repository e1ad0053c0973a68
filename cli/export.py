"""`bayesnet export`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option, run_argument


@click.command()
@run_argument
@click.option("--model", metavar="NAME", help="bayesian (the default where there is one) or deterministic.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["torch", "onnx", "both"]),
    default="both",
    show_default=True,
    help="Program to write: a .pt2 file of torch.export, ONNX, or both.",
)
@click.option("--interval", type=float, default=0.9, show_default=True, help="Level of the intervals.")
@click.option("--samples", type=int, metavar="S", help="Draws per image, a power of two up to 256.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to; default: export in RUN.")
@json_option
def export(
    run: Path | None,
    model: str | None,
    form: str,
    interval: float,
    samples: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write a model of RUN (the newest finished one) as programs that run without bayesnet, with a model card.

    From pixels to mean, interval, entropy and mutual information, calibrated, for any number of images. Each program is
    read back and compared with `predict` first. DIR is new or empty, or an earlier export, which is replaced.
    """
    from bayesnet import workflows

    from .render import print_export, print_json

    record = workflows.export(run, model=model, format=form, interval=interval, samples=samples, out=out)
    if as_json:
        print_json(record)
    else:
        print_export(record)
