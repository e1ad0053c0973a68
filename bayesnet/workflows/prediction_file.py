"""Predictions in a file that outlives its writer: what is still to be done lies beside it until all is done.

``FILE.unfinished`` is written whole before the first prediction: a line of JSON with the model and the options, then a
line per image. Rows go to ``FILE`` in that order, so its complete lines say which images are left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesnet import locking, storage
from bayesnet.config import require
from bayesnet.errors import CheckpointError, ConfigError, StorageError
from bayesnet.rundir import RunDirectory
from bayesnet.strict_json import json_line, parse_json
from bayesnet.types import JsonObject
from bayesnet.workflows.predicting import ImageClassifier, check_any_read
from bayesnet.workflows.prediction_rows import RowFormat, row_format

VERSION = 1
_MAX_LINE_BYTES = 2**24
_KEYS: dict[str, type | tuple[type, ...]] = {
    "version": int,
    "directory": str,
    "run": str,
    "model": str,
    "checkpoint": str,
    "calibration": (str, type(None)),
    "level": float,
    "samples": (int, type(None)),
    "format": str,
    "classes": (str, type(None)),
    "spreadsheet_safe": bool,
    "strict": bool,
}

Progress = Callable[[int, int], None]
"""Called with the number of files done and the number of all."""


@dataclass
class Done:
    """What a file of predictions holds.

    Attributes:
        num_rows: Images with a prediction.
        num_skipped: Files without one.
        first_reason: Why the first of these has none.
    """

    num_rows: int = 0
    num_skipped: int = 0
    first_reason: str | None = None

    def count(self, reason: str | None) -> None:
        """Count a file, with the reason where it has no prediction."""
        if reason is None:
            self.num_rows += 1
        else:
            self.num_skipped += 1
            self.first_reason = self.first_reason or reason


def predict_to_file(
    paths: Iterable[Path],
    out: Path,
    classifier: ImageClassifier,
    *,
    format: str,
    classes: str | None = None,
    spreadsheet_safe: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> JsonObject:
    """Write one line per image file to a new file; after any interruption `continue_predictions` goes on.

    Args:
        paths: Image files; all are listed before the first is read.
        out: The file to write, which must not exist.
        classifier: The model.
        format: "csv" or "jsonl".
        classes: See `row_format`.
        spreadsheet_safe: See `row_format`.
        strict: Whether one file that cannot be read is an error, once all are done.
        progress: Told how many files are done.

    Returns:
        ``file``, ``run``, ``model``, ``calibrated``, ``num_predictions`` and ``num_skipped`` of the whole file, and
        ``interval``, whose ``widened`` is over the images predicted now.

    Raises:
        ConfigError: The file exists, or an option is unknown.
        DataError: No image could be read, or not all where ``strict``.
        StorageError: The file system refused.
        BusyError: Another process writes to it.
    """
    rows = row_format(format, classifier.classes, classes, spreadsheet_safe=spreadsheet_safe)
    header: JsonObject = {
        "version": VERSION,
        "directory": str(Path.cwd()),
        "run": str(classifier.run),
        "model": classifier.model,
        **_digests(classifier),
        "level": float(classifier.level),
        "samples": classifier.samples,
        "format": format,
        "classes": classes,
        "spreadsheet_safe": spreadsheet_safe,
        "strict": strict,
    }
    with _locked(out):
        hint = "go on with --continue" if unfinished(out).exists() else "choose another name"
        if os.path.lexists(out) or unfinished(out).exists():
            raise ConfigError("the file of predictions exists", where=out, hint=hint)
        _write_list(unfinished(out), header, paths)
        return _go_on(out, classifier, rows, strict=strict, progress=progress)


def continue_predictions(out: Path, *, devices: str = "auto", progress: Progress | None = None) -> JsonObject:
    """Go on with a file of predictions where a kill, a signal or a full disk ended it.

    Args:
        out: The file that `predict_to_file` was writing.
        devices: "auto", "cpu", "cuda:0".
        progress: Told how many files are done.

    Returns:
        As `predict_to_file`.

    Raises:
        ConfigError: There is nothing to go on with, or it was begun in another directory.
        CheckpointError: The run was trained or calibrated again since, or the list of images is damaged.
        StorageError: The file was changed since, or the file system refused.
        BayesnetError: See `predict_to_file`.
    """
    with _locked(out):
        header = _read_header(out)
        here = str(Path.cwd())
        require(header["directory"] == here, f"was begun in {header['directory']}: go there", where=str(out))
        classifier = ImageClassifier(
            header["run"],
            model=header["model"],
            level=header["level"],
            samples=header["samples"],
            devices=devices,
        )
        for key, digest in _digests(classifier).items():
            if header[key] != digest:
                hint = "its predictions would not fit those made before: delete the file and begin anew"
                raise CheckpointError(f"the run has another {key} now", where=header["run"], hint=hint)
        safe = header["spreadsheet_safe"]
        rows = row_format(header["format"], classifier.classes, header["classes"], spreadsheet_safe=safe)
        return _go_on(out, classifier, rows, strict=header["strict"], progress=progress)


def _go_on(
    out: Path, classifier: ImageClassifier, rows: RowFormat, *, strict: bool, progress: Progress | None
) -> JsonObject:
    """Predict the images that are left, remove their list, and return the summary."""
    total = sum(1 for _ in _listed(unfinished(out)))
    paths = _listed(unfinished(out))
    done = _keep_complete_lines(out, rows, paths)
    with storage.storage_errors("cannot write the predictions", out), out.open("ab") as file:
        for outcome in classifier.outcomes(map(Path, paths)):
            file.write(rows.line(outcome))
            done.count(outcome.get("reason"))
            count = done.num_rows + done.num_skipped
            if count % classifier.predictor.chunk_size == 0:
                file.flush()
                if progress is not None:
                    progress(count, total)
        file.flush()
        os.fsync(file.fileno())
    with storage.storage_errors("cannot remove the list of images", out):
        unfinished(out).unlink()
        storage.sync_directory(out.absolute().parent)
    check_any_read(done.num_rows, done.num_skipped, done.first_reason, strict=strict)
    return {
        "file": str(out),
        "run": str(classifier.run),
        "model": classifier.model,
        "calibrated": classifier.calibrated,
        "interval": classifier.interval,
        "num_predictions": done.num_rows,
        "num_skipped": done.num_skipped,
    }


def _keep_complete_lines(out: Path, rows: RowFormat, paths: Iterator[str]) -> Done:
    """Cut a file off behind its last complete line, taking one path for each line; make it where it is not there.

    Raises:
        StorageError: A line is not that of its image.
    """
    done, end = Done(), 0
    with storage.storage_errors("cannot read the predictions", out):
        descriptor = os.open(out, os.O_RDWR | os.O_CREAT | storage.OPEN_FLAGS, 0o666)
        with os.fdopen(descriptor, "r+b") as file:
            header = file.read(len(rows.header))
            if header != rows.header:
                if not rows.header.startswith(header) or file.read(1):
                    raise _changed(out, 1)
                file.seek(0)
                file.write(rows.header)
            end = len(rows.header)
            number = 1 + bool(rows.header)
            while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
                try:
                    written, reason = rows.parse(line[:-1])
                except ValueError as error:
                    raise _changed(out, number) from error
                path = next(paths, None)
                if path is None or written != rows.written_path(path):
                    raise _changed(out, number)
                done.count(reason)
                end, number = end + len(line), number + 1
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        storage.sync_directory(out.absolute().parent)
    return done


def _changed(out: Path, number: int) -> StorageError:
    what = f"line {number} is not the one that was written"
    return StorageError(what, where=out, hint="delete the file and begin anew")


def unfinished(out: Path) -> Path:
    """Return where the options and images of a file of predictions stand until it is whole."""
    return out.with_name(f"{out.name}.unfinished")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of a file of predictions, and leave none behind."""
    require(out.name not in ("", ".."), "must name a file", where=f"out = {out}")
    lock = out.with_name(f"{out.name}.lock")
    with storage.storage_errors("cannot write the predictions", out):
        release = locking.acquire(lock, "file of predictions")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
        release()


def _digests(classifier: ImageClassifier) -> JsonObject:
    """Return what tells the model and its calibration from any other: SHA-256."""
    path = RunDirectory.open(classifier.run).calibration
    calibration = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    return {"checkpoint": classifier.digest, "calibration": calibration}


def _write_list(path: Path, header: JsonObject, paths: Iterable[Path]) -> None:
    """Write the options and the images, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("xb") as file:
            file.write(json_line(header))
            file.writelines(json.dumps(str(each)).encode("ascii") + b"\n" for each in paths)
            file.flush()
            os.fsync(file.fileno())

    storage.replace_file(path, write, "cannot write the list of images")


def _read_header(out: Path) -> dict[str, Any]:
    """Return the options with which a file of predictions was begun.

    Raises:
        ConfigError: There is nothing to go on with.
        CheckpointError: They are damaged, or of another version of bayesnet.
    """
    path = unfinished(out)
    if not path.exists():
        what = "the file of predictions is finished" if out.exists() else "there is no such file of predictions"
        raise ConfigError(what, where=out, hint="begin one with `bayesnet predict PATH --out FILE`")
    with storage.read_errors("cannot read the list of images", path), path.open("rb") as file:
        header = parse_json(file.readline(_MAX_LINE_BYTES), where=path)
    valid = header.keys() == _KEYS.keys() and all(isinstance(header[key], kind) for key, kind in _KEYS.items())
    if not valid or header["version"] != VERSION:
        raise CheckpointError("not a list of images of this version", where=path, hint="begin anew")
    return dict(header)


def _listed(path: Path) -> Iterator[str]:
    """Yield the images of a list.

    Raises:
        CheckpointError: It is damaged.
    """
    with storage.read_errors("cannot read the list of images", path), path.open("rb") as file:
        file.readline(_MAX_LINE_BYTES)
        while line := file.readline(_MAX_LINE_BYTES):
            try:
                name = json.loads(line)
            except ValueError:
                name = None
            if not isinstance(name, str) or "\0" in name:
                raise CheckpointError("the list of images is damaged", where=path, hint="begin anew")
            yield name
