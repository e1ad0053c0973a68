"""`bayesnet calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import devices_option, json_option, run_argument


@click.command()
@run_argument
@click.option("--alpha", type=float, default=0.1, show_default=True, help="Label sets miss the label this often.")
@click.option(
    "--calibrator",
    default="temperature",
    show_default=True,
    metavar="NAME",
    help="temperature, vector, isotonic, bayesian_temperature or identity.",
)
@click.option(
    "--sets",
    default="lac",
    show_default=True,
    metavar="METHOD",
    help="Label sets that `predict` gives: lac, aps, raps or class_conditional. All are evaluated.",
)
@click.option(
    "--max-risk",
    metavar="SHARE",
    help="Abstain from images so that at most this share of the other answers is wrong: 2% or 0.02.",
)
@click.option(
    "--ood",
    default="photographs",
    show_default=True,
    metavar="SPEC",
    help="Unfamiliar images: photographs (crops of two), a data set, a folder, or none.",
)
@click.option(
    "--corrupt",
    "num_corrupted",
    type=int,
    default=200,
    show_default=True,
    metavar="N",
    help="Test images to corrupt in 15 ways at five severities; 0 for none.",
)
@devices_option
@json_option
def calibrate(
    run: Path | None,
    alpha: float,
    calibrator: str,
    sets: str,
    max_risk: str | None,
    ood: str,
    num_corrupted: int,
    devices: str,
    as_json: bool,
) -> None:
    """Calibrate both models of RUN (the newest finished one) and say whether the Bayesian one is better.

    Fits on the calibration split, then reads the test split once. `predict` uses the result from then on.
    """
    from bayesnet import workflows
    from bayesnet.calibration import parse_risk

    from .render import print_json
    from .render_calibration import print_calibration

    record = workflows.calibrate(
        run,
        alpha=alpha,
        calibrator=calibrator,
        sets=sets,
        max_risk=None if max_risk is None else parse_risk(max_risk),
        ood=ood,
        num_corrupted=num_corrupted,
        devices=devices,
    )
    if as_json:
        print_json(record)
    else:
        print_calibration(record)
