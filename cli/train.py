"""`bayesnet train`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option


@click.command()
@click.option("--bayesian", is_flag=True, help="Train the Bayesian model too, beside its deterministic twin.")
@click.option("--data", metavar="SPEC", help="A name (default: digits), or folder:PATH with a sub-folder per class.")
@click.option("--family", metavar="F", help="Posterior family, such as mean_field; implies --bayesian.")
@click.option("--backbone", metavar="B", help="Feature extractor, such as resnet18; see `bayesnet list backbones`.")
@click.option("--weights", metavar="W", help="Of the backbone: none, default (the published ones) or a file.")
@click.option("--freeze", is_flag=True, default=None, help="Leave the backbone as it is; train the head alone.")
@click.option(
    "--mode", type=click.Choice(["joint", "head"]), help="head: fit the posterior on stored features of the backbone."
)
@click.option("--epochs", type=int, metavar="N", help="Passes over the training images.")
@click.option("--seed", type=int, metavar="N", help="Of weights, order, augmentation and posterior noise.")
@click.option("--devices", metavar="LIST", help="auto (the default), cpu, cuda:0.")
@click.option("--workers", type=int, metavar="N", help="Processes that read images ahead (default: 0).")
@click.option("--config", metavar="C", help="A recipe such as digits/mean_field, or a TOML file.")
@click.option("--set", "overrides", multiple=True, metavar="K=V", help="Change a setting: --set optimizer.name=adamw.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The run directory, new or empty.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with an interrupted run.")
@click.option(
    "--profile", type=click.Path(path_type=Path), metavar="FILE", help="Write a trace of ten steps (Chrome's format)."
)
@json_option
def train(
    bayesian: bool,
    data: str | None,
    family: str | None,
    backbone: str | None,
    weights: str | None,
    freeze: bool | None,
    mode: str | None,
    epochs: int | None,
    seed: int | None,
    devices: str | None,
    workers: int | None,
    config: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    profile: Path | None,
    as_json: bool,
) -> None:
    """Train a classifier on a folder of images, with --bayesian beside its Bayesian counterpart.

    Ends with the metrics of both on the test split, each with its 95 % interval. Ctrl-C saves a checkpoint first;
    --resume goes on from it.

    \b
    bayesnet train --bayesian
    bayesnet train --bayesian --data folder:photos --epochs 30
    """
    from bayesnet import workflows

    from .progress import TrainProgress
    from .render import print_json, print_train_summary

    with TrainProgress() as progress:
        summary = workflows.train(
            bayesian=bayesian,
            data=data,
            family=family,
            backbone=backbone,
            weights=weights,
            freeze=freeze,
            mode=mode,
            epochs=epochs,
            seed=seed,
            devices=devices,
            workers=workers,
            config=config,
            overrides=overrides,
            out=out,
            resume=resume,
            profile=profile,
            listener=progress,
            stop_signal=progress.signals.pending,
        )
    if as_json:
        print_json(summary)
    else:
        print_train_summary(summary)
