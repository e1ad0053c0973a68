"""A trace of a few training steps by torch.profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bayesnet import storage
from bayesnet.config import require
from bayesnet.errors import StorageError

SKIPPED_STEPS = 3
PROFILED_STEPS = 10


class StepProfiler:
    """Traces training steps 4 to 13 of this process, or as many as there are, and writes the trace when they are done.

    A trace is never worth a training: what goes wrong with it becomes a note.

    Args:
        path: The file to write, JSON in Chrome's trace format; it is replaced if it is there.
        device: Whose activity is traced, beside the CPU's.
        note: Called with a sentence where no trace could be written.
    """

    def __init__(self, path: Path, device: torch.device, note: Callable[[str], object]) -> None:
        self.path = path
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its log is not for users
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = profile(activities=activities, record_shapes=True)
        self._note = note
        self._steps = 0

    def step(self) -> None:
        """Count a finished step; start after the skipped ones, stop and write after the profiled ones."""
        self._steps += 1
        if self._profile is None:
            return
        if self._steps == SKIPPED_STEPS:
            self._profile.start()
        elif self._steps == SKIPPED_STEPS + PROFILED_STEPS:
            self._write()

    def close(self) -> None:
        """Write what there is, if steps were profiled and not written yet."""
        if self._profile is None:
            return
        if self._steps > SKIPPED_STEPS:
            self._write()
            return
        if self._steps == SKIPPED_STEPS:
            self._profile.stop()
        self._profile = None
        self._note(
            f"No trace was written: there were {self._steps} steps, and the first {SKIPPED_STEPS} are not traced."
        )

    def _write(self) -> None:
        assert self._profile is not None
        finished, self._profile = self._profile, None
        finished.stop()
        try:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                finished.export_chrome_trace(str(trace))
                storage.write_bytes(self.path, trace.read_bytes())
        except (StorageError, OSError) as error:
            self._note(f"No trace was written: {error}")


def check_trace_path(path: Path) -> None:
    """Raise ConfigError, before any work, where no trace could be written.

    Raises:
        ConfigError: The folder does not exist, or the path is one.
    """
    require(path.parent.is_dir(), "the folder of the trace does not exist", where=f"{path}", hint="make it first")
    regular = path.is_file() or not path.exists()
    require(regular, "the trace needs a regular file", where=f"{path}", hint="name a new one")


@contextlib.contextmanager
def profiled(path: Path | None, device: torch.device, note: Callable[[str], object]) -> Iterator[StepProfiler | None]:
    """Give a profiler to step, or None where no trace is wanted; write the trace at the end, whatever happens."""
    if path is None:
        yield None
        return
    check_trace_path(path)
    profiler = StepProfiler(path, device, note)
    try:
        yield profiler
    finally:
        profiler.close()
