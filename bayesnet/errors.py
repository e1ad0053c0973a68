"""Errors that users see: each says what went wrong, where, and what to do, and carries the exit code of the command.

The codes are a public contract: 1 bug, 2 usage or configuration, 3 data, 4 checkpoint, 5 device or memory, 6 storage,
7 diverged, 8 run directory busy, 130 interrupted, 143 terminated.
"""

from __future__ import annotations


class BayesnetError(Exception):
    """Base of every error that is the caller's to fix.

    Args:
        what: What went wrong, one clause, no full stop.
        where: The path, key or value concerned.
        hint: What to do about it.

    Example:
        >>> print(ConfigError("unknown family", where="mean_feild", hint="did you mean 'mean_field'?"))
        unknown family (mean_feild): did you mean 'mean_field'?
    """

    exit_code: int = 1

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        """Return one printable line ``WHAT (WHERE): WHAT TO DO``, control characters escaped."""
        text = self.what
        if self.where is not None:
            text += f" ({self.where})"
        if self.hint is not None:
            text += f": {self.hint}"
        return printable(text)


class ConfigError(BayesnetError):
    """Wrong usage or configuration: an unknown name, key or value."""

    exit_code = 2


class DataError(BayesnetError):
    """The data set or an image cannot be used."""

    exit_code = 3


class CheckpointError(BayesnetError):
    """A run or checkpoint is missing, unreadable, tampered with or incompatible."""

    exit_code = 4


class DeviceError(BayesnetError):
    """A device does not exist or has not enough memory."""

    exit_code = 5


class StorageError(BayesnetError):
    """The file system refused a read or write: full, read-only, no permission."""

    exit_code = 6


class DivergedError(BayesnetError):
    """Training, or a trained model, produced NaN or infinity."""

    exit_code = 7


class BusyError(BayesnetError):
    """Another process is writing to the run directory."""

    exit_code = 8


class InterruptedRunError(BayesnetError):
    """A signal stopped the run.

    Args:
        signal_number: The signal received, 2 (SIGINT) or 15 (SIGTERM); the exit code is 128 plus this.
        where: The run directory.
        hint: The command that continues it.
    """

    def __init__(self, signal_number: int, *, where: object = None, hint: str | None = None) -> None:
        super().__init__("interrupted, checkpoint saved", where=where, hint=hint)
        self.exit_code = 128 + signal_number


class StopRequest(KeyboardInterrupt):
    """A signal that arrived where nothing has to be saved first.

    No Exception, so that no handler of a decoder's or a file's errors can swallow it.

    Args:
        signal_number: 2 (SIGINT) or 15 (SIGTERM).
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted")
        self.exit_code = 128 + signal_number


def printable(text: str) -> str:
    r"""Return ``text`` on one line with control and undecodable characters escaped, so no name can drive a terminal.

    Args:
        text: Any string, possibly with surrogate escapes from a file name that is not UTF-8.

    Example:
        >>> print(printable("a\nb\x1b[31m"))
        a\nb\x1b[31m
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )
