"""`bayesnet predict`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bayesnet.errors import printable

from .options import devices_option, json_option

if TYPE_CHECKING:
    from bayesnet.types import JsonObject
    from bayesnet.workflows import ImageClassifier
    from bayesnet.workflows.prediction_rows import RowFormat

STDIN = Path("-")

SUFFIX_FORMATS = {".csv": "csv", ".jsonl": "jsonl"}
# What --continue finds in the file: giving it again could only contradict.
RECORDED = (
    "paths",
    "run",
    "model",
    "interval",
    "samples",
    "form",
    "shown",
    "strict",
    "grid",
    "html",
    "null",
    "spreadsheet_safe",
    "as_json",
)


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--run", type=click.Path(path_type=Path), metavar="RUN", help="A run directory; default: the newest.")
@click.option("--model", metavar="NAME", help="bayesian (the default where there is one) or deterministic.")
@click.option("--interval", type=float, default=0.9, show_default=True, help="Level of the intervals.")
@click.option("--samples", type=int, metavar="S", help="Draws per image, a power of two up to 256.")
@click.option(
    "--format", "form", type=click.Choice(["csv", "jsonl"]), help="One line per file, as it is done, not a table."
)
@click.option("--classes", "shown", type=click.Choice(["all", "top5"]), help="Which classes to give for each image.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the lines to a new .csv or .jsonl.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with the --out FILE of an interrupted predict.")
@click.option("--strict", is_flag=True, help="Exit with 3 if any file could not be read.")
@click.option("--grid", type=click.Path(path_type=Path), metavar="FILE", help="Draw the images to a new .png.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a new .html page of them.")
@click.option("--null", is_flag=True, help="PATH -: names on standard input end in a null character, not a line.")
@click.option("--spreadsheet-safe", is_flag=True, help="CSV: an apostrophe before texts that look like formulas.")
@devices_option
@json_option
@click.pass_context
def predict(
    context: click.Context,
    paths: tuple[Path, ...],
    run: Path | None,
    model: str | None,
    interval: float,
    samples: int | None,
    form: str | None,
    shown: str | None,
    out: Path | None,
    go_on: bool,
    strict: bool,
    grid: Path | None,
    html: Path | None,
    null: bool,
    spreadsheet_safe: bool,
    devices: str,
    as_json: bool,
) -> None:
    """Classify images, with an interval on every class probability.

    PATH is a file, a folder, a quoted pattern such as 'photos/**/*.jpg', or - for a list of files on standard input.
    What cannot be read is named and skipped; if nothing could be read, the exit code is 3.
    """
    if go_on:
        _continue(context, out, devices)
        return
    if not paths:
        raise click.UsageError("Missing argument 'PATH...'", ctx=context)
    form = _format(context, form, out)
    from bayesnet import workflows

    for drawn, suffix in ((grid, ".png"), (html, ".html")):
        if drawn is not None:
            workflows.check_new(drawn, suffix)

    from .progress import FileProgress
    from .render import print_json, print_predictions, say_what_intervals_are

    separator = _separator(context, paths, null=null)
    classifier = workflows.ImageClassifier(run, model=model, level=interval, samples=samples, devices=devices)
    images = _images(paths, separator)
    if samples is not None and samples < 128:
        click.echo(f"{samples} draws: intervals are coarse below 128", err=True)
    if form is None:
        record = workflows.predict_images(images, classifier, classes=shown or "all", strict=strict)
        for entry in record["skipped"]:
            click.echo(f"skipped {printable(entry['reason'])}", err=True)
        _draw(record, classifier, grid, html)
        if as_json:
            print_json(record)
        else:
            print_predictions(record, with_classes=shown is not None)
        return
    if out is None:
        say_what_intervals_are(classifier.interval)
        rows = workflows.row_format(form, classifier.classes, shown, spreadsheet_safe=spreadsheet_safe)
        _stream(images, classifier, rows, strict=strict)
        return
    with _hint_on_interruption(out), FileProgress() as progress:
        summary = workflows.predict_to_file(
            images,
            out,
            classifier,
            format=form,
            classes=shown,
            spreadsheet_safe=spreadsheet_safe,
            strict=strict,
            progress=progress,
        )
    _say_done(summary)


def _draw(record: JsonObject, classifier: ImageClassifier, grid: Path | None, html: Path | None) -> None:
    """Write the pictures that are asked for, and say how many of the images they show."""
    from bayesnet import workflows

    for out, write in ((grid, workflows.write_grid), (html, workflows.write_page)):
        if out is not None:
            shown = write(record, classifier, out)
            click.echo(f"{printable(str(out))}: {shown} of {len(record['predictions'])} images", err=True)


def _continue(context: click.Context, out: Path | None, devices: str) -> None:
    """Go on with a file of predictions."""
    if out is None:
        raise click.UsageError("--continue needs --out FILE, the file to go on with", ctx=context)
    given = [name for name in RECORDED if _is_given(context, name)]
    if given:
        what = "--continue takes --out and --devices alone: the rest is as it was begun"
        raise click.UsageError(what, ctx=context)
    from bayesnet import workflows

    from .progress import FileProgress

    with _hint_on_interruption(out), FileProgress() as progress:
        summary = workflows.continue_predictions(out, devices=devices, progress=progress)
    _say_done(summary)


def _is_given(context: click.Context, name: str) -> bool:
    """Return whether a parameter is on the command line."""
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _separator(context: click.Context, paths: tuple[Path, ...], *, null: bool) -> bytes | None:
    """Return what ends a name of the list on standard input; None where files are named."""
    if STDIN not in paths:
        if null:
            raise click.UsageError("--null is for PATH -, a list on standard input", ctx=context)
        return None
    if len(paths) > 1:
        raise click.UsageError("- stands alone: the list on standard input can name the other files", ctx=context)
    return b"\0" if null else b"\n"


def _images(paths: tuple[Path, ...], separator: bytes | None) -> Iterator[Path]:
    """Return the image files that the arguments, or a list on standard input, name."""
    from bayesnet.data.finding import find_images, listed_images

    return find_images(paths) if separator is None else listed_images(sys.stdin.buffer, separator=separator)


def _format(context: click.Context, form: str | None, out: Path | None) -> str | None:
    """Return the format of lines, or None for a table or JSON; refuse options that contradict each other."""
    if context.params["as_json"] and (form or out):
        raise click.UsageError("--json is one object on stdout: give either it or --format and --out", ctx=context)
    if out is not None and form is None:
        form = SUFFIX_FORMATS.get(out.suffix.lower())
        if form is None:
            raise click.UsageError(f"give --format, or end --out in {' or '.join(SUFFIX_FORMATS)}", ctx=context)
    if form and (context.params["grid"] or context.params["html"]):
        raise click.UsageError("--grid and --html go with the table or --json, not with --format or --out", ctx=context)
    if context.params["spreadsheet_safe"] and form != "csv":
        raise click.UsageError("--spreadsheet-safe is for --format csv", ctx=context)
    return form


def _stream(images: Iterator[Path], classifier: ImageClassifier, rows: RowFormat, *, strict: bool) -> None:
    """Print one line per file as its chunk is done."""
    from bayesnet.workflows import check_any_read

    stdout = sys.stdout.buffer
    stdout.write(rows.header)
    for number, outcome in enumerate(classifier.outcomes(images), start=1):
        stdout.write(rows.line(outcome))
        if number % classifier.predictor.chunk_size == 0:
            stdout.flush()
    stdout.flush()
    check_any_read(classifier.num_rows, classifier.num_skipped, classifier.first_reason, strict=strict)


@contextmanager
def _hint_on_interruption(out: Path) -> Iterator[None]:
    """Say how to go on where a signal ends the writing of a file; an error says itself what to do."""
    try:
        yield
    except KeyboardInterrupt:
        from bayesnet.workflows.prediction_file import unfinished

        if unfinished(out).exists():
            command = f"bayesnet predict --continue --out {shlex.quote(str(out))}"
            click.echo(f"go on with: {printable(command)}", err=True)
        raise


def _say_done(summary: JsonObject) -> None:
    """Print what a file of predictions holds, and what its intervals are."""
    from .render import say_what_intervals_are

    counts = f"{summary['num_predictions']} predictions, {summary['num_skipped']} files skipped"
    click.echo(f"{printable(summary['file'])}: {counts}")
    say_what_intervals_are(summary["interval"])
