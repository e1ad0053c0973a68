"""The command group, and the one place where errors become one line and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence

import click

import bayesnet
from bayesnet.errors import BayesnetError, StorageError, printable

from .bench import bench
from .calibrate import calibrate
from .check_data import check_data
from .compare import compare
from .doctor import doctor
from .export import export
from .list import list_command
from .predict import predict
from .selftest import selftest
from .train import train

BROKEN_PIPE = 141
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # torch has no one error type for it


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(bayesnet.__version__, prog_name="bayesnet")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Image classifiers that know what they do not know.

    Trains a CNN with a Bayesian head beside its deterministic twin, calibrates both, and predicts with an interval on
    every class probability.
    """


for command in (train, calibrate, predict, bench, compare, export, list_command, check_data, doctor, selftest):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code.

    Args:
        arguments: Instead of sys.argv[1:].
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Before torch loads OpenMP: waiting threads sleep instead of spinning. On a busy machine spinning costs minutes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # --profile: its log is not for users
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (`bayesnet predict ... | head`). Python flushes stdout at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code. Not by click's own main, which ends a broken pipe with 1, a bug's code.

    Raises:
        BrokenPipeError: Whoever read stdout went away.
    """
    try:
        with cli.make_context("bayesnet", list(arguments)) as context:  # which empties the list
            result = cli.invoke(context)
    except BrokenPipeError:
        raise
    except click.exceptions.Exit as leave:  # --help and --version
        return leave.exit_code
    except BaseException as error:
        return _report(error, arguments)
    return result if isinstance(result, int) else 0


def _report(error: BaseException, arguments: Sequence[str]) -> int:
    """Print one line about the error (and the JSON object under --json); return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    code, text = _describe(error)
    if "--debug" in arguments:
        traceback.print_exception(error)
    click.echo(f"bayesnet: error: {text}", err=True)
    if "--json" in arguments:
        click.echo(json.dumps({"error": {"code": code, "message": text}}))
    return code


def _describe(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an error."""
    if isinstance(error, BayesnetError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f": see `{context.command_path} --help`" if context is not None else ""
        return 2, printable(" ".join(error.format_message().split()).rstrip(".")) + hint
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return getattr(error, "exit_code", 130), str(error) or "interrupted"
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        return 5, "out of memory: lower training.batch_size, predict.chunk_size or backbone.width"
    if isinstance(error, OSError):
        return StorageError.exit_code, printable(f"{error.strerror or error} ({error.filename})")
    text = printable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return 1, f"this is a bug in bayesnet ({text}): run again as `bayesnet --debug ...` and report it"
