"""`bayesnet check-data`."""

from __future__ import annotations

import click

from .options import json_option


@click.command("check-data")
@click.argument("path", type=click.Path())
@click.option("--max-pixels", type=click.IntRange(min=1), metavar="N", help="Largest image; default: that of train.")
@json_option
def check_data(path: str, max_pixels: int | None, as_json: bool) -> int:
    """Audit a folder of images before training.

    Every file is decoded and hashed: unreadable files, images in two splits or classes, class counts, links, pixel
    modes, sizes. Exit code 3 if anything would stop training or make its test results untrue.
    """
    from bayesnet import workflows
    from bayesnet.errors import DataError

    from .progress import FileProgress
    from .render import print_json
    from .render_audit import print_audit

    with FileProgress() as progress:
        record = workflows.check_data(path, max_pixels=max_pixels, progress=progress)
    if as_json:
        print_json(record)
    else:
        print_audit(record)
    return 0 if record["ok"] else DataError.exit_code
