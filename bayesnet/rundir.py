"""Run directories: the interface between commands. `train` makes one; the other commands read it and add to it.

One process at a time may write: it holds `RunDirectory.lock`. A run is *finished* once its summary says so, and
commands that are given no run take the newest finished one.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from bayesnet import storage
from bayesnet.errors import BusyError, CheckpointError, ConfigError, StorageError
from bayesnet.locking import acquire, owner
from bayesnet.types import JsonObject

LOCK = ".lock"
RUNS = Path("runs")

_TRAIN_HINT = "make one with `bayesnet train`"
_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_MAX_LABEL = 60
_MAX_NAMES = 100


class RunDirectory:
    """The files of one run; get one with `create`, `open` or `find_run`.

    Args:
        path: The directory.
        created: The directories that were made for it, outermost first, which `discard` may remove.
        fresh: Whether this process made the run, so that `discard` may remove its files.
    """

    def __init__(self, path: Path, *, created: tuple[Path, ...] = (), fresh: bool = False) -> None:
        self.path = path
        self._created = created
        self._fresh = fresh
        self.config = path / "config.toml"
        self.environment = path / "environment.json"
        self.classes = path / "classes.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.calibration = path / "calibration.json"
        self.posterior = path / "posterior.nc"
        self.predictions = path / "predictions.jsonl"
        self.report = path / "report.html"
        self.log = path / "log.txt"

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def create(cls, out: Path | None, label: str, root: Path = RUNS) -> RunDirectory:
        """Make a new run directory and prove that it can be written to.

        Args:
            out: The directory itself, new or empty; None makes ``root/2026-11-23-101502-LABEL`` (local time).
            label: What the run is, such as "digits-mean_field"; unsafe characters become hyphens.
            root: Where runs live.

        Raises:
            ConfigError: ``out`` is not empty.
            BusyError: Another process is starting or writing a run in ``out``.
            StorageError: The file system refused; nothing is left behind.
        """
        with storage.storage_errors("cannot create the run directory", out or root):
            path, created = _claim_new(root, label) if out is None else _claim_empty(out)
            try:
                storage.write_new(path / LOCK, owner())  # one starter wins, and the disk takes a synced write
            except FileExistsError:
                raise _starting(path) from None
            except BaseException:
                with contextlib.suppress(OSError):
                    (path / LOCK).unlink(missing_ok=True)
                storage.remove_empty(created)
                raise
        return cls(path, created=created, fresh=True)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Return an existing run directory.

        Raises:
            CheckpointError: It does not exist or holds no configuration.
        """
        with storage.read_errors("cannot open the run directory", path):
            if not path.is_dir():
                raise CheckpointError("run directory does not exist", where=path, hint=_TRAIN_HINT)
            run = cls(path)
            if not run.config.is_file():
                raise CheckpointError("not a run directory, it has no config.toml", where=path, hint=_TRAIN_HINT)
        return run

    def model_checkpoints(self, name: str, part: str = "") -> Path:
        """Return where the checkpoints of a model live, such as "bayesian", or of a part that it is made of.

        Args:
            name: The model.
            part: A member of several, a fold, the head; without it the model itself.

        Raises:
            CheckpointError: A name is not a plain one, or a link leads out of the run directory.
        """
        parts = (name, part) if part else (name,)
        for each in parts:
            if not _MODEL_NAME.fullmatch(each):
                raise CheckpointError("not a model name", where=each)
        return self._inside("models", *parts, "checkpoints")

    @property
    def plots(self) -> Path:
        """Where plots go.

        Raises:
            CheckpointError: A link leads out of the run directory.
        """
        return self._inside("plots")

    @property
    def export(self) -> Path:
        """Where `export` writes unless it is told another place.

        Raises:
            CheckpointError: A link leads out of the run directory.
        """
        return self._inside("export")

    def write_json(self, name: str, record: JsonObject) -> None:
        """Write one of the run's JSON files atomically, NaN and infinity as null.

        Raises:
            StorageError: The file system refused.
        """
        storage.write_json(self._file(name), record)

    def write_text(self, name: str, text: str) -> None:
        """Write one of the run's text files (UTF-8) atomically; what is not text in a file name is escaped.

        Raises:
            StorageError: The file system refused.
        """
        storage.write_bytes(self._file(name), text.encode("utf-8", "backslashreplace"))

    def read_json(self, name: str) -> JsonObject:
        """Return one of the run's JSON files.

        Raises:
            CheckpointError: It is missing (the run is incomplete) or not valid.
        """
        path = self._file(name)
        with storage.read_errors("cannot read the file", path):
            if not path.exists() and not path.is_symlink():
                hint = "train the run again, or go on with `bayesnet train --resume`"
                raise CheckpointError(f"run is incomplete, {name} is missing", where=self.path, hint=hint)
        return storage.read_json(path)

    def append_metrics(self, record: JsonObject) -> None:
        """Add one line to metrics.jsonl.

        Raises:
            StorageError: The file system refused.
        """
        storage.append_line(self.metrics, record)

    def read_metrics(self) -> list[JsonObject]:
        """Return the lines of metrics.jsonl.

        Raises:
            CheckpointError: It is missing or a line is not valid.
        """
        return storage.read_lines(self.metrics)

    def read_summary(self) -> JsonObject:
        """Return summary.json.

        Raises:
            CheckpointError: It is missing or not valid.
        """
        return self.read_json(self.summary.name)

    @property
    def is_finished(self) -> bool:
        """Whether the summary says that the run is finished.

        Raises:
            CheckpointError: There is a summary, but it cannot be read.
        """
        return self.summary.exists() and self.read_summary().get("finished") is True

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint of any model or part of one is there, unverified."""
        return any(any(self.path.glob(f"models/{depth}/checkpoints/step-*")) for depth in ("*", "*/*"))

    def finish(self, summary: JsonObject) -> None:
        """Write summary.json with ``finished`` true and the time, which makes the run one that `find_run` finds.

        Raises:
            StorageError: The file system refused.
        """
        self.write_json(self.summary.name, {**summary, "finished": True, "finished_at": _now().isoformat()})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for writing. The kernel frees the lock of a dead process, so it never goes stale.

        What killed processes of this host left unfinished at the top of the directory is removed.

        Raises:
            BusyError: Another process, or this one elsewhere, holds it.
            StorageError: The file system refused.
        """
        with storage.storage_errors("cannot lock the run directory", self.path):
            release = acquire(self.path / LOCK)
        try:
            storage.remove_stale(self.path)
            yield
        finally:
            release()

    def discard(self) -> bool:
        """Remove the run if this process made it and it holds no checkpoint yet: a failed start leaves nothing behind.

        Only the run's own files and the directories that were made for it are removed; failing to is no error, for an
        error is being reported already.

        Returns:
            Whether the run was one to remove.
        """
        if not self._fresh or self.has_checkpoint:
            return False
        own = [value for value in vars(self).values() if isinstance(value, Path) and value.parent == self.path]
        for path in (*own, self.path / LOCK):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        depths = ("*", "*/*", "*/*/*")  # models, their parts, the checkpoints of each
        inner = [path for depth in depths for path in self.path.glob(f"models/{depth}")]
        storage.remove_empty((*self._created, self.path / "plots", self.path / "models", *inner))
        return True

    def _file(self, name: str) -> Path:
        """Return the path of a file at the top of the directory; names come from code, so a bad one is a bug."""
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"not a file name of a run: {name!r}")
        return self.path / name

    def _inside(self, *parts: str) -> Path:
        """Return a path below the directory, refusing links that a stranger's run may have planted to lead out."""
        path = self.path.joinpath(*parts)
        with storage.read_errors("cannot open the run directory", path):
            if not path.resolve().is_relative_to(self.path.resolve()):
                raise CheckpointError("a link leads out of the run directory", where=path, hint="remove it")
        return path


def find_run(run: str | Path | None, root: Path = RUNS) -> RunDirectory:
    """Return the given run, or else the newest finished one directly under ``root`` (ties: the last by name).

    A directory whose summary cannot be read is no finished run.

    Raises:
        CheckpointError: The run does not exist, or there is no finished one.
    """
    if run is not None:
        return RunDirectory.open(Path(run))
    finished: list[tuple[datetime, str, RunDirectory]] = []
    with storage.read_errors("cannot list the runs", root):
        for path in root.iterdir() if root.is_dir() else ():
            with contextlib.suppress(CheckpointError, ValueError, TypeError):
                candidate = RunDirectory.open(path)
                if candidate.is_finished:
                    time = datetime.fromisoformat(candidate.read_summary().get("finished_at"))  # type: ignore[arg-type]
                    finished.append((time if time.tzinfo else time.replace(tzinfo=UTC), path.name, candidate))
    if not finished:
        raise CheckpointError("there is no finished run", where=root, hint=_TRAIN_HINT)
    return max(finished, key=lambda entry: entry[:2])[2]


def slug(label: str) -> str:
    """Return ``label`` as part of a directory name: ASCII letters, digits, ``_``, ``.`` and ``-``, at most 60.

    Example:
        >>> slug("folder:../My Photos-mean_field")
        'folder-My-Photos-mean_field'
    """
    text = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode("ascii")
    parts = re.split(r"[^A-Za-z0-9_.]+", text)
    return "-".join(part.strip(".") for part in parts if part.strip("."))[:_MAX_LABEL] or "run"


def _claim_new(root: Path, label: str) -> tuple[Path, tuple[Path, ...]]:
    """Make a directory under ``root`` named after now and the label; a taken name gets a random suffix."""
    parents = storage.make_directories(root)
    name = f"{_now().astimezone():%Y-%m-%d-%H%M%S}-{slug(label)}"
    path = root / name
    made = [*parents]
    try:
        for _ in range(_MAX_NAMES):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                made.append(path)
                storage.sync_directory(root)
                return path, tuple(made)
            path = root / f"{name}-{secrets.token_hex(3)}"
        raise StorageError("cannot find a free name for the run", where=root / name)
    except BaseException:
        storage.remove_empty(made)
        raise


def _claim_empty(out: Path) -> tuple[Path, tuple[Path, ...]]:
    """Make ``out`` or check that it is empty."""
    created = storage.make_directories(out)
    names = {path.name for path in out.iterdir()}
    if names == {LOCK}:
        raise _starting(out)
    if names:
        if LOCK in names:
            with RunDirectory(out).lock():  # busy comes before not empty: it says more
                pass
        hint = f"choose another --out, or go on with --resume {out}"
        raise ConfigError("output directory is not empty", where=out, hint=hint)
    return out, created


def _starting(path: Path) -> BusyError:
    """Return the error for a directory that has a lock file and nothing else."""
    hint = "choose another --out, or remove it if none is"
    return BusyError("another process is starting a run in the directory", where=path, hint=hint)


def _now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)
