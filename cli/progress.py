"""Progress on stderr (a bar on a terminal, plain lines elsewhere), and signals."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bayesnet.battery.base import Check
from bayesnet.errors import StopRequest, printable
from bayesnet.progress import EpochReport
from bayesnet.workflows import SelftestListener, TrainListener


class StopSignals:
    """SIGINT and SIGTERM: while steps are taken the first asks for a checkpoint, a second one ends at once.

    Outside the optimisation loop there is nothing to save, so the first one ends at once too.
    """

    def __init__(self) -> None:
        self.armed = False
        self._pending: int | None = None
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give both signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def pending(self) -> int | None:
        """Return the number of the signal that asks for an end, or None."""
        return self._pending

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.armed or self._pending is not None:
            raise StopRequest(number)
        self._pending = number

    def disarm(self) -> None:
        """Say that there is nothing left to save; a signal that came meanwhile ends the run now."""
        self.armed = False
        if self._pending is not None:
            raise StopRequest(self._pending)


class _WithBar:
    """A context manager that holds a bar on stderr where that is a terminal.

    Args:
        text: The column before the bar.
    """

    def __init__(self, text: TextColumn) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            columns = (text, BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class TrainProgress(_WithBar, TrainListener):
    """Shows the progress of a training run; a context manager that also owns the signals."""

    def __init__(self) -> None:
        super().__init__(TextColumn("{task.description}", markup=False))
        self.signals = StopSignals()
        self._name = ""

    def __enter__(self) -> Self:
        self.signals.install()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.signals.restore()

    def on_note(self, text: str) -> None:
        """Print the sentence."""
        self._line(printable(text))

    def on_model(self, name: str, family: str) -> None:
        """Start the model's bar."""
        self._name = name
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(f"{name} ({family})", total=None)

    def on_step(self, step: int, num_steps: int) -> None:
        """Advance the bar."""
        self.signals.armed = True
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, total=num_steps)

    def on_epoch(self, report: EpochReport, num_epochs: int) -> None:
        """Print the epoch's line."""
        parts = [f"{self._name:<13} epoch {report.epoch:>3}/{num_epochs}"]
        if report.train_nll is not None:
            parts.append(f"train NLL {report.train_nll:.4f}")
        if report.posterior_scale is not None:
            parts += [f"KL {report.kl:.1f} nats", f"KL/N {report.kl_per_example:.4f}"]
        parts.append(f"validation NLL {report.validation_nll:.4f}")
        if report.posterior_scale is not None:
            parts.append(f"posterior sd {report.posterior_scale:.4f}")
        parts.append(f"{report.seconds:.1f} s")
        self._line("  ".join(parts))

    def on_fitted(self, num_epochs: int) -> None:
        """Hand signals back: nothing is left to save."""
        self.signals.disarm()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)


class SelftestProgress(SelftestListener):
    """Says which check of the battery runs."""

    def on_check(self, check: Check, number: int, total: int) -> None:
        """Print its line."""
        click.echo(f"{number:>3}/{total}  {check.id:<4} {check.name}", err=True)


class FileProgress(_WithBar):
    """Shows how many of many files are done: a bar on a terminal, a plain line every tenth elsewhere."""

    def __init__(self) -> None:
        super().__init__(TextColumn("{task.completed:,} of {task.total:,} files"))
        self._tenths = 0
        if self._bar is not None:
            self._task = self._bar.add_task("", total=None, visible=False)

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` files are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, visible=True)
        elif 10 * done // total > self._tenths:
            self._tenths = 10 * done // total
            click.echo(f"{done:,} of {total:,} files", err=True)
