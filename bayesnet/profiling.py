"""A trace of a few training steps by torch.profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bayesnet import storage
from bayesnet.config import require

SKIPPED_STEPS = 3
PROFILED_STEPS = 10


class StepProfiler:
    """Traces training steps 4 to 13 of this process, or as many as there are, and writes the trace when they are done.

    Args:
        path: The file to write, JSON in Chrome's trace format; it is replaced if it is there.
        device: Whose activity is traced, beside the CPU's.

    Raises:
        ConfigError: The file's folder does not exist.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        require(path.parent.is_dir(), "the folder of the trace does not exist", where=f"{path}", hint="make it first")
        self.path = path
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = profile(activities=activities, record_shapes=True)
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
        if self._profile is not None and self._steps > SKIPPED_STEPS:
            self._write()

    def _write(self) -> None:
        assert self._profile is not None
        finished, self._profile = self._profile, None
        finished.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            finished.export_chrome_trace(str(trace))
            storage.write_bytes(self.path, trace.read_bytes())


@contextlib.contextmanager
def profiled(path: Path | None, device: torch.device) -> Iterator[StepProfiler | None]:
    """Give a profiler to step, or None where no trace is wanted; write the trace at the end, whatever happens."""
    if path is None:
        yield None
        return
    profiler = StepProfiler(path, device)
    try:
        yield profiler
    finally:
        profiler.close()
